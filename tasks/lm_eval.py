"""lm-eval as its users know it, for our models: `accelerate launch -m tasks.lm_eval --model llada --tasks ...`.

A registry alias in `pretrained=` becomes its verified folder; everything else is handed over.
"""

import re
import sys
from collections.abc import Sequence

from tasks.errors import one_line_errors
from tasks.record.registry import named, resolve


def run(arguments: Sequence[str]) -> None:
    """Runs lm-eval with these arguments."""
    from llada_core.evaluation.command import lm_eval

    lm_eval([re.sub(r"(?<=pretrained=)[^,]+", _folder, text) for text in arguments])


def _folder(found: re.Match[str]) -> str:
    name = found.group()
    return str(resolve(name)) if named(name) else name


if __name__ == "__main__":
    with one_line_errors():
        run(sys.argv[1:])
