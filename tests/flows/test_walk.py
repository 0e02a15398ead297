"""What needs no Prefect server: the limit on a stage's time, and what is said of another server."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flows.pipeline import StageProcesses
from tasks.errors import StageError
from tasks.folders import NoDatabaseError
from tests.tasks.conftest import project  # noqa: F401  (a fixture)
from tests.tasks.test_runs import finish, program, steps, the_run


def test_a_stage_that_takes_too_long_is_ended_and_goes_on_later(project: Path) -> None:  # noqa: F811
    (project / "wait-pretrain-1").touch()
    with pytest.raises(StageError) as ended:
        StageProcesses(project, hours=8 / 3600).run("pretrain", print)
    assert ended.value.status == 143
    (project / "wait-pretrain-1").unlink()
    finish(program("tasks.pretrain"))
    assert steps(the_run(project)) == [1, 2, 3, 4]


@pytest.fixture
def old_server() -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'"3.1.0"')

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


def test_a_server_of_another_version_or_none_is_one_line(old_server: str) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.pipeline import require_prefect

    with (
        temporary_settings({PREFECT_API_URL: old_server}),
        pytest.raises(NoDatabaseError, match=r"is version 3\.1\.0, this"),
    ):
        require_prefect()
    nobody = "http://127.0.0.1:9/api"
    with (
        temporary_settings({PREFECT_API_URL: nobody}),
        pytest.raises(NoDatabaseError, match="or unset PREFECT_API_URL"),
    ):
        require_prefect()
