"""The reference solutions of MBPP and HumanEval: right for the reward as for the benchmark (make test-solutions)."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from llada_core.evaluation.definitions.scoring import humaneval_results, mbpp_results
from llada_core.verifiers.answers import verify

pytestmark = pytest.mark.solutions


def rows(data_root, *files):
    """The problems of some files; skips without them."""
    missing = [str(data_root / file) for file in files if not (data_root / file).exists()]
    if missing:
        pytest.skip(f"no {' '.join(missing)}; set LLADAFLOW_DATA_ROOT")
    return [json.loads(line) for file in files for line in (data_root / file).read_text(encoding="utf-8").splitlines()]


def refused(judged, problems):
    """The ids of the problems whose solutions are not judged right."""
    with ThreadPoolExecutor(2) as pool:
        return [p["task_id"] for p, right in zip(problems, pool.map(judged, problems), strict=True) if not right]


def as_reply(program):
    """A program as a model gives it."""
    return f"Here it is:\n```python\n{program}\n```\n"


def mbpp_rewarded(problem):
    tests = "\n".join([problem["test_setup_code"], *problem["test_list"]])
    return verify("code", as_reply(problem["code"]), {"tests": tests})


def mbpp_passed(problem):
    return mbpp_results(problem, [[problem["code"]]])["pass_at_1"] == 1.0


def humaneval_rewarded(problem):
    tests = f"{problem['test']}\ncheck({problem['entry_point']})\n"
    return verify("code", as_reply(problem["prompt"] + problem["canonical_solution"]), {"tests": tests})


def humaneval_passed(problem):
    return humaneval_results(problem, [[problem["prompt"] + problem["canonical_solution"]]])["pass@1"] == 1.0


@pytest.mark.parametrize("judged", [mbpp_rewarded, mbpp_passed])
def test_mbpp(data_root, judged):
    problems = rows(data_root, *(f"mbpp/{split}.jsonl" for split in ("train", "validation", "test", "prompt")))
    assert len(problems) == 974
    assert refused(judged, problems) == []


@pytest.mark.parametrize("judged", [humaneval_rewarded, humaneval_passed])
def test_humaneval(data_root, judged):
    problems = rows(data_root, "humaneval/test.jsonl")
    assert len(problems) == 164
    assert refused(judged, problems) == []
