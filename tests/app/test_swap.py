"""An alias of a real registry moves while its model is asked: no answer fails, and the next ones are the new version's."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi.testclient import TestClient

from app.models import ModelCache, ModelIndex
from app.server.http import create_app
from app.server.service import Service
from tasks.launch.trial import try_out
from tasks.project import Project
from tasks.work.register import roll_back
from tests.tasks.test_registry import empty_database, root, trained  # noqa: F401 - fixtures
from tests.waiting import wait_for

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
