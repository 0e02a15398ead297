"""lm-eval's own command line with our model registered and our task definitions beside lm-eval's.

Several processes (accelerate, torchrun) share the requests through files, with no collective. Knows lm-eval's flags.
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lm_eval.__main__ import cli_evaluate

from llada_core.evaluation.harness import LladaLM
from llada_core.evaluation.taskset import OURS, compiled_once

NAMES = {"llada": LladaLM}  # importing the class is what registers it
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
    """The arguments with a folder in which all processes meet, named by model and arguments."""
    flag = next((f for f in ("--model_args", "-a") if f in arguments), None)
    if flag is None or any("answers=" in text for text in arguments):
        return arguments
    place = arguments.index(flag) + 1
    name = hashlib.sha256("\0".join([*arguments, *_files(arguments[place])]).encode()).hexdigest()[:16]
    return [*arguments[:place], f"{arguments[place]},answers={CACHE / name}", *arguments[place + 1 :]]


def _files(model_args: str) -> list[str]:
    """Names, sizes and times of a model folder's files: another model in the same place must not find old answers."""
    values = dict(part.partition("=")[::2] for part in model_args.split(","))
    folder = Path(values.get("pretrained", ""))
    if not values.get("pretrained") or not folder.is_dir():
        return []
    return [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in sorted(folder.iterdir()) if f.is_file()]
