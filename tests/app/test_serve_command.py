"""`llada serve` as a process: a client that leaves, many at once, a stop with answers under way."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.ports import free_port
from tests.waiting import PATIENCE, wait_for

ASKED = {
    "model": "default",
    "messages": [{"role": "user", "content": "one and two"}],
    "max_tokens": 512,
    "steps": 512,
    "stop_at_eos": False,
}


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen, str]]:
    """One for all of these tests, as a start takes seconds; the last of them stops it."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "cli.main",
        "serve",
        "-m",
        str(model_folder),
        "--port",
        str(port),
        "--at-once",
        "4",
        "--waiting",
        "8",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command,
        cwd=tmp_path_factory.mktemp("serve"),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for("the server", lambda: process.poll() is None and answers(url))
        yield process, url
        process.kill()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


def test_a_client_that_leaves_frees_its_place(server: tuple[subprocess.Popen, str]) -> None:
    _, url = server
    before = metric(url, "lladaflow_forwards_total")
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**ASKED, "stream": True}, timeout=PATIENCE) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert metric(url, "lladaflow_requests_active") == 1
    wait_for("the place", lambda: metric(url, "lladaflow_requests_active") == 0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=ASKED, timeout=httpx.Timeout(PATIENCE, read=0.2))
    wait_for("the place", lambda: metric(url, "lladaflow_requests_active") == 0)
    assert metric(url, "lladaflow_forwards_total") - before < 1024  # neither was written to its end


def test_more_than_fit_are_told_to_come_again(server: tuple[subprocess.Popen, str]) -> None:
    _, url = server
    small = {**ASKED, "max_tokens": 32, "steps": 32}
    with ThreadPoolExecutor(64) as crowd:
        found = list(
            crowd.map(lambda _: httpx.post(f"{url}/v1/chat/completions", json=small, timeout=PATIENCE), range(64))
        )
    statuses = {answer.status_code for answer in found}
    assert statuses == {200, 429}
    told = next(answer for answer in found if answer.status_code == 429)
    assert told.headers["retry-after"] == "1"
    assert told.json()["error"]["type"] == "rate_limit_error"
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in found if answer.status_code == 200}
    assert len(texts) == 1
    assert metric(url, "lladaflow_requests_active") == metric(url, "lladaflow_requests_accepted") == 0


def test_who_says_half_of_it_and_goes_is_forgotten(server: tuple[subprocess.Popen, str]) -> None:
    _, url = server
    host, port = url.removeprefix("http://").split(":")
    for _ in range(20):  # more than may be here at once
        with socket.create_connection((host, int(port))) as line:
            line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\n{")
    wait_for("the places", lambda: metric(url, "lladaflow_requests_accepted") == 0)
    assert httpx.post(
        f"{url}/v1/chat/completions", json={**ASKED, "max_tokens": 32, "steps": 32}, timeout=PATIENCE
    ).is_success


def test_a_folder_that_is_removed_is_served_on(server: tuple[subprocess.Popen, str], model_folder: Path) -> None:
    _, url = server
    small = {**ASKED, "max_tokens": 32, "steps": 32}
    before = httpx.post(f"{url}/v1/chat/completions", json=small, timeout=PATIENCE).json()["choices"]
    away = model_folder.rename(model_folder.with_name("away"))
    try:
        assert httpx.post(f"{url}/v1/chat/completions", json=small, timeout=PATIENCE).json()["choices"] == before
    finally:
        away.rename(model_folder)


def test_a_stop_lets_answers_end(server: tuple[subprocess.Popen, str]) -> None:
    process, url = server
    with httpx.stream(
        "POST",
        f"{url}/v1/chat/completions",
        json={**ASKED, "max_tokens": 192, "steps": 192, "stream": True},
        timeout=PATIENCE,
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] in ("stop", "length")
    assert process.wait(PATIENCE) in (0, -signal.SIGTERM)
    assert "Traceback" not in process.stdout.read()
