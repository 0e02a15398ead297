"""Is this machine fit for what the project does: one finding for each thing, with its remedy. Changes nothing."""

import fcntl
import importlib.metadata
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llada_core.settings import ConfigError
from tasks.folders import NoDatabaseError, require, shown
from tasks.launch.doctor_nodes import two_nodes
from tasks.launch.slurm import SlurmLauncher
from tasks.project import LaunchParams, Project

MEGABYTES = 64


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    fine: bool
    what: str
    remedy: str = ""


def findings(project: Project) -> Iterator[Finding]:
    """Look at everything in turn."""
    version = sys.version_info[:2]
    yield Finding((3, 11) <= version <= (3, 13), f"Python {version[0]}.{version[1]}", "use Python 3.11 to 3.13")
    yield from _packages()
    yield Finding(shutil.which("git") is not None, "git", "apt-get install git; without it workspaces are copies")
    yield _gpus()
    base = project.home
    with tempfile.TemporaryDirectory(dir=base, prefix=".doctor-") as folder:
        yield from _disk(Path(folder))
    free = shutil.disk_usage(base).free / 2**30
    yield Finding(free > 5, f"{free:.0f} GB free in {base}", "free some: `llada gc`")
    yield _tracking(project)
    yield from _slurm(project, base)


def _packages() -> Iterator[Finding]:
    for name in ("torch", "transformers", "accelerate", "dvc", "mlflow", "prefect", "fastapi"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(False, name, "`make setup`")
            continue
        too_new = name == "fastapi" and tuple(int(part) for part in found.split(".")[:2]) >= (0, 151)
        yield Finding(not too_new, f"{name} {found}", "Prefect's server needs fastapi below 0.151: `make setup`")


def _gpus() -> Finding:
    done = _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    names = done.splitlines() if done else []
    return Finding(True, f"GPUs: {', '.join(names) or 'none, everything runs on the CPU'}; {os.cpu_count()} cores")


def _disk(folder: Path) -> Iterator[Finding]:
    file = folder / "file"
    started = time.monotonic()
    with file.open("wb") as stream:
        for _ in range(MEGABYTES):
            stream.write(os.urandom(1 << 20))
        stream.flush()
        os.fsync(stream.fileno())
    rate = MEGABYTES / (time.monotonic() - started)
    yield Finding(rate > 20, f"writes {rate:.0f} MB/s", "checkpoints will be slow; put the project on a faster disk")
    try:
        os.link(file, folder / "link")
        yield Finding(True, "hard links")
    except OSError:
        yield Finding(False, "hard links", "models are copied instead of linked and take their size several times")
    with file.open() as first, file.open() as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Finding(False, "file locks", "ask for flock on this file system (Lustre: mount with -o flock)")
        except BlockingIOError:
            yield Finding(True, "file locks")
    try:
        with sqlite3.connect(folder / "database") as database:
            database.execute("create table t (x)")
        yield Finding(True, "SQLite on this file system")
    except sqlite3.Error as error:
        yield Finding(False, f"SQLite: {error}", "keep MLflow elsewhere: MLFLOW_TRACKING_URI=postgresql://...")


def _tracking(project: Project) -> Finding:
    uri = project.tracking_uri
    try:
        if not uri.startswith("http"):
            require("MLflow", uri, "MLFLOW_TRACKING_URI")
            return Finding(True, f"MLflow keeps its records in {shown(uri)}")
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5):
            return Finding(True, f"MLflow answers at {shown(uri)}")
    except NoDatabaseError as error:
        return with_remedy(error)
    except OSError as error:
        return Finding(False, f"MLflow at {uri}: {error}", "start it, or unset MLFLOW_TRACKING_URI; metrics are kept")


def with_remedy(error: Exception) -> Finding:
    """What does not answer, or refuses, as a finding."""
    what, _, remedy = str(error).rpartition("; ")
    return Finding(False, what or remedy, remedy if what else "try again")


def _slurm(project: Project, base: Path) -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding(True, "no Slurm here (sbatch is not on the PATH): stages run on this machine")
        return
    partitions = _run("sinfo", "--noheader", "--format=%P %a %D nodes, %c cores, %m MB, %G, limit %l")
    named = f"Slurm partitions: {'; '.join(partitions.splitlines()) or 'no answer'}"
    yield Finding(bool(partitions), named, "ask `scontrol ping`; set SLURM_CONF if this is the login node")
    if not partitions:
        return
    launch = project.params.launch if (project.root / "params.yaml").exists() else LaunchParams()
    yield _may_submit(launch)
    with tempfile.TemporaryDirectory(dir=base, prefix=".doctor-") as folder:
        yield from (Finding(*found) for found in two_nodes(launch, Path(folder)))


def _may_submit(launch: LaunchParams) -> Finding:
    try:
        asked = SlurmLauncher(launch).try_submission()
    except (ConfigError, OSError) as error:
        return with_remedy(error)
    return Finding(True, f"sbatch takes jobs for {asked or 'the default partition and account'}")


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
