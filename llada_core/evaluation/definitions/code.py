"""What the YAML files call for tasks whose answers are programs: cutting the program out of a reply, and running it.

Programs run only in `llada_core.sandbox`, and only when the evaluation was started with the opt-in (lm-eval's
`unsafe_code`). Knows lm-eval's documents; does not know models.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset

from llada_core.verifiers.cases import Case, whole
from llada_core.verifiers.judge import passes

Document = Mapping[str, Any]
_FENCE = re.compile(r"```[a-zA-Z0-9_+-]*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)


def after_prompt(replies: list[list[str]], documents: list[Document]) -> list[list[str]]:
    """HumanEval: the reply continues the prompt."""
    return [[d["prompt"] + text for text in each] for each, d in zip(replies, documents, strict=True)]


def between(replies: list[list[str]], documents: list[Document]) -> list[list[str]]:
    """Infilling: the reply stands between prompt and suffix."""
    return [[d["prompt"] + text + d["suffix"] for text in each] for each, d in zip(replies, documents, strict=True)]


def first_block(replies: list[list[str]], documents: list[Document]) -> list[list[str]]:
    """The first fenced block of a reply (open at its end or not), else the whole reply."""
    return [[_fenced(text).lstrip() for text in each] for each in replies]


def marked_code(replies: list[list[str]], documents: list[Document]) -> list[list[str]]:
    """The program between [BEGIN] and [DONE], with or without quotes or a fence around it."""
    return [[_marked(text) for text in each] for each in replies]


def humaneval_results(document: Document, replies: list[list[str]]) -> dict[str, float]:
    """Share of the candidate programs that pass the problem's tests."""
    test = f"{document['test']}\ncheck({document['entry_point']})"
    return {"pass@1": _share(replies[0], whole(test, document["entry_point"]))}


def mbpp_results(document: Document, replies: list[str] | list[list[str]]) -> dict[str, float]:
    """Whether the program passes the three tests that its prompt shows, after what they need (two problems' trees)."""
    candidates = [replies[0]] if isinstance(replies[0], str) else replies[0]
    tests = [document.get("test_setup_code") or "", *document["test_list"][:3]]
    return {"pass_at_1": _share(candidates, whole("\n".join(tests)))}


def mbpp_shots(documents: Dataset) -> list[dict[str, Any]]:
    """Tasks 2, 3 and 4, MBPP's customary examples."""
    return [{**d, "is_fewshot": True} for d in documents if d["task_id"] in (2, 3, 4)]


def single_lines(documents: Dataset) -> Dataset:
    """Infilling problems as published; HumanEval's own files are turned into them, one per line of each solution."""
    if "suffix" in documents.column_names:
        return documents
    return Dataset.from_list([line for document in documents for line in _lines(document)])


def _lines(document: Document) -> Iterator[dict[str, str]]:
    lines = document["canonical_solution"].splitlines(keepends=True)
    for i, line in enumerate(lines):
        if line.strip():
            parts = {
                "prompt": document["prompt"] + "".join(lines[:i]),
                "canonical_solution": line.rstrip("\n"),
                "suffix": "\n" * line.endswith("\n") + "".join(lines[i + 1 :]),
            }
            yield {**parts, "test": document["test"], "entry_point": document["entry_point"]}


def _fenced(text: str) -> str:
    found = _FENCE.search(text)
    return found.group(1) if found else text


def _marked(text: str) -> str:
    text = _fenced(text.split("[BEGIN]", 1)[-1].split("[DONE]", 1)[0]).strip()
    return text.removeprefix("'").removesuffix("'").strip()


def _share(programs: list[str], tests: Case) -> float:
    return sum(passes(program, [tests])[0] for program in programs) / len(programs)
