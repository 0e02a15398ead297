"""One throw-away cluster for the module that asks for it; skipped with a clear line where Slurm is not installed."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.recovery import HEADER, Recovery
from tests.tasks.conftest import project  # noqa: F401  (a fixture)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="lladaflow-slurm-"))
    folder.chmod(0o755)  # munge wants its socket reachable
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


COSTS = pytest.StashKey[list[Recovery]]()


@pytest.fixture
def cost(request: pytest.FixtureRequest) -> Callable[[str, str], Recovery]:
    """A clock for one fault, kept for the table at the end."""
    known = request.config.stash.setdefault(COSTS, [])

    def clock(fault: str, until: str) -> Recovery:
        found = next((recovery for recovery in known if recovery.fault == fault), None)
        if found is None:
            known.append(found := Recovery(fault, until))
        return found

    return clock


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if measured := [recovery for recovery in config.stash.get(COSTS, []) if recovery.seconds]:
        terminalreporter.section("what each fault cost")
        terminalreporter.write_line("\n".join([HEADER, *(recovery.row() for recovery in measured)]))


@pytest.fixture
def slurm(project: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:  # noqa: F811
    """The toy project with Slurm as its launcher, and an empty cluster."""
    cluster.reset()
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    params = (project / "params.yaml").read_text()
    block = "{kind: slurm, poll_seconds: 0.3, restarts: 1, grace_seconds: 5, slurm: {cpus_per_task: 1, memory: 500M}}"
    (project / "params.yaml").write_text(params[: params.index("launch:")] + f"launch: {block}\n")
    return cluster
