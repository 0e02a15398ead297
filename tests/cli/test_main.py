"""What a newcomer sees first: help, headings, one-line errors; and that asking costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from cli.main import llada

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


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'mlflow', 'prefect', 'gradio', 'numpy', 'datasets', 'lm_eval'}"
    code = f"import sys, cli.main; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


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
