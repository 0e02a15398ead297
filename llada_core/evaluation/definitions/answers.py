"""How answers in a word, a value, a program or a list of formulas are judged: SQuAD 2.0, CRUXEval, EvalPlus, OlympiadBench."""

import ast
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset
from math_verify import parse, verify

from llada_core.verifiers.code import LIMITS, Limits, passes, whole

Document = Mapping[str, Any]

# -- words of a text ------------------------------------------------------------------------------------------------

UNANSWERABLE = "unanswerable"


def squad_results(document: Document, replies: list[str]) -> dict[str, float]:
    """`exact` and `f1` over words, of the reference that a reply is nearest to, as SQuAD's own script counts
    (arXiv:1806.03822); what the text does not answer is "unanswerable"."""
    said = _words(replies[0])
    wanted = [_words(text) for text in document["answers"]["text"]] or [[UNANSWERABLE]]
    return {"exact": float(said in wanted), "f1": max(_overlap(said, words) for words in wanted)}


def _words(text: str) -> list[str]:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _overlap(said: list[str], wanted: list[str]) -> float:
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else float(said == wanted)


# -- a Python value -------------------------------------------------------------------------------------------------


def literal_results(document: Document, replies: list[str]) -> dict[str, float]:
    """Whether the literal that a reply asserts is the program's output, as values where both are literals."""
    said = replies[0].rsplit("[ANSWER]", 1)[-1].split("[/ANSWER]")[0].strip()
    call = f"f({document['input']})"
    if call in said:
        said = said.split(call, 1)[1].strip().removeprefix("==")
    elif said.startswith("assert"):
        said = said.partition("==")[2]
    return {"same_value": float(_value(said.strip()) == _value(document["output"]))}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text


# -- programs with many tests ---------------------------------------------------------------------------------------

# EvalPlus's tests take of numpy what compares numbers with a tolerance; only the standard library is in the sandbox.
_NUMPY = """class np:
    ndarray, float32, float64 = (), "float32", "float64"

    @staticmethod
    def allclose(out, exp, rtol, atol):
        if isinstance(exp, (list, tuple)):
            return len(out) == len(exp) and all(np.allclose(a, b, rtol, atol) for a, b in zip(out, exp))
        return out == exp or abs(out - exp) <= atol + rtol * abs(exp)
"""
_MANY = Limits(seconds=LIMITS.seconds, cpu_seconds=30.0, processes=LIMITS.processes)  # hundreds of inputs a problem


def humaneval_plus_results(document: Document, replies: list[list[str]]) -> dict[str, float]:
    """Share of the candidate programs that pass EvalPlus's tests of a HumanEval problem."""
    tests = f"{document['test']}\ncheck({document['entry_point']})"
    return {"pass@1": _share(replies[0], tests, document["entry_point"])}


def mbpp_plus_results(document: Document, replies: list[list[str]]) -> dict[str, float]:
    """Share of the candidate programs that pass EvalPlus's tests of an MBPP problem."""
    return {"pass_at_1": _share(replies[0], "\n".join([*document["test_imports"], document["test"]]))}


def _share(programs: list[str], tests: str, wanted: str = "") -> float:
    case = whole(tests.replace("import numpy as np\n", _NUMPY), wanted)
    return sum(passes(program, [case], _MANY)[0] for program in programs) / len(programs)


# -- several formulas -----------------------------------------------------------------------------------------------

_CLOSE = 1.01e-8
_TYPES = {
    "Numerical": ("a numerical value", "数值"), "Expression": ("an expression", "表达式"),
    "Equation": ("an equation", "方程"), "Interval": ("an interval", "区间"),
}  # fmt: skip
_ENGLISH = (
    "The following is an open-ended problem from an International {subject} competition. {typed}Please calculate the"
    " answer according to the given requirements and the information provided. Please use LaTeX format to represent the"
    ' variables and formulas used in the solution process and results. Please end your solution with "So the final'
    ' answer is {box}." and give the result explicitly{unit}.\n{question}\n\nPlease reason step by step, and put your'
    " final answer within \\boxed{{}}."
)
_CHINESE = (
    "以下是中国{subject}竞赛中的解答题{typed}。请根据题目的要求和所提供的信息计算得出答案。解答过程和结果中使用的变量和公式请使用"
    'LaTeX格式表示。请在最后以"所以最终答案是{box}。"显式给出结果{unit}。\n{question}\n\n'
    "请通过逐步推理来解答问题，并把最终答案放置于\\boxed{{}}中。"
)


