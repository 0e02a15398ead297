"""One rank of a profile under `accelerate launch`; what the accelerate file set is noted beside what was sharded."""

import os
import sys

from torch.distributed.fsdp import FSDPModule

from llada_core.training.loop import Loop
from tests.training import ranks


def noting(run):
    def wrapped(loop):
        sharded = (m for m in loop.parts.model.modules() if isinstance(m, FSDPModule))
        ranks.SHARDED["wrapped"] = sorted({c.__name__ for m in sharded for c in type(m).__mro__})
        ranks.SHARDED["file"] = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
        ranks.SHARDED["ranks"] = int(os.environ["WORLD_SIZE"])
        return run(loop)

    return wrapped


if __name__ == "__main__":
    Loop.run = noting(Loop.run)
    ranks.main(sys.argv[1])
