"""One benchmark shared by several jobs (`launch.shards`), and one job by the GPUs of its machine: each process answers its
share, the first also merges and scores.

A job's share is a run folder below the run that it belongs to, so that its job is submitted, restarted and ended as any other
is. All write finished answers into the run's own folder. How requests are shared is llada_core.evaluation.answering's.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from llada_core.config.launch import LaunchParams
from tasks.folders import write_json
from tasks.launch import attach_or_submit, launcher_of
from tasks.record.runs import RunFolder

FOLDER = "shards"


def whole(run: RunFolder) -> RunFolder:
    """The run that a share belongs to; any other run is whole."""
    return RunFolder(run.path.parents[1]) if run.path.parent.name == FOLDER else run


@contextmanager
def shared(run: RunFolder, launch: LaunchParams) -> Iterator[LaunchParams]:
    """Has the other shares answered by jobs of their own while the block runs; yields how the first is launched.

    A share whose job is lost is done by the first, so none is waited for; those that are left end with the block,
    unless the first goes on without us.
    """
    kind, count = run.stage.partition("@")[0], launch.shards
    if kind != "evaluate" or count == 1:
        yield launch
        return
    first, *others = [
        launch.model_copy(update={"env": launch.env | {"LLADAFLOW_SHARD": f"{n}/{count}"}}) for n in range(count)
    ]
    jobs = [(_share(run, n, count), own) for n, own in enumerate(others, 1)]
    for share, own in jobs:
        attach_or_submit(share, own)
    try:
        yield first
    finally:
        if run.succeeded or launcher_of(run, first).state(run) == "gone":
            for share, own in jobs:
                launcher = launcher_of(share, own)
                if launcher.state(share) == "alive":
                    launcher.cancel(share, 0.0)


@contextmanager
def sharing(count: int, program: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Has `count` - 1 more processes of this machine run `program` while the block does the first one's share.

    Each is numbered as a launcher would number it (RANK, LOCAL_RANK, WORLD_SIZE), this one as 0, and takes the GPU of
    its number. They need no launcher, since they meet in files alone: one that dies ends no other, and what it leaves
    is done by this one. Those that still run when the block ends are ended.
    """
    if count == 1 or "RANK" in os.environ:
        yield
        return
    common = {"WORLD_SIZE": str(count)}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))}

    def numbered(rank: int) -> dict[str, str]:
        return {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}

    others = [
        subprocess.Popen(program, env={**os.environ, **threads, **(environment or {}), **numbered(rank)})
        for rank in range(1, count)
    ]
    os.environ.update(numbered(0))
    try:
        yield
    finally:
        for name in numbered(0):
            del os.environ[name]
        for process in others:
            process.terminate()
        for process in others:
            process.wait()


def _share(run: RunFolder, number: int, count: int) -> RunFolder:
    share = RunFolder(run.path / FOLDER / f"{run.key}-{number}of{count}")
    share.path.mkdir(parents=True, exist_ok=True)
    if not share.tree.is_symlink():
        share.tree.symlink_to("../../tree")
    write_json(share.path / "request.json", run.request)
    return share
