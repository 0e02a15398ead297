"""What the YAML files call for tasks answered in words: lettered endings, poem lines.

Knows lm-eval's documents; does not know models.
"""

import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset


def lettered_endings(documents: Dataset) -> Dataset:
    """HellaSwag's questions with `context` and the endings as `A` to `D`, cleaned as lm-eval's likelihood task does.

    The activity's label is left out, as in OpenCompass, whose prompt this is.
    """

    def add(document: Mapping[str, Any]) -> dict[str, str]:
        context = _clean(document["ctx_a"] + " " + document["ctx_b"].capitalize())
        endings = dict(zip("ABCD", map(_clean, document["endings"]), strict=True))
        return {"context": context, **endings}

    return documents.map(add)


def next_line(documents: Dataset) -> Dataset:
    """Couplets whose second line is asked for."""
    return documents.map(lambda document: {"target": document["second"]})


def previous_line(documents: Dataset) -> Dataset:
    """Couplets whose first line is asked for."""
    return documents.map(lambda document: {"target": document["first"]})


def contains_target(document: Mapping[str, Any], replies: list[str]) -> dict[str, float]:
    """Right if the reference line stands anywhere in the reply (LLaDA's reversal test)."""
    return {"contains": float(document["target"] in replies[0])}


def _clean(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
