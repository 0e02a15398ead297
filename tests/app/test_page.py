"""The served page, by its interface for programs and by plain HTTP."""

import json
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import gradio as gr
import pytest
from gradio.state_holder import StateHolder
from gradio_client import Client

from app.conversation import Conversation
from tests.ports import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def client(page_url):
    return Client(page_url, verbose=False)


def test_a_question_is_answered_step_by_step(client):
    job = client.submit("12 + 3", "exact", 8, api_name="/chat")
    last = job.result()
    assert set(last) == {"answer", "note", "steps", "forwards", "seconds"}
    assert last["steps"] == last["forwards"] == 8
    assert [part["written"] for part in job.outputs()[:-1]] == list(range(1, 9))


def test_exact_answers_are_the_same_twice(client):
    first, second = (client.predict("12 + 3", "exact", 8, api_name="/chat")["answer"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("message", "preset", "length", "says"),
    [
        ("", "exact", 8, "empty"),
        ("x" * 100_000, "exact", 8, "100,000 characters"),
        ("hello", "magic", 8, "no preset"),
        ("hello", "exact", 5000, "at most"),
        ("1 " * 5000, "exact", 8, "reads 700 at most"),
    ],
)
def test_bad_input_is_a_sentence_and_the_page_lives_on(client, message, preset, length, says):
    assert says in client.predict(message, preset, length, api_name="/chat")["error"]
    assert "answer" in client.predict("hello", "exact", 2, api_name="/chat")


def test_only_the_chat_is_open_to_programs(client):
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/chat"]


def test_sixteen_at_once_are_all_answered(page_url):
    answers, failures = [], []
    clients = [Client(page_url, verbose=False, httpx_kwargs={"timeout": 120}) for _ in range(16)]

    def ask(number):
        try:
            answers.append(clients[number].predict(f"{number} + 1", "exact", 8, api_name="/chat"))
        except Exception as error:  # noqa: BLE001 - whatever fails, fails the test
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [a["steps"] for a in answers] == [8] * 16


def test_of_the_sessions_the_last_used_are_kept_and_others_begin_anew(served_page):
    """Gradio keeps a copy of the page for each, 10,000 unless told otherwise."""
    assert served_page.state_holder.capacity == 256
    holder = StateHolder()
    holder.blocks, holder.capacity = served_page, 2
    (session, *_) = [part for part in served_page.blocks.values() if isinstance(part, gr.State)]
    chat = Conversation()
    holder["first"][session._id] = chat
    assert holder["second"][session._id] is None
    assert holder["first"][session._id] is chat, "the last used"
    holder["third"]
    assert "second" not in holder
    assert holder["first"][session._id] is chat
    holder["third"], holder["fourth"]
    assert holder["first"][session._id] is None, "which a question begins a conversation in"


@pytest.mark.parametrize(
    "path", ["/etc/hostname", str(ROOT / "pyproject.toml"), "pyproject.toml", "../../etc/hostname"]
)
def test_no_file_outside_the_page_is_served(page_url, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{page_url}gradio_api/file={path}")
    assert refused.value.code in (403, 404)


def test_the_page_names_no_other_host(page_url):
    config = json.loads(urllib.request.urlopen(f"{page_url}config").read())
    assert config["analytics_enabled"] is False
    assert not config.get("share_url")
    styles = " ".join(config.get("stylesheets") or [])
    assert "//" not in styles


def test_a_login_is_asked_for_when_one_is_set():
    from app import page
    from app.__main__ import options

    blocks = page.absent("models:/puzzles@champion", "nothing there")
    blocks.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, auth=("ada", "secret"), **options())
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{blocks.local_url}config")
    blocks.close()
    assert refused.value.code == 401


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=cwd, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip


def test_a_taken_port_is_one_line(tmp_path, model_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("--model", str(model_folder), "--port", str(port), cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: port {port} on 127.0.0.1 is taken (Address already in use); choose another: --port {port + 1}\n"
    )


def test_no_model_named_anywhere_is_one_line(tmp_path):
    done = run("--port", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "--model" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_a_registered_model_the_page_says_what_to_run():
    from app import page

    blocks = page.absent("models:/puzzles@champion", "no model 'puzzles' is registered")
    said = json.dumps(blocks.get_config_file())
    assert "make run" in said
    assert "models:/puzzles@champion" in said


def test_a_reply_that_nobody_waits_for_leaves_the_conversation_on_the_page():
    import gradio as gr

    from app.chat import ChatView

    view = ChatView(*[None] * 8)
    assert list(view.reply({None: None})) == [(gr.skip(),) * 4]


def test_an_unexpected_error_is_a_sentence_with_a_number_and_the_log_has_the_rest(caplog):
    from app.models import errors_as_text, sentence

    def broken():
        yield "fine"
        raise RuntimeError("secret detail")

    shown = list(errors_as_text(broken, lambda text: text))
    assert shown[0] == "fine"
    assert "secret" not in shown[1]
    number = caplog.records[0].args[0]
    assert number in shown[1]
    assert "secret detail" in caplog.text
    assert "memory" in sentence(MemoryError())
