"""What a stage's program does around its work (the same program is DVC's command, the job, and a rank under accelerate
launch), and the pipeline by dvc repro.
"""

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from llada_core.settings import ConfigError, nearest, read_yaml, require_package
from tasks.errors import StageError, one_line_errors
from tasks.folders import read_json
from tasks.graph import load_stage
from tasks.launch.jobs import attach_or_submit, follow, settle, shared
from tasks.launch.launcher import launcher_for, machine_settings
from tasks.launch.status import TrainingProgress
from tasks.launch.workspace import configure_without_git, pipeline_lock, with_sources
from tasks.project import LaunchParams, Params, Project
from tasks.record import tracking
from tasks.record.registry import hold_base
from tasks.record.runs import (
    RunFolder,
    StageContext,
    all_runs,
    differences,
    open_run,
    previous_run,
    rank,
    request_of,
    stage_params,
)
from tasks.record.versions import restore_if_empty
from tasks.stages import STAGES, TRAINING_STAGES, program_of

STDERR = 2  # as a child's stdout


def dvc(workspace: Project, *arguments: str, stdout: int | None = None) -> int:
    """Run a DVC command in the workspace with this environment's programs; returns its exit status.

    stdout: a descriptor for what it and its stages say; None: as this program's.
    A SIGTERM or SIGHUP (a kill, a closed terminal) goes on to DVC and to the stage that it runs, which ends its job.
    """
    mend(workspace.root)
    command = [sys.executable, "-m", "dvc", *arguments]
    started = subprocess.Popen(command, cwd=workspace.root, env=environment(), stdout=stdout)
    with started as process, _passing_on(process):
        return process.wait()


def mend(folder: Path) -> None:
    """Put aside what a DVC that was killed while it wrote has left: every later DVC command would refuse to read it.

    DVC writes dvc.lock and its table of running commands in place, and holds a lock on another file meanwhile: with
    that lock in hand, what cannot be read is broken for good. Neither is needed: without them the stages run again,
    and each puts back what its run folder holds.
    """
    for guard, file in ((".dvc/tmp/lock", "dvc.lock"), (".dvc/tmp/rwlock.lock", ".dvc/tmp/rwlock")):
        path = folder / file
        if not path.exists() or _readable(path):
            continue
        (folder / guard).parent.mkdir(parents=True, exist_ok=True)
        with (folder / guard).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() and not _readable(path):
                broken = path.with_name(path.name + ".broken")
                os.replace(path, broken)
                print(f"{path} cannot be read (was DVC killed?): put aside as {broken.name}", file=sys.stderr)


def _readable(path: Path) -> bool:
    try:
        read_yaml(path)  # reads JSON too
    except ConfigError:
        return False
    return True


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """DVC, which does not tell its children, is told together with them; then this program ends as well.

    DVC first: one that saw its child end would be at writing its own notes when the signal comes.
    """
    import psutil

    def pass_on(number: int, _frame: FrameType | None) -> None:
        try:
            own = psutil.Process(process.pid)
            told = [own, *own.children(recursive=True)]  # with the stage's job, which saves itself and ends
        except psutil.NoSuchProcess:
            told = []
        for one in told:
            with suppress(psutil.NoSuchProcess):
                one.terminate()
        psutil.wait_procs(told)
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def known(workspace: Project, stages: list[str]) -> list[str]:
    """These names of stages (`evaluate@sudoku`: an instance); raises `ConfigError` for one that dvc.yaml lacks."""
    listed = list(read_yaml(workspace.root / "dvc.yaml")["stages"])
    for name in stages:
        if name.partition("@")[0] not in listed:
            raise ConfigError(f"this run has no stage {name!r}{nearest(name, listed)}")
    return stages


def environment() -> dict[str, str]:
    """This process's environment with our interpreter first, so that `python` in dvc.yaml is the right one."""
    quiet = {"DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"}
    return os.environ | quiet | {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}


def reproduce(workspace: Project, targets: list[str], stdout: int | None = None) -> None:
    """Bring the stages (all, or `targets` with what they need) up to date; raises `StageError` when one fails.

    stdout: as `dvc` takes it.
    """
    configure_without_git(workspace.root)
    with pipeline_lock(workspace):
        status = dvc(workspace, "repro", *known(workspace, targets), stdout=stdout)
        restore_if_empty(workspace)
    if status:
        raise StageError("the pipeline stopped; the same command goes on where it ended", status if status > 2 else 1)


def results(workspace: Project) -> dict[str, Any]:
    """What a pipeline has made, for programs: folder, newest run of each stage, models, results table, registered version."""
    here, runs = workspace.root.resolve(), dict[str, str]()
    for run in all_runs(workspace):
        if run.root.resolve() == here:
            runs.setdefault(run.stage, run.key)
    files = {name: workspace.root / "reports" / f"{name}.json" for name in ("table", "registered")}
    return {
        "workspace": str(here),
        "profile": workspace.values["name"],
        "runs": runs,
        "models": {
            stage: str(here / "models" / stage) for stage in TRAINING_STAGES if (here / "models" / stage).is_dir()
        },
        **{name: read_json(file) if file.is_file() else None for name, file in files.items()},
    }


