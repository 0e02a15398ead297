"""What a newcomer sees first: help, headings, one-line errors; and that asking costs nothing."""

import gc
import subprocess
import sys
import weakref
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from cli.main import llada
from llada_core.settings import while_imported

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(llada).commands


def test_every_command_and_every_option_is_explained():
    for name, command in COMMANDS.items():
        assert command.help, name
        for option in command.params:
            if option.name not in ("help", "args"):
                assert option.help, f"llada {name}: {option.name} has no help"


def test_the_help_names_every_command_under_a_heading(call):
    shown = call("--help").stdout
    for name in ("sample", "chat", "eval", "lm-eval", "export", "diff", "run", "status", "doctor", "ui"):
        assert name in COMMANDS
        assert f" {name} " in shown
    assert all(heading in shown for heading in ("Talk", "Measure", "Run", "Models"))


def test_the_version_is_told(call):
    asked = call("--version")
    assert (asked.exit_code, asked.stdout) == (0, f"lladaflow {version('lladaflow')}\n")


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'mlflow', 'prefect', 'gradio', 'numpy', 'datasets', 'lm_eval'}"
    code = f"import sys, cli.main; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_cycle_collector_waits_for_imports_and_leaves_out_what_they_made():
    gc.unfreeze()
    try:
        with while_imported():
            assert not gc.isenabled()
            with while_imported():
                pass
            assert not gc.isenabled(), "the outer one still imports"
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
        let_go = type("LetGo", (), {})()
        let_go.itself, seen = let_go, weakref.ref(let_go)
        del let_go
        with while_imported():
            pass
        gc.collect()
        assert seen() is None, "what was let go of before a second time is not kept for good"
    finally:
        gc.unfreeze()


EARLY = """
import os, sys
from typer.testing import CliRunner
from cli.main import llada
from llada_core.settings import while_imported

HEAVY = {"torch", "transformers", "mlflow", "prefect", "gradio", "datasets", "lm_eval", "dvc", "sqlalchemy"}
os.chdir(sys.argv[1])
for line in sys.stdin.read().splitlines():
    arguments, status, words = line.split("|")
    result = CliRunner().invoke(llada, arguments.split())
    assert result.exit_code == int(status), (arguments, result.output)
    assert words in result.output, (arguments, result.output)
    assert not HEAVY & sys.modules.keys(), (arguments, HEAVY & sys.modules.keys())
"""


def test_help_and_misspelt_names_need_nothing_heavy(tmp_path):
    helps = [f"{name} --help|0|Usage" for name, c in COMMANDS.items() if c.params and name not in ("app", "lm-eval")]
    commands = ("sample hi", "chat", "export out", "eval sudoku")
    missing = [f"{command} -m {name}|2|{name}" for command in commands for name in ("nowhere", "./nowhere", "empty")]
    profiles = [f"{command}|2|no profile 'nowhere'" for command in ("run nowhere", "plan nowhere", "fetch nowhere x")]
    others = ["diff a b|2|no folder of results", "logs x|2|no run 'x'", "cancel x|2|no run 'x'", "status|0|loss"]
    wrong = [f"sample hi -m model {option}|2|" for option in ("--preset magic", "-S treshold=1", "--steps 0")]
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    lines = ["--help|0|Talk", *helps, *missing, *profiles, *others, *wrong]
    command = [sys.executable, "-c", EARLY, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sample", "hi"), "say which model with --model"),
        (("sample", "hi", "-m", "nowhere"), "there is no model 'nowhere'"),
        (("chat", "-m", "nowhere"), "there is no model 'nowhere'"),
        (("export", "out", "-m", "nowhere"), "there is no model 'nowhere'"),
        (("eval", "-m", "nowhere"), "say what to measure"),
        (("eval", "--table", "insruct", "-m", "x"), "did you mean 'instruct'"),
        (("diff", "a", "b"), "no folder of results"),
        (("run",), "is no project, there is no dvc.yaml"),
        (("status",), "`llada init FOLDER` makes one"),
        (("plan", "smoke"), "has no profiles/: give a file"),
        (("init", ".."), "is not empty; give the name of a new folder"),
        (("eval", "gsm8k", "--data", "nowhere", "-m", "x"), "--data nowhere: no such folder"),
        (("eval", "gsm8k", "-m", "."), "no config.json there"),
        (("lineage", "models:/a b@champion"), "write models:/NAME@alias or models:/NAME/3"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(call, arguments, says):
    result = call(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
