"""The whole pipeline on the `smoke` profile, as a user runs it: data to a registered model that answers on the page."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.waiting import PATIENCE, wait_for

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.pipeline


BLOCKS = re.findall(r"^```\n(.*?)^```", (ROOT / "docs/commands.md").read_text(), flags=re.DOTALL | re.MULTILINE)


def clean_environment() -> dict[str, str]:
    """Ours without the settings of whoever runs the tests."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LLADAFLOW", "MLFLOW_TRACKING"))}
    return environment | {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}


def llada(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", *arguments]
    return subprocess.run(command, cwd=checkout, env=clean_environment(), capture_output=True, text=True)


def clone(folder: Path) -> Path:
    """A git checkout in `folder` with the files of the project as they are now."""
    home = folder / "lladaflow"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, home / name)
    (home / "dvc.lock").unlink(missing_ok=True)
    settings = {"user.name": "t", "user.email": "t@example.org", "commit.gpgsign": "false"}
    configure = [["config", name, value] for name, value in settings.items()]
    dates = dict.fromkeys(
        ("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), "2026-01-01T00:00:00Z"
    )  # equal files, equal commit
    for arguments in (["init", "-q"], *configure, ["add", "-A"], ["commit", "-qm", "clone"]):
        subprocess.run(["git", *arguments], cwd=home, env=os.environ | dates, check=True)
    return home


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with `smoke` as its default run, under the default run's name, run once."""
    home = clone(tmp_path_factory.mktemp("clone"))
    smoke = (ROOT / "profiles" / "smoke.yaml").read_text()
    (home / "params.yaml").write_text(smoke.replace("name: smoke", "name: puzzles"))
    done = llada(home, "run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return home


def test_data_becomes_a_registered_champion_with_a_report(checkout: Path) -> None:
    registered = json.loads((checkout / "reports/registered.json").read_text())
    assert registered["name"] == "puzzles"
    assert registered["champion"] == registered["version"]
    table = json.loads((checkout / "reports/table.json").read_text())
    assert table
    assert "sudoku" in (checkout / "reports/table.md").read_text()
    card = json.loads((checkout / "data/card.json").read_text())
    assert all(count == 0 for counts in card["overlap"].values() for count in counts.values())


def test_a_second_run_repeats_nothing(checkout: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (checkout / "models").rglob("*") if path.is_file()}
    done = llada(checkout, "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Running stage" not in done.stdout + done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_git_shows_only_what_a_user_commits(checkout: Path) -> None:
    status = subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, text=True, check=True)
    changed = {line[3:].split("/")[0] for line in status.stdout.splitlines()}
    assert changed <= {"dvc.lock", "reports", "params.yaml"}


def test_the_champion_answers_in_the_terminal(checkout: Path) -> None:
    done = llada(checkout, "sample", "Solve the sudoku 0103010000000230")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_lineage_leads_both_ways(checkout: Path) -> None:
    told = llada(checkout, "lineage", "models:/puzzles@champion").stdout
    for word in ("git_commit", "dvc_lock", "params", "inputs", "stage_runs", "jobs", "environment"):
        assert re.search(rf"^{word}: \S", told, flags=re.MULTILINE), word
    for data in ("data/sft", "data/grpo"):
        assert llada(checkout, "lineage", data).stdout == "models:/puzzles/1  @candidate @champion\n"
    assert llada(checkout, "lineage", "reports").returncode == 2


@pytest.mark.slow
def test_the_tutorials_laptop_model_answers_its_own_questions(tmp_path: Path) -> None:
    home, mine = clone(tmp_path), tmp_path / "my-data"
    mine.mkdir()
    places = dict(
        zip(("library", "mill", "bakery", "school", "harbour", "museum", "inn", "church"), "ABDEFGHI", strict=True)
    )
    said = {
        f"{asked} the {place}?": f"{told} {10 + 7 * at} {where}."
        for at, (place, where) in enumerate(places.items())
        for asked, told in {
            "When opens": "At minute", "Who keeps": "Keeper number", "Where stands": "In house", "What costs": "Coins:",
            "How old is": "Years:",
        }.items()
    }  # fmt: skip
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in said.items()
    ]
    (mine / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/tutorial.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    (profile,) = (block for block in blocks if "name: my-run\n" in block)
    (mine / "my-run.yaml").write_text(profile.replace("/path/to/my-data", str(mine)))
    done = llada(home, "run", str(mine / "my-run.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    (model,) = home.glob("workspaces/my-run-*/models/sft")
    assert f"llada chat --model {model.relative_to(home)} " in done.stdout
    asked = llada(home, "sample", *said, "--json", "--model", str(model))
    answers = [json.loads(line)["answer"] for line in asked.stdout.splitlines()]
    assert len(answers) == 40
    assert sum(answer == right for answer, right in zip(answers, said.values(), strict=True)) >= 36


def test_a_mistyped_key_is_one_line(checkout: Path) -> None:
    done = llada(checkout, "run", "-S", "sft.learning_rat=1")
    assert done.returncode == 2
    assert "did you mean 'learning_rate'" in done.stderr
    assert "Traceback" not in done.stderr


def test_there_are_enough_commands() -> None:
    assert len([line for block in BLOCKS for line in block.splitlines()]) >= 25


@pytest.mark.parametrize("block", [0, *(pytest.param(n, marks=pytest.mark.faults) for n in range(1, len(BLOCKS)))])
def test_the_tools_own_commands_work(checkout: Path, session: "Session", block: int) -> None:
    for line in BLOCKS[block].splitlines():
        session.run(line, checkout)


def test_readmes_library_example_runs_as_it_is(checkout: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.splitlines()[-1]) < 0


# What README and docs/cluster.md show and takes seconds here, in their order, each with its exit status and a word of
# what it says; all that they show is parsed in tests/test_documented_commands.py.
SHORT = {
    "llada plan llada-sft-alpaca": (0, "GPU"),
    "llada status": (0, "done"),
    "llada eval --model models:/puzzles@champion sudoku": (0, "results are in"),
    "llada export my-model --model models:/puzzles@champion": (0, "is in my-model"),
    "llada plan": (0, "memory"),
    "llada plan --stage sft": (0, "already done"),
    "llada run": (0, "llada chat"),
    "llada logs -f sft": (0, ""),
    "llada cancel sft": (2, "is not running"),
    "llada lineage models:/puzzles@champion": (0, "git_commit"),
    "llada lineage data/sft": (0, "@champion"),
    'llada promote puzzles 1 --why "by hand"': (0, "champion: version 1"),
    "llada rollback puzzles": (2, "error:"),
    "llada restore": (0, "has lost no model"),
    "dvc repro": (0, "up to date"),
}


@pytest.mark.faults
def test_the_short_commands_of_the_pages_run_as_written(checkout: Path, session: "Session") -> None:
    pages = "".join((ROOT / name).read_text() for name in ("README.md", "docs/cluster.md"))
    for command, (status, says) in SHORT.items():
        assert re.search(rf"^{re.escape(command)}(\s|$)", pages, flags=re.MULTILINE), command
        words = {"cwd": checkout, "env": session.env, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
        done = subprocess.run(command.replace("llada ", f"{sys.executable} -m cli.main ", 1), shell=True, **words)
        told = done.stdout + done.stderr
        assert done.returncode == status, f"{command}\n{told[-3000:]}"
        assert says in told, f"{command}\n{told[-3000:]}"


@pytest.fixture
def session(tmp_path: Path) -> "Iterator[Session]":
    made = Session(tmp_path)
    yield made
    made.end()


class Session:
    """A terminal: one command after another, some of them staying up, on ports of their own."""

    def __init__(self, folder: Path) -> None:
        self.up: list[subprocess.Popen[bytes]] = []
        self.log = folder / "up.log"  # of all that stays up
        self.ports: dict[str, str] = {}
        self.env = clean_environment() | {"PREFECT_HOME": str(folder / "prefect"), "HF_HUB_OFFLINE": "1"}

    def run(self, line: str, folder: Path) -> None:
        text = re.sub(r"\b(4200|500[01])\b", lambda match: self.port(match[1]), line)
        if not text.endswith("&"):
            done = subprocess.run(
                text,
                shell=True,
                cwd=folder,
                env=self.env,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}{self.told()}"
            return
        with self.log.open("ab") as log:
            command = f"exec {text.removesuffix('&')}"
            self.up.append(subprocess.Popen(command, shell=True, cwd=folder, env=self.env, stdout=log, stderr=log))
        if port := re.search(r"--port (\d+)", text):
            self.answers(int(port[1]))
        if "prefect server" in line:
            self.env["PREFECT_API_URL"] = f"http://127.0.0.1:{self.ports['4200']}/api"

    def port(self, named: str) -> str:
        """A free port for the one that the page names."""
        if named not in self.ports:
            self.ports[named] = str(free_port())
        return self.ports[named]

    def answers(self, port: int) -> None:
        """Wait for what was started last."""

        def there() -> bool:
            assert self.up[-1].poll() is None, f"it ended{self.told()}"
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_for(f"an answer on port {port}", there)

    def told(self) -> str:
        """The last words of all that stays up."""
        return f"\n--- up: {self.log.read_text()[-5000:]}" if self.log.exists() else ""

    def end(self) -> None:
        for process in reversed(self.up):
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:  # a server in the middle of its start does not hear
                process.kill()
                process.wait()
