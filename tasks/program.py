"""What every stage program (`python -m tasks.STAGE`) does around its work: find or make the run, launch, publish.

The same program runs three times over: as the command in dvc.yaml (launches and follows), inside the job (does the
work, in the run's snapshot), and by hand under `accelerate launch` (does the work at once, in each rank).
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llada_core.settings import ConfigError, require_package
from tasks.errors import StageError, one_line_errors
from tasks.graph import load_stage, with_sources
from tasks.launch.jobs import attach_or_submit, follow, settle, shared
from tasks.launch.launchers import machine_settings
from tasks.project import TRAINING_STAGES, LaunchParams, Params
from tasks.record.registry import hold_base
from tasks.record.runs import RunFolder, Work, differences, open_run, previous_run, request_of, stage_params

OPEN_ENDED = {"prepare"}  # reads files that no fingerprint covers, and keeps what it made by their content itself
Function = Callable[[Work], float | None]  # returns what it cost in seconds, if it knows better than the clock


def stage_program(stage: str, function: Function, arguments: list[str] | None = None) -> None:
    """The `__main__` of a stage: arguments are an instance (a benchmark) and `block.key=value` overrides."""
    with one_line_errors():
        given = sys.argv[1:] if arguments is None else arguments
        items = [text for text in given if "=" not in text]
        usage = f"python -m tasks.{stage}{' BENCHMARK' * (stage == 'evaluate')} [block.key=value ...]"
        if {"-h", "--help"} & set(items):
            print(f"{usage}\n\nMakes this stage's outputs as params.yaml says, with overrides; made ones are put back.")
            return
        if items[stage == "evaluate" :]:
            raise ConfigError(f"{stage}: unexpected {items[-1]!r}; overrides are written block.key=value")
        if folder := os.environ.get("LLADAFLOW_RUN"):
            do_work(RunFolder(Path(folder)), function)
        else:
            overrides = [text for text in given if "=" in text]
            run_stage(Path.cwd(), "@".join([stage, *items]), overrides, function)


def run_stage(root: Path, name: str, overrides: list[str], function: Function) -> RunFolder:
    """Make the outputs of a stage, or put back those that a run with the same fingerprint has made."""
    params = with_sources(stage_params(root, overrides), root)
    stage = load_stage(root, name, params)
    parsed = Params.parse(params, "params.yaml")
    launch = parsed.launch.of(stage.kind)
    for path in stage.inputs:
        hold_base(root, root / path)
    asked = request_of(root, stage, params) | {"machine": machine_settings(parsed, stage.kind, launch)}
    run = open_run(root, stage, params, asked)
    again = stage.kind in OPEN_ENDED and not _inside_ranks()
    from tasks.record import tracking

    with tracking.forwarding(run):
        if run.succeeded and not again:
            print(f"{run.key}: already made, its outputs are put in place", flush=True)
        elif _inside_ranks() or launch.kind == "inline":
            confirm_cost(root, run, launch)
            settle(run, asked, launch, again=again)
            run_inline(run, function, again=again)
        else:
            confirm_cost(root, run, launch)
            if launch.kind == "slurm" and launch.gpu is not None and stage.kind in TRAINING_STAGES:
                from tasks.plan import refuse

                refuse(Params.parse(params, "params.yaml"), stage.kind, launch.gpu)
            require_launcher(params, stage.kind)
            settle(run, asked, launch, again=again)
            with shared(run, launch) as own:
                follow(run, attach_or_submit(run, own, again=again), own)
    if rank() == 0:
        run.publish(root)
    return run


def require_launcher(params: dict[str, Any], kind: str) -> None:
    """Raises `ConfigError` where DeepSpeed is to be launched and is not there: accelerate tells it in a traceback."""
    if kind in TRAINING_STAGES:
        wanted = Params.parse(params, "params.yaml").training(kind).distribution.kind
        if wanted in ("zero2", "zero3"):
            require_package("deepspeed", "zero", f"distribution {wanted}")


def run_inline(run: RunFolder, function: Function, *, again: bool = False) -> None:
    """Do the work in this process, as the only one at this run; `again`: although it has succeeded before."""
    with _sole_worker(run), contextlib.chdir(run.tree):
        if again:
            run.forget_success()
        if not run.succeeded:
            do_work(run, function)


def do_work(run: RunFolder, function: Function) -> None:
    """Call the stage's function in the snapshot; success is noted last. Every rank calls this."""
    started = time.monotonic()
    stage = run.stage
    params = Params.parse(run.request["all_params"], run.key)
    cost = function(Work(params, run, stage, stage.partition("@")[2] or None))
    if rank() == 0:
        run.succeed(time.monotonic() - started if cost is None else cost)


def confirm_cost(root: Path, run: RunFolder, launch: LaunchParams) -> None:
    """Before doing again what took hours: say what changed and ask; a refusal puts the old outputs back."""
    old = previous_run(root, run)
    hours = (old.seconds or 0.0) / 3600 if old else 0.0
    begun = (run.path / "checkpoints").exists() or run.job is not None
    if old is None or begun or hours <= launch.confirm_hours or os.environ.get("LLADAFLOW_YES"):
        return
    print(
        f"{run.stage} took {hours:.1f} h the last time; since then changed:",
        *differences(run.request, old.request),
        sep="\n  ",
    )
    if sys.stdin.isatty() and input("do it again? [y/N] ").strip().lower() in ("y", "yes"):
        return
    old.publish(root)
    how = f"`llada accept {run.stage}` keeps them as valid, LLADAFLOW_YES=1 (`llada run --yes`) does the stage again"
    raise StageError(f"{run.stage}: not done again, the old outputs stay; {how}")


def _inside_ranks() -> bool:
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def rank() -> int:
    """Which of several processes this is; 0 writes."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def _sole_worker(run: RunFolder) -> Iterator[None]:
    """Hold the lock that a job's script holds as well; other ranks of this launch share the first one's."""
    if rank() != 0:
        yield
        return
    with run.alone() as alone:
        if not alone:
            raise ConfigError(f"{run.key} is being worked on by another process; see `llada status`")
        yield
