"""From a row as its authors published it to what a stage needs, one small function per data set.

pretrain needs {text}; sft {messages}; grpo {prompt, task, answer}; preference {prompt, chosen, rejected}, where a
prompt is a text or a list of messages. A row that holds these already needs no function. A function of your own is
named in the source by its dotted path; it returns None for a row to be left out.
"""

import re
from typing import Any

from llada_core.data.shapes import text_from
from llada_core.data.sources import Row

# The prompts that d1 (diffu-grpo/data_utils.py) and dllm (dllm/pipelines/rl/grpo/datasets.py) train GRPO with, character
# by character: their rewards look for these tags, and published figures were reached with these words.
REASONING = """
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""
SUDOKU = """
Please solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string reading left-to-right, \
top-to-bottom, where '0' represents empty cells.

Rules:
- Fill empty cells with digits 1-4
- Each row must contain digits 1-4 exactly once
- Each column must contain digits 1-4 exactly once
- Each 2x2 box must contain digits 1-4 exactly once

Important: Your solution must be a COMPLETE 16-character string with only the digits 1-4, representing your final \
solved grid.

Respond in this exact format:
<reasoning>
Your step-by-step solving process
</reasoning>
<answer>
[16-character solution string with no spaces or separators]
</answer>
"""
# Ours, for the maps that end in _terse: the same tags, fewer words.
TERSE = "Respond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n\n"


def _dialogue(question: str, reply: Any) -> Row:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text_from(reply, "reply")}]
    }


def alpaca(row: Row) -> Row:
    """{instruction, input, output}: alpaca, instruction sets in its form, and opc-sft without an input."""
    parts = [text_from(row["instruction"], "instruction"), text_from(row.get("input"), "input")]
    return _dialogue("\n\n".join(filter(None, parts)), row["output"])


def dolly(row: Row) -> Row:
    """{instruction, context, response}."""
    parts = [text_from(row.get("context"), "context"), text_from(row["instruction"], "instruction")]
    return _dialogue("\n\n".join(filter(None, parts)), row["response"])


def gsm8k_dialogue(row: Row) -> Row:
    """{question, answer}: the worked solution without its calculator marks, the result behind ####."""
    return _dialogue(row["question"], re.sub(r"<<.*?>>", "", text_from(row["answer"], "answer")))


def gsm8k_reasoning(row: Row) -> Row:
    """{question, answer}: as `gsm8k` asks and its published rewards want it, so that GRPO starts from that format."""
    worked, _, result = re.sub(r"<<.*?>>", "", text_from(row["answer"], "answer")).partition("\n####")
    reply = f"<reasoning>\n{worked}\n</reasoning>\n<answer>\n{result.strip()}\n</answer>\n"
    return _dialogue(gsm8k(row)["prompt"], reply)


def gsm8k(row: Row) -> Row:
    """{question, answer}, asked as d1 and dllm do: the number behind #### is what a reply is verified against."""
    answer = text_from(row["answer"], "answer").split("####")[-1].strip()
    return {"prompt": f"{REASONING}\n\n{row['question']}", "task": "gsm8k", "answer": {"answer": answer}}


def gsm8k_terse(row: Row) -> Row:
    """As `gsm8k`, in our words."""
    return gsm8k(row) | {"prompt": TERSE + row["question"]}


def math(row: Row) -> Row:
    """{problem, solution}, the result in the solution's last box, or {problem, answer}; asked as d1 and dllm do."""
    answer = row["solution"] if "solution" in row else f"\\boxed{{{row['answer']}}}"
    prompt = (
        f"{REASONING}\n\nYou are a math expert. You will be given a question to solve. Solve it step by step. "
        f"Wrap the final answer in a \\boxed{{}}. \n\n{row['problem']}"
    )
    return {"prompt": prompt, "task": "math", "answer": {"answer": answer}}


def math_terse(row: Row) -> Row:
    """As `math`, in our words."""
    prompt = f"{TERSE}Put your final answer in \\boxed{{}} inside the answer tags.\n\n{row['problem']}"
    return math(row) | {"prompt": prompt}


