"""An alias of a real registry moves while its model is asked: no answer fails, and the next ones are the new version's."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import httpx
import pytest
from fastapi.testclient import TestClient

from app.models import ModelCache, ModelIndex
from app.server.http import create_app
from app.server.service import Service
from tasks.launch.trial import try_out
from tasks.project import Project
from tasks.work.register import roll_back
from tests.app.test_serve_command import answers, metric
from tests.ports import free_port
from tests.tasks.test_registry import empty_database, root, trained  # noqa: F401 - fixtures
from tests.waiting import PATIENCE, wait_for

ASKED = {"model": "default", "messages": [{"role": "user", "content": "one"}], "max_tokens": 8}


def test_a_moved_alias_is_followed_while_answers_are_written(root: Path) -> None:  # noqa: F811 - the fixture
    trained(root, "one", main=50, side=50)
    trained(root, "two", main=90, side=50)
    service = Service(ModelCache(ModelIndex(Project.at(root))), ["models:/toy@champion"])

    def label() -> str:
        return (service.model("default").folder / "label").read_text()

    assert label() == "two"
    with TestClient(create_app(service, follow_seconds=0.1)) as client, ThreadPoolExecutor(4) as crowd:
        first = [crowd.submit(client.post, "/v1/chat/completions", json=ASKED) for _ in range(12)]
        roll_back(Project.at(root), "toy", "by hand", try_out)
        later = []
        wait_for(
            "the other version",
            lambda: later.append(client.post("/v1/chat/completions", json=ASKED)) or label() == "one",
        )
        later.append(client.post("/v1/chat/completions", json=ASKED))
        assert {answer.status_code for answer in [*later, *(each.result() for each in first)]} == {200}
    assert service.metrics.swaps.collect()[0].samples[0].value == 1


@pytest.mark.slow
def test_a_served_alias_moves_by_a_command_while_clients_ask_and_stream(root: Path) -> None:  # noqa: F811 - the fixture
    trained(root, "one", main=50, side=50)
    trained(root, "two", main=90, side=50)
    url = f"http://127.0.0.1:{(port := free_port())}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    (root / "dvc.yaml").touch()
    llada = [sys.executable, "-m", "cli.main"]
    serve = [*llada, "serve", "-m", "models:/toy@champion", "--port", str(port), "--follow", "0.1"]

    def swapped() -> bool:
        return metric(url, "lladaflow_model_swaps_total") == 1

    def asked(*, stream: bool) -> str:
        answer = httpx.post(f"{url}/v1/chat/completions", json={**ASKED, "stream": stream}, timeout=PATIENCE)
        return "error" if answer.is_error or '"error"' in answer.text else answer.text[-14:].strip()

    with subprocess.Popen(serve, cwd=root, env=env) as server, ThreadPoolExecutor(1) as crowd:
        over = Event()

        def until_over() -> list[str]:
            found = [asked(stream=True)]
            while not over.is_set():
                found.append(asked(stream=len(found) % 2 == 0))
            return found

        try:
            wait_for("the server", lambda: server.poll() is not None or answers(url))
            ends = crowd.submit(until_over)
            subprocess.run([*llada, "rollback", "toy"], cwd=root, env=env, check=True)
            wait_for("the other version", lambda: server.poll() is not None or swapped())
            over.set()
            assert "error" not in ends.result()
            assert set(ends.result()[::2]) == {"data: [DONE]"}
            assert swapped()
        finally:
            over.set()
            server.terminate()
