"""Every command that README and the pages show is taken by the real command line of its program.

tests/test_pipeline.py runs, in a scratch project, the blocks of docs/commands.md, README's library example and what takes
seconds of README and docs/cluster.md. What needs a cluster, the Hub, 8 billion parameters or minutes is parsed here alone.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer._click.exceptions import MissingParameter

from cli.main import llada
from llada_core.evaluation import recipes
from llada_core.settings import read_yaml, with_overrides
from tasks.project import Params

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]
PROFILES = {path.stem for path in (ROOT / "profiles").glob("*.yaml")}
PUZZLES = {"sudoku", "sudoku_new_grids", "sudoku_published", "countdown", "seats"}
PROGRAMS = ("llada", "python", "accelerate", "torchrun", "dvc", "prefect", "mlflow", "hf", "lm_eval")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*$|my-|.*\.yaml$")  # FOLDER, PROFILE, T; a file of one's own


def commands(page: Path) -> Iterator[tuple[str, bool]]:
    """Each command of a page without its comment; whether it is a line of a block, which has to be whole."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for line, whole in [
        *((line, True) for block in fenced for line in block.splitlines()),
        *((i, False) for i in inline),
    ]:
        for part in re.split(r" && |;\s", re.sub(r"\s#\s.*$", "", line.strip().removeprefix("$ "))):
            command = re.sub(r"^(?:[A-Z_]+=\S+ )+|\s*&$", "", part.strip())
            if (
                command.split(" ")[0] in PROGRAMS
                and "..." not in command
                and not re.search("examples/|eval_llada.py", command)
            ):
                yield command, whole


FOUND = [(page.name, command, whole) for page in PAGES for command, whole in commands(page)]


def check_group(group: Any, words: list[str], whole: bool) -> Any:
    """Parse by a click command, through its groups; returns the context of the last one."""
    while hasattr(group, "commands"):
        words = [word for word in words if word != "--help"] if words[:1] != ["--help"] else []
        if not words:
            return None
        assert words[0] in group.commands, f"there is no {words[0]!r} among {sorted(group.commands)}"
        group, words = group.commands[words[0]], words[1:]
    try:
        return group.make_context(group.name, ["1" if re.fullmatch("[A-Z]", word) else word for word in words])
    except MissingParameter:
        assert not whole, "something is missing"
        return None


def llada_takes(words: list[str], whole: bool) -> None:
    context = check_group(typer.main.get_command(llada), words, whole)
    given = context.params if context is not None else {}
    if words[:1] == ["eval"]:
        named = {name for name in given.get("benchmarks") or [] if not PLACEHOLDER.match(name) and "/" not in name}
        other = {name for name in named - PUZZLES if not recipes.exists(name)}
        assert not other, f"no such benchmark: {other}"
    profile, stage = given.get("profile"), given.get("stage")
    if profile is None or PLACEHOLDER.match(profile):
        return
    assert profile in PROFILES, f"there is no profile {profile!r}"
    params = Params.parse(
        with_overrides(read_yaml(ROOT / "profiles" / f"{profile}.yaml"), given.get("overrides") or []), profile
    )
    assert stage is None or stage in params.stages


def python_takes(words: list[str], whole: bool) -> None:
    if words[0] != "-m":
        assert (ROOT / words[0]).exists()
        return
    module = ROOT / words[1].replace(".", "/")
    if words[1].partition(".")[0] in ("tasks", "flows", "app", "cli", "benchmarks", "tests"):
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), "no such module"
    if words[1].startswith("tasks.") and words[1] != "tasks.lm_eval":
        Params.parse(with_overrides(read_yaml(ROOT / "params.yaml"), [w for w in words[2:] if "=" in w]), "params.yaml")


def accelerate_takes(words: list[str], whole: bool) -> None:
    from accelerate.commands.launch import launch_command_parser

    if words[0] == "launch":
        asked = launch_command_parser().parse_args(words[1:])
        python_takes(["-m", asked.training_script, *asked.training_script_args], whole)


def torchrun_takes(words: list[str], whole: bool) -> None:
    from torch.distributed.run import get_args_parser

    asked = get_args_parser().parse_args(words)
    python_takes(["-m", asked.training_script, *asked.training_script_args], whole)


def dvc_takes(words: list[str], whole: bool) -> None:
    from dvc.cli import parse_args

    parse_args(words)


def mlflow_takes(words: list[str], whole: bool) -> None:
    from mlflow.cli import cli

    group: Any = cli
    while hasattr(group, "commands"):
        group, words = group.get_command(group.make_context("mlflow", [], resilient_parsing=True), words[0]), words[1:]
        assert group is not None, "no such command"
    group.make_context(group.name, words)


def hf_takes(words: list[str], whole: bool) -> None:
    assert words[0] == "download"
    named = "".join((ROOT / "profiles" / f"{name}.yaml").read_text() for name in PROFILES)
    assert PLACEHOLDER.match(words[1]) or words[1] in named, "a model that no profile names"


def prefect_takes(words: list[str], whole: bool) -> None:
    from prefect.cli._app import _app

    rest = [word for word in words if word != "--no-prompt"]
    if whole or len(rest) > 2:
        _app.parse_args(rest, exit_on_error=False, print_error=False)


TAKES: dict[str, Callable[[list[str], bool], None]] = {
    "llada": llada_takes,
    "python": python_takes,
    "accelerate": accelerate_takes,
    "torchrun": torchrun_takes,
    "dvc": dvc_takes,
    "mlflow": mlflow_takes,
    "hf": hf_takes,
    "prefect": prefect_takes,
    "lm_eval": lambda words, whole: None,  # run by tests/test_pipeline.py
}


def test_the_pages_show_commands() -> None:
    assert len(FOUND) > 100


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_documented_command_is_taken(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for page, command, whole in dict.fromkeys(found for found in FOUND if found[1].split(" ")[0] == program):
        try:
            TAKES[program](shlex.split(command)[1:], whole)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever a parser raises)
            wrong.append(f"{page}: {command}: {str(error) or type(error).__name__} {capsys.readouterr().err[-200:]}")
    assert not wrong, "\n".join(wrong)