def with_olympiad_prompts(documents: Dataset) -> Dataset:
    """OlympiadBench's questions with `asked`, what DARE's OpenCompass asks for each."""
    return documents.map(lambda document: {"asked": _asked(document)})


def _asked(document: Document) -> str:
    chinese, several = document["language"] == "Chinese", bool(document["is_multiple_answer"])
    physics = document["subject"] != "Math"
    if chinese:
        box = "\\boxed{用英文逗号连接的多个答案}" if several else "\\boxed{答案}"
        unit = ("(单位)", "，注意答案的单位不要放在\\boxed{}中")
    else:
        box = "\\boxed{multiple answers connected with commas}" if several else "\\boxed{answer}"
        unit = ("(unit)", ", note that the unit of the answer should not be included in \\boxed{}")
    ending = unit if document["unit"] else ("", "")
    return (_CHINESE if chinese else _ENGLISH).format(
        subject=(("数学", "物理") if chinese else ("Math", "Physics"))[physics],
        typed=_typed(str(document["answer_type"]), chinese, several),
        box=box + ending[0],
        unit=ending[1],
        question=document["question"],
    )


def _typed(answer_type: str, chinese: bool, several: bool) -> str:
    """What kind of answer is wanted; empty where OpenCompass says nothing of it."""
    if "Tuple" in answer_type or "Need_human_evaluate" in answer_type:
        return ""
    parts = answer_type.split(",") if several else [answer_type]
    kinds = [next(words for name, words in _TYPES.items() if name in part)[chinese] for part in parts]
    if not several:
        return f"，答案类型为{kinds[0]}" if chinese else f"The answer of The problem should be {kinds[0]}. "
    if len(set(kinds)) == 1:
        english = f"The problem has multiple answers, each of them should be {kinds[0]}. "
        return f"，题目有多个答案，答案类型均为{kinds[0]}" if chinese else english
    english = f"The problem has multiple answers, with the answers in order being {', '.join(kinds)}. "
    return f"，题目有多个答案，答案类型分别为{'、'.join(kinds)}" if chinese else english


def olympiad_results(document: Document, replies: list[str]) -> dict[str, float]:
    """Whether a reply's answers are the reference's, in any order; numbers to 1e-8, a percentage as its number too."""
    said = re.split("So the final answer is|所以最终答案是", replies[0])[-1]
    given, wanted = list(_answers(said)), list(_answers(document["final_answer"][0]))
    if not wanted or len(given) != len(wanted):
        return {"same_answers": 0.0}
    for answer in wanted:
        found = next((each for each in given if _same(each, answer)), None)
        if found is None:
            return {"same_answers": 0.0}
        given.remove(found)
    return {"same_answers": 1.0}


def _answers(text: str) -> Iterator[str]:
    """The answers in all boxes of a text, without any in the formulas of its last line, else in the whole."""
    formulas = re.findall(r"\$(.*?)\$", text.strip().split("\n")[-1])
    for part in list(_boxes(text)) or formulas or [text]:
        for answer in _split(_plain(part)):
            yield from (answer.replace("\\pm", sign) for sign in ("+", "-")) if "\\pm" in answer else (answer,)


def _boxes(text: str) -> Iterator[str]:
    for start in (match.end() for match in re.finditer(r"\\boxed\{", text)):
        depth = 1
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if not depth:
                yield text[start:at]
                break


def _split(text: str) -> Iterator[str]:
    """Parts between the commas that no bracket encloses."""
    depth, start = 0, 0
    for at, character in enumerate(text):
        depth += {**dict.fromkeys("([{", 1), **dict.fromkeys(")]}", -1)}.get(character, 0)
        if character == "," and depth == 0:
            yield text[start:at].strip()
            start = at + 1
    if text[start:].strip():
        yield text[start:].strip()


def _plain(text: str) -> str:
    text = text.rsplit("\\in ", 1)[-1]
    for dropped in ("\\left", "\\right", "$", "^\\circ", "^{\\circ}", "\\%", "%"):
        text = text.replace(dropped, "")
    text = text.replace("，", ",").replace("\\approx", "=").replace("\\simeq", "=")
    text = re.sub(r"\\(?:mathrm|mathbf)\{~?([^}]*)\}", r"\1", text)
    return text.strip("\n ,.:;^_=+`!@#&*~，。")


def _same(said: str, wanted: str) -> bool:
    if said == wanted:
        return bool(said)
    try:
        number, reference = float(said), float(wanted)
    except ValueError:
        return bool(verify(parse(f"${wanted}$"), parse(f"${said}$")))
    return any(abs(scale * reference - number) <= _CLOSE for scale in (0.01, 1, 100))
