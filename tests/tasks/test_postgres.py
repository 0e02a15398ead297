"""Prefect and MLflow on Debian's PostgreSQL, by one setting each; skipped with a clear line where it is not installed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.project import Project
from tasks.record.registry import client, resolve
from tasks.record.tracking import EXPERIMENT
from tests.ports import free_port
from tests.tasks.test_registry import empty_database, root, trained  # noqa: F401  (fixtures)

pytestmark = pytest.mark.faults
PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("none"))


class Server:
    """A throw-away server on loopback; PostgreSQL refuses to run as root, so Debian's own user runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        shutil.chown(folder, "postgres") if os.getuid() == 0 else None
        self.run("initdb", "-D", f"{folder}/data", "-U", "lladaflow", "-A", "trust", "--no-sync")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c fsync=off -k {folder}"
        self.run("pg_ctl", "-D", f"{folder}/data", "-o", options, "-l", f"{folder}/log", "-w", "-t", "600", "start")
        for name in ("mlflow", "prefect"):
            self.run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "lladaflow", name)

    def run(self, name: str, *arguments: str) -> str:
        user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
        command = [str(PROGRAMS / name), *arguments]
        return subprocess.run(command, check=True, cwd="/", stdout=subprocess.PIPE, text=True, **user).stdout

    def ask(self, database: str, query: str) -> str:
        place = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "lladaflow", "-d", database]
        return self.run("psql", *place, "-Atc", query).strip()

    def stop(self) -> None:
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-m", "immediate", "stop")

    def address(self, driver: str, database: str) -> str:
        return f"{driver}://lladaflow@127.0.0.1:{self.port}/{database}"


@pytest.fixture
def postgres() -> Iterator[Server]:
    if not (PROGRAMS / "initdb").exists():
        pytest.skip("no PostgreSQL under /usr/lib/postgresql; apt-get install postgresql")
    folder = Path(subprocess.run(["mktemp", "-d"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
    server = Server(folder)
    try:
        yield server
    finally:
        server.stop() if (folder / "data/postmaster.pid").exists() else None
        shutil.rmtree(folder)


def test_one_setting_each(postgres: Server, root: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres.address("postgresql", "mlflow"))
    url = postgres.address("postgresql+asyncpg", "prefect")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", url)
    monkeypatch.delenv("LLADAFLOW_TRACKING")
    flow = [sys.executable, "-c", "from flows.pipeline import pipeline; pipeline(upto='sft')"]
    done = subprocess.run(flow, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert postgres.ask("prefect", "select count(*) from flow_run where state_type = 'COMPLETED'") == "1"
    talk = client(Project.at(project))
    names = {run.info.run_name for run in talk.search_runs([talk.get_experiment_by_name(EXPERIMENT).experiment_id])}
    assert names == {"toy", "pretrain (toy)", "sft (toy)"}
    trained(root, "one", main=50, side=50)
    assert (resolve("models:/toy@champion", Project.at(root)) / "label").read_text() == "one"
    assert postgres.ask("mlflow", "select count(*) from model_versions") == "1"
    postgres.stop()
    for command, keeper in (
        ([sys.executable, "-m", "flows.pipeline"], "Prefect"),
        ([sys.executable, "-m", "cli.main", "lineage", "toy@champion"], "MLflow"),
    ):
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert f"error: {keeper} keeps its records in" in done.stderr.splitlines()[-1]
        assert "Connection refused; start it, or point" in done.stderr
        assert "Traceback" not in done.stderr
