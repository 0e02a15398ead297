"""What two compute nodes can do, for `llada doctor`: an all-reduce between them, the shared folder, what they reach.

`python -m tasks.launch.doctor_nodes FOLDER` is what srun starts on each node; it knows no stage.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tasks.folders import write_json
from tasks.project import LaunchParams

MEGABYTES, REPEATS = 16, 4
PLACES = {"huggingface.co": ("huggingface.co", 443), "pypi.org": ("pypi.org", 443)}


def two_nodes(launch: LaunchParams, folder: Path, seconds: int = 60) -> Iterator[tuple[bool, str, str]]:
    """(fine, what, remedy) of each thing that a small job of two nodes found; waits at most `seconds` for them."""
    slurm = launch.slurm
    chosen = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "constraint": slurm.constraint}
    options = [f"--{key}={value}" for key, value in chosen.items() if value is not None]
    options += [f"--gpus-per-node={slurm.gpus_per_node}"] if slurm.gpus_per_node else []
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--time=3", f"--immediate={seconds}", "--kill-on-bad-exit=1"]
    program = f"{shlex.quote(sys.executable)} -m tasks.launch.doctor_nodes {shlex.quote(str(folder))}"
    setup = [*(f"module load {name}" for name in slurm.modules), *slurm.setup]
    command = [*srun, *options, *slurm.srun_options, "bash", "-c", "; ".join([*setup, f"exec {program}"])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120, check=False)
        text = next((line for line in done.stderr.splitlines() if line.strip()), f"exit status {done.returncode}")
    except subprocess.TimeoutExpired:
        text = "no end within the time"
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("node-*.json"))]
    if len(found) < 2:
        remedy = "try again when two nodes are free; else see `sinfo`, launch.slurm, and that they share this folder"
        yield False, f"a job of two nodes: {text}", remedy
        return
    rate = found[0]["rate"]
    slow = "see NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, and set the fast interface in launch.env"
    yield rate > 0.05, f"all-reduce between {' and '.join(node['name'] for node in found)}: {rate:.2f} GB/s", slow
    for node in found:
        reached = ", ".join(node["reached"]) or "nothing outside (fill HF_HOME on the login node; metrics still arrive)"
        yield True, f"{node['name']}: {node['gpus']} GPUs, reaches {reached}", ""


def main() -> None:
    """One node's part: meet the other through the folder, reduce, and write down what was found."""
    import torch
    import torch.distributed as dist

    folder, rank = Path(sys.argv[1]), int(os.environ["SLURM_PROCID"])
    gpus = torch.cuda.device_count()
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=int(os.environ["SLURM_NTASKS"]),
    )
    values = torch.ones(MEGABYTES << 18, device="cuda" if gpus else "cpu")
    dist.all_reduce(values)
    started = time.monotonic()
    for _ in range(REPEATS):
        dist.all_reduce(values)
    values[0].item()
    rate = REPEATS * MEGABYTES / 1024 / (time.monotonic() - started)
    places = PLACES | ({"MLflow": place} if (place := _mlflow()) else {})
    reached = [name for name, address in places.items() if _reaches(address)]
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    write_json(folder / f"node-{rank}.json", {"name": name, "rate": rate, "gpus": gpus, "reached": reached})
    dist.destroy_process_group()


def _mlflow() -> tuple[str, int] | None:
    from urllib.parse import urlsplit

    place = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    return (place.hostname, place.port or 80) if place.hostname else None


def _reaches(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
