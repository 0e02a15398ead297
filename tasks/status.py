"""Every run as one line: where it is, how far, what it takes on disk. Reads run folders; asks Slurm for its jobs."""

import time

from tasks.folders import size_of
from tasks.launch.jobs import launcher_of
from tasks.launch.launchers import NoAnswerError
from tasks.project import LaunchParams
from tasks.record.runs import RunFolder

COLUMNS = ("run", "state", "job", "step", "loss", "left", "GB")


def line_of(run: RunFolder) -> tuple[str, ...]:
    """One run as it is now: a text for each of COLUMNS; of one whose files are damaged, which and what to do."""
    try:
        return _line(run)
    except (ValueError, KeyError, TypeError, OSError) as error:
        told = " ".join(str(error).split()) if isinstance(error, ValueError | OSError) else f"{run.path} is damaged"
        return (run.key, told, *[""] * (len(COLUMNS) - 2))


def _line(run: RunFolder) -> tuple[str, ...]:
    state = state_of(run)
    last = run.last_metrics()
    size = size_of([run.path / "checkpoints", run.log]) / 2**30
    loss = last.get("loss")
    share = last.get("share")
    step = f"{last['step']}" + (f" ({share:.0%})" if share else "") if "step" in last else ""
    shown = f"{loss:.4g}" if loss else ""
    return run.key, state, run.job_name, step, shown, _left(run, last, state), f"{size:.2f}"


def state_of(run: RunFolder) -> str:
    """done, running, stopped (by request), failed, or unknown while Slurm does not answer."""
    if run.succeeded:
        return "done"
    try:
        state = launcher_of(run, LaunchParams(kind="local")).state(run)
    except (NoAnswerError, ValueError):
        return "unknown"
    if state != "gone":
        return "running" if state == "alive" else "unknown"
    stopped = (run.path / "CANCELLED").exists() or run.exit_status in (75, 143)
    return "stopped" if stopped or run.exit_status is None else f"failed ({run.exit_status})"


def _left(run: RunFolder, last: dict[str, float], state: str) -> str:
    share, rate = last.get("share"), last.get("steps_per_second")
    if state != "running" or not share or not rate:
        return ""
    seconds = last["step"] / share * (1 - share) / rate - (time.time() - last["time"])
    return f"{max(0, seconds) / 60:.0f} min"
