"""Attach to a running job or submit one, follow it, cancel it; jobs that share a benchmark."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from filelock import FileLock

from llada_core.settings import ConfigError
from tasks.errors import StageError
from tasks.folders import write_json
from tasks.launch.launcher import Launcher, launcher_for, launcher_of
from tasks.project import LaunchParams
from tasks.record.runs import SHARES, RunFolder, StageRequest, changed_settings, take_settings


class TerminatedError(BaseException):
    """SIGTERM reached this program: what it looks after ends with it."""


def settle(run: RunFolder, asked: StageRequest, launch: LaunchParams, *, again: bool = False) -> None:
    """Let an unfinished run (`again`: any) that nobody is at go on with the free settings that are asked for.

    Raises `ConfigError` that names them while a job of this run is waiting or at work: it has read the others.
    """
    with FileLock(run.path / ".lock"):
        known = run.request
        changed = changed_settings(asked, known)
        if (run.succeeded and not again) or (not changed and asked["all_params"] == known["all_params"]):
            return
        launcher = launcher_of(run, launch)
        while (state := launcher.state(run)) == "unknown":
            time.sleep(launcher.poll_seconds)
        with run.alone() as alone:
            if state == "gone" and alone:
                take_settings(run, asked)
            elif changed:
                end = (
                    f"`llada cancel {run.key}` saves and ends it"
                    if run.job
                    else "Ctrl-C where it runs saves and ends it"
                )
                told = f"{run.key} ({run.job_name}) is at it with other settings ({', '.join(changed)})"
                raise ConfigError(f"{told}: {end}, and the same command goes on with the new ones")


def attach_or_submit(run: RunFolder, launch: LaunchParams, *, again: bool = False) -> Launcher:
    """Make sure that exactly one job is at `run`, unless it has succeeded; returns who looks after it.

    `again`: an old success does not count; one that somebody else's job is just having does.
    """
    with FileLock(run.path / ".lock"):
        launcher = launcher_of(run, launch)
        while again or not run.succeeded:
            state = launcher.state(run)
            if state == "alive":
                print(f"{run.key}: already running, following it", flush=True)
                break
            if state == "gone" and (again or not run.succeeded):  # asked once more: it may have succeeded just before
                for marker in ("SUCCESS", "CANCELLED", "STOP", "exit"):
                    (run.path / marker).unlink(missing_ok=True)
                launcher = launcher_for(launch)
                launcher.submit(run)
                break
            time.sleep(launcher.poll_seconds)
        return launcher


def follow(run: RunFolder, launcher: Launcher, launch: LaunchParams) -> None:
    """Show the log as it grows until the run succeeds; raises `StageError` when its job is gone without success."""
    log = LogReader(run)
    with _ending_with_us(run, launcher, launch):
        while not run.succeeded:
            log.show()
            if launcher.state(run) == "gone":
                time.sleep(min(2.0, launcher.poll_seconds))  # a marker may reach a shared disk late
                if not run.succeeded and launcher.state(run) == "gone":  # nobody else does it again meanwhile
                    log.show()
                    raise failure(run)
            time.sleep(launcher.poll_seconds)
    log.show()


def failure(run: RunFolder) -> StageError:
    """Why a job without success ended, as far as its folder tells, and how to go on."""
    if (run.path / "CANCELLED").exists():
        return StageError(f"{run.stage} was cancelled; the same command goes on from the last checkpoint")
    status = run.exit_status
    ended = "ended" if status is None else f"ended with exit status {status}"
    return StageError(f"{run.stage} {ended} without success; log: {run.log}; the same command tries again", status)


class LogReader:
    """Prints whole new lines of a run's log, beginning with the last job's (or with the last `tail` bytes)."""

    def __init__(self, run: RunFolder, *, tail: int | None = None) -> None:
        self._path = run.log
        self._at = (run.last_job or {}).get("log_start", 0) if tail is None else max(0, run.log_size - tail)

    def show(self) -> None:
        """Print what came since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as stream:
            stream.seek(self._at)
            text = stream.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._at += len(whole)
        sys.stdout.write(whole.decode("utf-8", errors="replace"))
        sys.stdout.flush()


@contextmanager
def _ending_with_us(run: RunFolder, launcher: Launcher, launch: LaunchParams) -> Iterator[None]:
    """Ctrl-C asks whether the job ends too; SIGTERM (a cancelled flow) ends it."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        if _asked_to_end(run):
            launcher.cancel(run, grace(run, launch))
        raise
    except TerminatedError:
        launcher.cancel(run, grace(run, launch))
        sys.exit(143)
    finally:
        signal.signal(signal.SIGTERM, before)


def grace(run: RunFolder, launch: LaunchParams) -> float:
    """Seconds that a cancelled job may take: only training saves what it has."""
    return launch.grace_seconds if (run.path / "checkpoints").exists() else 0.0


def _asked_to_end(run: RunFolder) -> bool:
    if not sys.stdin.isatty() or os.environ.get("LLADAFLOW_YES"):
        return True
    try:
        answer = input(f"\nend the job of {run.key} as well? [Y/n] ")
    except (KeyboardInterrupt, EOFError):
        return True
    if answer.strip().lower() in ("n", "no"):
        print(f"it goes on; `llada logs -f {run.key}` follows it, the same command attaches to it")
        return False
    return True


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


def _share(run: RunFolder, number: int, count: int) -> RunFolder:
    share = RunFolder(run.path / SHARES / f"{run.key}-{number}of{count}")
    share.path.mkdir(parents=True, exist_ok=True)
    if not share.tree.is_symlink():
        share.tree.symlink_to("../../tree")
    write_json(share.path / "request.json", run.request)
    return share
