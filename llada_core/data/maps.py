"""From a row as its authors published it to what a stage needs, one small function per data set.

pretrain needs {text}; sft {messages}; grpo {prompt, task, answer}; preference {prompt, chosen, rejected}, where a
prompt is a text or a list of messages. A row that holds these already needs no function. A function of your own is
named in the source by its dotted path.
"""

import re
from typing import Any

Row = dict[str, Any]

REASONING = "Respond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n\n"


def _dialogue(question: str, reply: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def alpaca(row: Row) -> Row:
    """{instruction, input, output}: alpaca, instruction sets in its form, and opc-sft without an input."""
    parts = [row["instruction"], row.get("input") or ""]
    return _dialogue("\n\n".join(filter(None, parts)), row["output"])


def dolly(row: Row) -> Row:
    """{instruction, context, response}."""
    parts = [row.get("context") or "", row["instruction"]]
    return _dialogue("\n\n".join(filter(None, parts)), row["response"])


def gsm8k_dialogue(row: Row) -> Row:
    """{question, answer}: the worked solution without its calculator marks, the result behind ####."""
    return _dialogue(row["question"], re.sub(r"<<.*?>>", "", row["answer"]))


def gsm8k_reasoning(row: Row) -> Row:
    """{question, answer}: as `gsm8k` asks and its published rewards want it, so that GRPO starts from that format."""
    worked, _, result = re.sub(r"<<.*?>>", "", row["answer"]).partition("\n####")
    reply = f"<reasoning>\n{worked}\n</reasoning>\n<answer>\n{result.strip()}\n</answer>\n"
    return _dialogue(REASONING + row["question"], reply)


def gsm8k(row: Row) -> Row:
    """{question, answer}: the number behind #### is what a reply is verified against."""
    answer = row["answer"].split("####")[-1].strip()
    return {"prompt": REASONING + row["question"], "task": "gsm8k", "answer": {"answer": answer}}


def math(row: Row) -> Row:
    """{problem, solution}, the result in the solution's last box; or {problem, answer}."""
    answer = row["solution"] if "solution" in row else f"\\boxed{{{row['answer']}}}"
    prompt = f"{REASONING}Put your final answer in \\boxed{{}} inside the answer tags.\n\n{row['problem']}"
    return {"prompt": prompt, "task": "math", "answer": {"answer": answer}}


def countdown(row: Row) -> Row:
    """{nums, target} (Countdown-Tasks-3to4) or {input, output} (d1); only three-number items are used by d1."""
    numbers = row["nums"] if "nums" in row else [int(number) for number in row["input"].split(",")]
    target = int(row["target"] if "target" in row else row["output"])
    prompt = (
        f"{REASONING}Write an arithmetic expression that evaluates to exactly {target} and uses the numbers {numbers}, "
        "each exactly once, with +, -, *, / and brackets. Put only the expression in the answer."
    )
    return {"prompt": prompt, "task": "countdown", "answer": {"numbers": list(numbers), "target": target}}


def sudoku(row: Row) -> Row:
    """{Puzzle, Solution}, 16 digits each (d1)."""
    prompt = (
        f"{REASONING}Solve this 4x4 sudoku, given as 16 digits in row order where 0 is an empty cell: {row['Puzzle']}\n"
        "Every row, column and 2x2 box holds each of 1 to 4 once. Put the 16 digits of the solved grid in the answer."
    )
    puzzle = str(row["Puzzle"]).zfill(16)
    return {"prompt": prompt, "task": "sudoku", "answer": {"puzzle": puzzle, "solution": str(row["Solution"])}}


def code(row: Row) -> Row:
    """{question, test} (KodCode): a reply's program is verified by the tests."""
    prompt = f"{REASONING}Write a Python program in a ```python fence inside the answer tags.\n\n{row['question']}"
    return {"prompt": prompt, "task": "code", "answer": {"tests": row["test"]}}


def preference(row: Row) -> Row:
    """{prompt, chosen, rejected} where the replies may be whole dialogues: their last message counts."""
    replies = {
        name: row[name] if isinstance(row[name], str) else row[name][-1]["content"] for name in ("chosen", "rejected")
    }
    prompt = row["prompt"] if "prompt" in row else row["chosen"][:-1]
    return {"prompt": prompt, **replies}