def summary(workspace: Project) -> str:
    """The results table, the registered version, and the commands that fit what was made."""
    parts, model, made = [], "", workspace.root / "models"
    table = workspace.root / "reports" / "table.md"
    if table.exists():
        parts.append(table.read_text(encoding="utf-8").strip())
    registered = workspace.root / "reports" / "registered.json"
    trained = [stage for stage in TRAINING_STAGES if (made / stage).is_dir()]
    if registered.exists():
        entry = read_json(registered)
        aliases = " ".join(f"@{alias}" for alias in entry["aliases"])
        parts.append(f"registered: models:/{entry['name']}/{entry['version']} {aliases} ({entry['gate']['reason']})")
        which = "@champion" if entry["champion"] == entry["version"] else f"/{entry['version']}"
        own = which == "@champion" and workspace.root == Path.cwd().resolve()
        model = "" if own else f"models:/{entry['name']}{which}"
    elif trained:
        model = shlex.quote(os.path.relpath(max((made / stage for stage in trained), key=_written)))
    lines = ["next:"]
    if registered.exists() or trained:
        lines.append(f"  make app{f' MODEL={model}' if model else ''}   the page, with this model")
        lines.append(f"  llada chat{f' --model {model}' if model else ''}   the same in a terminal")
    lines.append("  make ui   MLflow and Prefect in the browser")
    lines.append(f"  llada status   every run and where it is (this one: {workspace.root})")
    return "\n\n".join([*parts, "\n".join(lines)])


def _written(model: Path) -> float:
    return model.stat().st_mtime


Function = Callable[[StageContext], float | None]  # returns what it cost in seconds, if it knows better than the clock


def stage_program(stage: str, function: Function, arguments: list[str] | None = None) -> None:
    """The `__main__` of a stage: arguments are an instance (a benchmark) and `block.key=value` overrides."""
    with one_line_errors():
        given = sys.argv[1:] if arguments is None else arguments
        items = [text for text in given if "=" not in text]
        each = stage in STAGES and STAGES[stage].each
        usage = f"python -m {program_of(stage)}{' BENCHMARK' * each} [block.key=value ...]"
        if {"-h", "--help"} & set(items):
            print(f"{usage}\n\nMakes this stage's outputs as params.yaml says, with overrides; made ones are put back.")
            return
        if items[each:]:
            raise ConfigError(f"{stage}: unexpected {items[-1]!r}; overrides are written block.key=value")
        if folder := os.environ.get("LLADAFLOW_RUN"):
            do_work(RunFolder(Path(folder)), function)
        else:
            overrides = [text for text in given if "=" in text]
            run_stage(Project.at(), "@".join([stage, *items]), overrides, function)


def run_stage(project: Project, name: str, overrides: list[str], function: Function) -> RunFolder:
    """Make the outputs of a stage, or put back those that a run with the same fingerprint has made."""
    params = with_sources(stage_params(project, overrides), project)
    stage = load_stage(project, name, params)
    parsed = Params.parse(params, "params.yaml")
    launch = parsed.launch.of(stage.kind)
    for path in stage.inputs:
        hold_base(project, project.root / path)
    asked = request_of(project, stage, params) | {"machine": machine_settings(parsed, stage.kind, launch)}
    run = open_run(project, stage, params, asked)
    again = stage.kind in STAGES and STAGES[stage.kind].open_ended and not _inside_ranks()
    with tracking.forwarding(run):
        if run.succeeded and not again:
            print(f"{run.key}: already made, its outputs are put in place", flush=True)
        elif _inside_ranks() or launch.kind == "inline":
            confirm_cost(project, run, launch)
            settle(run, asked, launch, again=again)
            run_inline(run, function, again=again)
        else:
            confirm_cost(project, run, launch)
            if not launcher_for(launch).here and launch.gpu is not None and stage.kind in TRAINING_STAGES:
                from tasks.launch.plan import refuse

                refuse(parsed, stage.kind, launch.gpu)
            require_launcher(parsed, stage.kind)
            settle(run, asked, launch, again=again)
            with shared(run, launch) as own:
                follow(run, attach_or_submit(run, own, again=again), own)
    if rank() == 0:
        run.publish(project.root)
    return run


def require_launcher(params: Params, kind: str) -> None:
    """Raises `ConfigError` where DeepSpeed is to be launched and is not there: accelerate tells it in a traceback."""
    if kind in TRAINING_STAGES:
        wanted = params.training(kind).distribution.kind
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
    work = StageContext(params, run, stage, stage.partition("@")[2] or None)
    cost = function(replace(work, follow=TrainingProgress(stage)) if stage in TRAINING_STAGES else work)
    if rank() == 0:
        run.succeed(time.monotonic() - started if cost is None else cost)


def confirm_cost(project: Project, run: RunFolder, launch: LaunchParams) -> None:
    """Before doing again what took hours: say what changed and ask; a refusal puts the old outputs back."""
    old = previous_run(project, run)
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
    old.publish(project.root)
    how = f"`llada accept {run.stage}` keeps them as valid, LLADAFLOW_YES=1 (`llada run --yes`) does the stage again"
    raise StageError(f"{run.stage}: not done again, the old outputs stay; {how}")


def _inside_ranks() -> bool:
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


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
