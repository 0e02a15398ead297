"""LLaDA2's benchmarks whose files are not here, on a few questions in the published schema: reference answers score 1,
another question's and none score 0, and what is asked reads as it should."""

import json
import logging

import pytest

from llada_core.evaluation import recipes, taskset
from llada_core.evaluation.benchmark import Benchmark, requests_of, run
from llada_core.evaluation.definitions import answers, opencompass
from tests.evaluation.scripted import GoldLM
from tests.tiny import tiny_tokenizer

EMPTY = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}
NONE = {"number": [""], "date": [EMPTY["date"]], "spans": [["Nobody"]]}


def drop(n, **answer):
    asked = {"query_id": str(n), "passage": f"Text {n}.", "question": f"What is {n}?"}
    return {**asked, "answer": {**EMPTY, **answer}, "validated_answers": NONE}


def trivia(n, value):
    answer = {"value": value, "aliases": [value, value.upper()], "normalized_value": value.lower()}
    return {"question": f"Who is {n}", "question_id": str(n), "answer": answer}


def squad(n, *texts):
    asked = {"id": str(n), "title": "T", "context": f"Text {n}.", "question": f"What is {n}?"}
    return {**asked, "answers": {"text": list(texts), "answer_start": [0] * len(texts)}}


def plus(n):
    """HumanEval+ as `tools/humaneval/to_original_fmt.py` of EvalPlus writes it."""
    tests = (
        "\n\nimport numpy as np\n\ndef is_floats(x) -> bool:\n    if isinstance(x, float):\n        return True\n"
        "    if isinstance(x, (list, tuple)) and x:\n        return all(isinstance(i, float) for i in x)\n"
        "    if isinstance(x, np.ndarray):\n        return x.dtype == np.float64 or x.dtype == np.float32\n    return False\n\n"
        "def assertion(out, exp, atol):\n    exact_match = out == exp\n    if atol == 0 and is_floats(exp):\n        atol = 1e-6\n"
        "    if not exact_match and atol != 0:\n        assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n"
        "    else:\n        assert exact_match\n\n"
    )
    inputs, results = [[1.5], [3.0]], [(1.5 + n) * 1.00000001, [3.0 + n][0]]
    check = f"def check(candidate):\n    inputs = {inputs}\n    results = {results}\n    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 0)\n"
    return {
        "task_id": f"HumanEval/{n}",
        "prompt": f'\ndef add{n}(x):\n    """Adds {n}."""\n',
        "canonical_solution": f"    return x + {n}\n",
        "entry_point": f"add{n}",
        "test": tests + check,
    }


def mbpp_plus(n):
    told = plus(n)
    called = told["test"].split("def check")[0]
    body = f"inputs = [[1], [2]]\nresults = [{1 + n}, {2 + n}]\nfor i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(add{n}(*inp), exp, 0)\n"
    first = f"assert add{n}(1) == {1 + n}"
    code = f"def add{n}(x):\n    return x + {n}"
    return {"task_id": n, "code": code, "prompt": f"Write a function that adds {n}.", "source_file": "", "test_imports": [], "test_list": [first], "test": called + body}  # fmt: skip


def crux(n, output):
    return {"id": f"sample_{n}", "code": f"def f(x):\n    return g({n})", "input": f"'a==b{n}'", "output": output}


def olympiad(n, answer, **other):
    kind = {"is_multiple_answer": False, "unit": None, "answer_type": "Numerical", "language": "English"}
    asked = {"id": n, "question": f"What is {n}?", "final_answer": [answer], "subject": "Math"}
    return {**asked, **kind, "error": None, **other}


