"""lm-eval's own command line with our model registered and our task definitions beside lm-eval's.

Several processes (accelerate, torchrun) share the requests through files, with no collective.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lm_eval.__main__ import cli_evaluate

from llada_core.evaluation.harness import LladaLM
from llada_core.evaluation.served import ServedLM
from llada_core.evaluation.taskset import OURS, compiled_once

# Importing the classes is what registers them.
NAMES = {"llada": LladaLM, "llada_dist": LladaLM, "fastdllm_llada": LladaLM, "llada-server": ServedLM}
CACHE = Path(".cache") / "answers"


def lm_eval(arguments: Sequence[str]) -> None:
    """Runs `lm-eval ARGUMENTS`; `--model llada` is ours. Results are written by the first process only."""
    given = list(arguments)
    if "--include_path" not in given and given[:1] not in (["ls"], ["validate"]):
        given += ["--include_path", str(OURS)]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        given = with_answers(given)
        os.environ["LOCAL_RANK"] = os.environ["RANK"]  # lm-eval writes results where this is 0: once, not once a node
    before, sys.argv = sys.argv, ["lm-eval", *given]
    try:
        with compiled_once():
            cli_evaluate()
    finally:
        sys.argv = before


def with_answers(arguments: list[str]) -> list[str]:
    """The arguments with a folder in which all processes meet; below it, each model's answers have their own."""
    flag = next((f for f in ("--model_args", "-a") if f in arguments), None)
    if flag is None or any("answers=" in text for text in arguments):
        return arguments
    place = arguments.index(flag) + 1
    return [*arguments[:place], f"{arguments[place]},answers={CACHE}", *arguments[place + 1 :]]
