"""Many chats at once: `python -m tests.app.load [--chats 16] [--seconds 300] [--model NAME]` prints what they met.

Starts the page as a person would, lets every chat ask again as soon as it is answered, and watches the page's memory.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from gradio_client import Client

from tests.ports import free_port

QUESTIONS = ("Solve the sudoku 1030340020030001", "Make 13 from 8, 3, 8", "hello")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--chats", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--model", default="")
    asked = parser.parse_args()
    port = free_port()
    named = ["--model", asked.model] if asked.model else []
    server = subprocess.Popen([sys.executable, "-m", "app", "--port", str(port), *named])
    try:
        clients = [ready(f"http://127.0.0.1:{port}/") for _ in range(asked.chats)]
        answered = report(*run(clients, asked.seconds, server.pid))
    finally:
        server.terminate()
        server.wait()
    sys.exit(0 if answered else 1)


def ready(url: str) -> Client:
    """A client, once the page is up."""
    for _ in range(300):
        try:
            return Client(url, verbose=False, httpx_kwargs={"timeout": 120})
        except Exception:  # noqa: BLE001 - whatever it is, the page is not up yet
            time.sleep(1)
    raise SystemExit("the page did not come up")


def run(clients: list[Client], seconds: float, pid: int) -> tuple[list[list[float]], list[str], list[float]]:
    """Seconds of every answer per chat, failures, and the page's memory in MB once a second."""
    end = time.monotonic() + seconds
    waits: list[list[float]] = [[] for _ in clients]
    failures: list[str] = []
    memory: list[float] = []

    def talk(number: int) -> None:
        while time.monotonic() < end:
            begun = time.monotonic()
            try:
                said = clients[number].predict(QUESTIONS[len(waits[number]) % 3], "recommended", 0, api_name="/chat")
                if "error" in said:
                    failures.append(said["error"])
            except Exception as error:  # noqa: BLE001 - every failure counts
                failures.append(repr(error))
            waits[number].append(time.monotonic() - begun)

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(len(clients))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        status = Path(f"/proc/{pid}/status").read_text()
        memory.append(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024)
        time.sleep(1)
    return waits, failures, memory


def report(waits: list[list[float]], failures: list[str], memory: list[float]) -> bool:
    """One line per figure; whether every chat was answered each time."""
    answers = sorted(wait for chat in waits for wait in chat)
    each = [len(chat) for chat in waits]
    tenth = max(1, len(memory) // 10)
    print(f"answers {len(answers)}, failures {len(failures)} {failures[:3]}")
    print(f"seconds per answer: median {statistics.median(answers):.2f}, 95 % {answers[int(0.95 * len(answers))]:.2f}")
    print(f"answers per chat: least {min(each)}, most {max(each)}")
    print("memory of the page in MB, ten times:", *(f"{mb:.0f}" for mb in memory[tenth - 1 :: tenth]))
    return not failures and min(each) > 0


if __name__ == "__main__":
    main()