OLYMPIAD = {
    "OE_TO_maths_en_COMP": [
        olympiad(1, "$2$"),
        olympiad(2, "$-1$,$x^2+1$", is_multiple_answer=True, answer_type="Numerical,Expression"),
        olympiad(3, "$(1,2]$", answer_type="Interval"),
    ],
    "OE_TO_maths_zh_COMP": [olympiad(4, "$\\frac{1}{3}$", language="Chinese", unit="cm")],
    "OE_TO_maths_zh_CEE": [olympiad(5, "$5\\pm 1$", language="Chinese", is_multiple_answer=True)],
    "OE_TO_physics_en_COMP": [olympiad(6, "$9.81$", subject="Physics", unit="m/s^2")],
    "OE_TO_physics_zh_CEE": [olympiad(7, "$y=2x$", subject="Physics", language="Chinese", answer_type="Equation")],
}
SHOTS = [drop(n, spans=[f"Span {n}"]) for n in range(50, 56)]
ROWS = {
    "drop": {"train": SHOTS, "validation": [drop(1, number="2.5"), drop(2, spans=["Jo Hill"]), drop(3, date={"day": "3", "month": "May", "year": ""})]},
    "triviaqa": {"train": [trivia(n, f"P{n}") for n in range(50, 56)], "validation": [trivia(1, "St. Louis"), trivia(2, "Rome"), trivia(3, "Ada, Oklahoma")]},
    "gsm_plus": {"test": [{"question": f"What is {n}?", "solution": f"So\n#### {a}", "answer": a} for n, a in enumerate(["4.33", "None", "1/4", "1,200", "-7", "3"])]},
    "squad2": {"validation": [squad(1, "the red house", "house"), squad(2), squad(3, "1842")]},
    "humaneval_plus": {"test": [plus(n) for n in (1, 2)]},
    "mbpp_plus": {"test": [mbpp_plus(n) for n in (1, 2)]},
    "cruxeval": {"test": [crux(1, "'ab'"), crux(2, "[1, (2, None)]"), crux(3, "{'a': True}")]},
    "cmath": {"test": [{"grade": 1, "question": f"{n}是多少？", "golden": g, "reasoning_step": 1} for n, g in enumerate(["12", "0.5", "3/4"])]},
}  # fmt: skip
PROMPTS = {
    "drop": "Text 1. What is 1?",
    "triviaqa": "Question: Who is 1?\nAnswer:",
    "gsm_plus": "Question: What is 0?\nAnswer:",
    "squad2": "Answer with words of the background, or with unanswerable if it does not say.\n\nTitle: T\n\nBackground: Text 1.",
    "humaneval_plus": 'in a markdown code block:\n```\ndef add1(x):\n    """Adds 1."""\n```',
    "mbpp_plus": '```\n"""\nWrite a function that adds 1.\nassert add1(1) == 2\n"""\n```',
    "cruxeval": "[PYTHON]\ndef f(x):\n    return g(1)\nassert f('a==b1') == ??\n[/PYTHON]\n[THOUGHT]\n",
    "cmath": "0是多少？\n请一步一步地推理，并将最终答案写入\\boxed{}.",
    "olympiadbench": "an International Math competition. The answer of The problem should be a numerical value. Please",
}  # fmt: skip


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for name, splits in ROWS.items():
        (tmp_path / name).mkdir()
        for split, rows in splits.items():
            (tmp_path / name / f"{split}.jsonl").write_text(lines(rows), encoding="utf-8")
    configs = ""
    for name, rows in OLYMPIAD.items():
        (tmp_path / "olympiadbench" / name).mkdir(parents=True)
        (tmp_path / "olympiadbench" / name / "train.jsonl").write_text(lines(rows), encoding="utf-8")
        configs += f"- config_name: {name}\n  data_files: [{{split: train, path: {name}/train.jsonl}}]\n"
    (tmp_path / "olympiadbench" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", PROMPTS)
def test_reference_answers_score_one_others_and_none_score_nothing(root, name):
    recipe = recipes.find(f"llada2_{name}")
    tasks = taskset.tasks_of(recipe, root)

    def scored(told, **options):
        asked = Benchmark(recipe.name, told, tasks, told.settings)
        return run(asked, GoldLM(tiny_tokenizer(), told, tasks, **options))

    result, records = scored(recipe)
    assert [(r["id"], r["reply"]) for r in records if r["score"] != 1.0] == []
    assert (result["score"], result["subset"], result["drift"]) == (1.0, "", [])
    assert scored(recipe, shift=1)[0]["score"] == 0.0
    assert scored(recipe.model_copy(update={"gold": ""}))[0]["score"] == 0.0
    lm = GoldLM(tiny_tokenizer(), recipe, tasks)
    (asked,) = requests_of(Benchmark(recipe.name, recipe, tasks, recipe.settings), lm, limit=1).values()
    assert asked[0].args[0].messages[-1]["content"].endswith(PROMPTS[name]) or PROMPTS[name] in asked[0].args[0]
    assert len([m for m in asked[0].args[0].messages if m["role"] == "user"]) == recipe.shots + 1


def test_the_five_sets_of_olympiadbench_count_alike(root):
    recipe = recipes.find("llada2_olympiadbench.dare21")
    assert recipe.departures(recipe).keys() == {"filter"}
    assert recipe.settings.sampling["max_new_tokens"] == 4096
    tasks = taskset.tasks_of(recipe, root)
    lm = GoldLM(tiny_tokenizer(), recipe.model_copy(update={"gold": "\\boxed{2}"}), tasks)
    result, _ = run(Benchmark(recipe.name, recipe, tasks, recipe.settings), lm)
    assert (result["score"], result["n"]) == (pytest.approx(1 / 3 / 5), 7)
    asked = {each["asked"] for task in tasks["tasks"].values() for each in task.eval_docs}
    told = [
        "multiple answers, with the answers in order being a numerical value, an expression. Please",
        "以下是中国数学竞赛中的解答题，答案类型为数值。请",
        "所以最终答案是\\boxed{答案}(单位)。\"显式给出结果，注意答案的单位不要放在\\boxed{}中。\nWhat is 4?\n\n请",
        "\\boxed{answer}(unit).\" and give the result explicitly, note that the unit of the answer should not be included",
    ]  # fmt: skip
    assert [any(words in text for text in asked) for words in told] == [True] * 4


@pytest.mark.parametrize(
    ("reply", "wanted", "same"),
    [
        ("So the final answer is \\boxed{2,1}.", "$1$,$2$", True),
        ("\\boxed{1} and \\boxed{2}", "$1$,$2$", True),
        ("\\boxed{1}", "$1$,$2$", False),
        ("So the final answer is \\boxed{50\\%}.", "0.5", True),
        ("\\boxed{6, 4}", "$5\\pm 1$", True),
        ("\\boxed{\\frac{2}{4}}", "$\\frac{1}{2}$", True),
        ("\\boxed{[1,2]}", "$[1,2]$", True),
        ("\\boxed{x \\in (1,2)}", "$(1,3)$", False),
        ("\\boxed{}", "", False),
    ],
)
def test_lists_of_formulas(reply, wanted, same):
    assert answers.olympiad_results({"final_answer": [wanted]}, [reply]) == {"same_answers": float(same)}


def test_words_and_literals():
    document = {"answers": {"text": ["The red house", "Ada"]}}
    assert answers.squad_results(document, ["a red house."]) == {"exact": 1.0, "f1": 1.0}
    assert answers.squad_results(document, ["red"]) == {"exact": 0.0, "f1": pytest.approx(2 / 3)}
    assert answers.squad_results({"answers": {"text": []}}, ["Ada"]) == {"exact": 0.0, "f1": 0.0}
    row = {"input": "'x == y'", "output": "['a']"}
    said = ["[ANSWER]\nassert f('x == y') == ['a']", '["a"]', "assert f(\"x\") == ['a']\n[/ANSWER]", "['b']", "['a'"]
    assert [answers.literal_results(row, [each])["same_value"] for each in said] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("reply", "letter"), [("A项不对，所以答案是B。", "B"), ("答案：**C**", "C"), ("正确答案选项为 D", "D"), ("B", "B")]
)
def test_a_choice_in_chinese(reply, letter):
    assert opencompass.FirstOption(chinese=True).read(reply) == letter
