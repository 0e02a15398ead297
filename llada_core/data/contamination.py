"""Whether a question that is measured was trained on: questions by value, however they are worded around.

A training prompt is instructions with a question inside, a benchmark's prompt is examples with a question inside; what
the two have in common is the question as its authors published it.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llada_core.data.puzzles import countdown_key

QUESTIONS = "questions.npy"  # the file with the values of training questions, beside what was made of them


def value_of(text: str) -> int:
    """A number from 0 to 2^64 for a text, letter case and white space aside."""
    data = " ".join(text.casefold().split()).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def question_in(row: Mapping[str, Any], prompt: str | None) -> str | None:
    """The question of a published row: its longest text that stands in the prompt made of it, else its longest text.

    None for a row without any text.
    """
    texts = [value for value in row.values() if isinstance(value, str) and value.strip()]
    asked = [text for text in texts if prompt is not None and text.strip() in prompt]
    return max(asked or texts, key=len, default=None)


def values_in(raw: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[int]:
    """The values of what a training row asks: each of its prompts whole, and the question inside the last one.

    raw: the row as published. row: what the map function made of it, with `messages` or `prompt` (of ids alone, those
    that the published row has); of a generated kind of puzzle (`task`) the value of the puzzle as well, which is the
    same in all wordings.
    """
    told = row if "messages" in row or "prompt" in row else raw
    messages = told["messages"] if "messages" in told else told.get("prompt", ())
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    prompts = [message["content"] for message in messages if message["role"] == "user"]
    yield from map(value_of, prompts)
    if prompts and (question := question_in(raw, prompts[-1])) is not None and question.strip() in prompts[-1]:
        yield value_of(question)
    answer = row.get("answer", {})
    if row.get("task") == "sudoku" and "puzzle" in answer:
        yield value_of(f"sudoku:{answer['puzzle']}")
    elif row.get("task") == "countdown" and "numbers" in answer:
        yield value_of(f"countdown:{countdown_key(answer['numbers'], answer['target'])}")


def trained_on(row: Mapping[str, Any], values: Collection[int]) -> bool:
    """Whether a row with a prompt, its task and its reference answer asks one of these values."""
    return any(value in values for value in values_in(row, row))


def joined(values: Iterable[np.ndarray]) -> np.ndarray:
    """Distinct values in order, as uint64, of several arrays of them."""
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *values]))


def saved_values(folder: Path) -> frozenset[int]:
    """The values in a folder's file of them; none where it has none."""
    path = folder / QUESTIONS
    return frozenset(np.load(path).tolist()) if path.is_file() else frozenset()