def countdown(row: Row) -> Row | None:
    """{nums, target} (Countdown-Tasks-3to4) or {input, output} (d1), asked as d1 and dllm do: three numbers only."""
    puzzle = _countdown(row)
    numbers, target = puzzle["numbers"], puzzle["target"]
    if len(numbers) != 3:
        return None  # both leave out the items with four numbers
    prompt = (
        f"{REASONING}\nUsing only the numbers {numbers}, create an arithmetic expression that evaluates to exactly "
        f"{target}. You must use all numbers from the list, and each number must be used exactly once. You may use the "
        "operations +, -, *, and / as needed. After reasoning, provide only your final expression inside "
        "<answer></answer> tags without including an equals sign or the target number. For example, if the numbers are "
        "[2, 3, 4] and the target is 5, a valid answer is: <answer>\n2*4-3\n</answer>"
    )
    return {"prompt": prompt, "task": "countdown", "answer": puzzle}


def countdown_terse(row: Row) -> Row:
    """As `countdown`, in our words, items with four numbers included."""
    puzzle = _countdown(row)
    prompt = (
        f"{TERSE}Write an arithmetic expression that evaluates to exactly {puzzle['target']} and uses the numbers "
        f"{puzzle['numbers']}, each exactly once, with +, -, *, / and brackets. Put only the expression in the answer."
    )
    return {"prompt": prompt, "task": "countdown", "answer": puzzle}


def sudoku(row: Row) -> Row:
    """{Puzzle, Solution}, 16 digits each (d1), asked as d1 and dllm do."""
    puzzle = _cells(row, "Puzzle")
    prompt = f"{SUDOKU}\n\nSolve the following Sudoku puzzle: {puzzle}\n"
    return {"prompt": prompt, "task": "sudoku", "answer": {"puzzle": puzzle, "solution": _cells(row, "Solution")}}


def sudoku_terse(row: Row) -> Row:
    """As `sudoku`, in our words."""
    prompt = (
        f"{TERSE}Solve this 4x4 sudoku, given as 16 digits in row order where 0 is an empty cell: "
        f"{_cells(row, 'Puzzle')}\nEvery row, column and 2x2 box holds each of 1 to 4 once. "
        "Put the 16 digits of the solved grid in the answer."
    )
    return sudoku(row) | {"prompt": prompt}


def code(row: Row) -> Row:
    """{question, test} (KodCode), asked as dllm does: a reply's program is verified by the tests."""
    prompt = (
        f"{REASONING}\n\nYou are a coding expert. You will be given a coding problem to solve. Solve it step by step. "
        f"\n\n{row['question']}"
    )
    return {"prompt": prompt, "task": "code", "answer": {"tests": row["test"]}}


def code_terse(row: Row) -> Row:
    """As `code`, in our words."""
    prompt = f"{TERSE}Write a Python program in a ```python fence inside the answer tags.\n\n{row['question']}"
    return code(row) | {"prompt": prompt}


def _countdown(row: Row) -> Row:
    numbers = row["nums"] if "nums" in row else str(row["input"]).split(",")
    return {"numbers": [int(n) for n in numbers], "target": int(row["target"] if "target" in row else row["output"])}


def _cells(row: Row, name: str) -> str:
    """The 16 digits in a field; a program that took them for a number has dropped the zeros in front."""
    cells = str(row[name]).strip().zfill(16)
    if re.fullmatch("[0-4]{16}", cells) is None:
        raise ValueError(f"{name} {row[name]!r} is not 16 digits from 0 to 4")
    return cells


def preference(row: Row) -> Row:
    """{prompt, chosen, rejected} where the replies may be whole dialogues: their last message counts."""
    replies = {
        name: row[name] if isinstance(row[name], str) else row[name][-1]["content"] for name in ("chosen", "rejected")
    }
    prompt = row["prompt"] if "prompt" in row else row["chosen"][:-1]
    return {"prompt": prompt, **replies}
