"""One process as a launcher of a GPU machine starts it: `devices.py [KIND]` prints what accelerate makes of it, as JSON.

There is no GPU: CUDA only says that it is there, and the process group that accelerate opens is gloo's.
"""

import json
import sys

import torch
import torch.distributed as dist


def main(kind: str) -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 8
    torch.cuda.set_device = lambda device: None
    opened = []
    make = dist.init_process_group

    def noted(backend, **kwargs):
        opened.append(backend)
        make("gloo", **kwargs)

    dist.init_process_group = noted
    from llada_core.training.accelerator import Ranks, accelerator_for, rank_device
    from llada_core.training.params import SFTParams

    params = SFTParams.model_validate({"max_steps": 1, "distribution": {"kind": kind}})
    engine = accelerator_for(params, cpu=False, block_classes=("LLaDABlock",))
    found = {"type": engine.distributed_type.value, "ranks": Ranks().count, "opened": opened, "sum": Ranks().sum([1.0])}
    found |= {"device": str(engine.device), "loads_to": str(rank_device())}
    if Ranks().first:
        print(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["auto"])
