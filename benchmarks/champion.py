"""What the approximate modes cost the champion: held-out puzzles solved, paired with the exact mode; and what stopping
at EOS saves; and whether a second, third or fourth question is answered as well as a first. An approximate mode counts
as a speed-up only where accuracy stays within one point of exact.

`python -m benchmarks.champion [MODEL_FOLDER] [stopping | dialogues]`, the last for that part alone; the data are those
that the default run prepared.
"""

import math
import random
import sys
from itertools import islice
from pathlib import Path

import torch

from benchmarks import oracle
from benchmarks.timing import interleaved, machine, table
from llada_core.files import read
from llada_core.modeling import load_model
from llada_core.sampling import Generation, generate
from llada_core.sampling.params import SamplingParams
from llada_core.tokenizer import Tokenizer
from llada_core.verifiers.answers import verify
from tasks.project import Params

PUZZLES, BATCH = 500, 50
MODES: dict[str, dict[str, object]] = {
    "exact": {},
    "exact, one block": {"blocks": 1},
    "half the steps": {"steps": 0.5},
    "dual cache": {"cache": "dual"},
    "prefix cache": {"cache": "prefix"},
    "dual cache + threshold 0.9": {"cache": "dual", "threshold": 0.9},
    "dual cache + threshold 0.99": {"cache": "dual", "threshold": 0.99},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.99": {"threshold": 0.99},
    "threshold 0.999": {"threshold": 0.999},
    "factor 0.02": {"factor": 0.02},
    "entropy bound 0.001": {"remasking": "entropy", "entropy_bound": 0.001},
}
DIALOGUES, TURNS = 1000, 4
STOPPING = ("exact", "exact, one block", "threshold 0.999")  # modes timed beside the oracle


def recipe() -> SamplingParams:
    """How the default run's champion is served."""
    register = Params.load(Path(__file__).parents[1] / "params.yaml").register_
    assert register is not None
    assert register.sampling is not None
    return register.sampling


def params_of(mode: dict[str, object], length: int) -> SamplingParams:
    """The champion's recipe (two blocks, a step per token, stop at EOS) with a mode's changes."""
    values = dict(mode)
    blocks, share = int(values.pop("blocks", 2)), float(values.pop("steps", 1))
    block = length // blocks
    return SamplingParams(
        max_new_tokens=length, block_length=block, steps=blocks * int(block * share), stop_at_eos=True, **values
    )


def puzzles(tokenizer: Tokenizer, file: Path) -> tuple[list[dict], list[list[int]], int]:
    """The first puzzles of a file, their prompts, and twice the longest answer in tokens (the recipe's room if none is given)."""
    rows = list(islice(read(file), PUZZLES))
    prompts = [tokenizer.chat_ids([{"role": "user", "content": row["prompt"]}]) for row in rows]
    answers = [len(tokenizer.encode(row["solution"])) for row in rows if "solution" in row]
    return rows, prompts, 2 * (1 + max(answers)) if answers else recipe().max_new_tokens


def solved(tokenizer: Tokenizer, model, rows: list[dict], prompts: list[list[int]], params: SamplingParams):  # noqa: ANN001, ANN201
    """Which puzzles are solved, and forwards per batch of the sampler."""
    right, forwards = [], 0
    for at in range(0, len(rows), BATCH):
        result = generate(model, prompts[at : at + BATCH], params)
        texts = [tokenizer.answer_text(answer.tolist()) for answer in result.answers]
        right += [
            verify(row["task"], text, row["answer"]) for row, text in zip(rows[at : at + BATCH], texts, strict=True)
        ]
        forwards += result.forwards
    return torch.tensor(right, dtype=torch.float64), forwards / math.ceil(len(rows) / BATCH)


def main(folder: Path, parts: list[str]) -> None:
    """Prints accuracy by mode and the gain of stopping."""
    torch.set_num_threads(1)
    data = folder.parents[1] / "data"
    model, tokenizer = load_model(folder, device="cpu"), Tokenizer.load(folder)
    if "dialogues" in parts:
        later_questions(model, tokenizer, folder.name, data)
        return
    if "stopping" not in parts:
        accuracy(model, tokenizer, folder.name, data)
    files = [data / "eval" / f"{name}.jsonl" for name in ("sudoku", "seats", "countdown")]
    some = [puzzles(tokenizer, file)[1:] for file in files if file.is_file()]
    stop_gain(model, tokenizer, [p for prompts, _ in some for p in prompts[:10]], max(length for _, length in some))


def accuracy(model, tokenizer: Tokenizer, name_of_model: str, data: Path) -> None:  # noqa: ANN001
    """Prints what every mode solves of every kind of puzzle."""
    lines = []
    for file in sorted((data / "eval").glob("*.jsonl")):
        rows, prompts, length = puzzles(tokenizer, file)
        exact, _ = solved(tokenizer, model, rows, prompts, params_of({}, length))
        for name, mode in MODES.items():
            right, forwards = solved(tokenizer, model, rows, prompts, params_of(mode, length))
            gain = right - exact
            interval = 1.96 * gain.std().item() / math.sqrt(len(gain))
            counts = "yes" if gain.mean() > -0.01 else "no"
            lines.append(
                [file.stem, name, f"{right.mean():.1%}", f"{100 * gain.mean():+.1f} ± {100 * interval:.1f}",
                 f"{forwards:.1f}", f"{length / forwards:.2f}", counts]
            )  # fmt: skip
    header = ["puzzles", "mode", "solved", "points beside exact", "forwards", "tokens/forward", "counts"]
    print(f"\n{name_of_model}: up to {PUZZLES} puzzles each, {machine()}\n\n{table(header, lines)}", flush=True)


def later_questions(model, tokenizer: Tokenizer, name_of_model: str, data: Path) -> None:  # noqa: ANN001
    """Prints what is solved by the place of a question in a dialogue, paired: every question is asked once at each place.

    The questions stand in a circle in mixed order; dialogue i asks number i, i + 1, i + 2 and i + 3, and its history is
    what the model has replied itself.
    """
    files = [data / "eval" / f"{name}.jsonl" for name in ("sudoku", "seats", "countdown")]
    rows = [row for file in files for row in read(file)]
    random.Random(0).shuffle(rows)
    rows = rows[:DIALOGUES]
    dialogues: list[list[dict[str, str]]] = [[] for _ in rows]
    places, params = [], recipe()
    for turn in range(TURNS):
        asked = rows[turn:] + rows[:turn]
        for messages, row in zip(dialogues, asked, strict=True):
            messages.append({"role": "user", "content": row["prompt"]})
        prompts, right = [tokenizer.chat_ids(messages) for messages in dialogues], []
        for at in range(0, len(asked), BATCH):
            result = generate(model, prompts[at : at + BATCH], params)
            for row, messages, answer in zip(asked[at:], dialogues[at:], result.answers, strict=False):
                text = tokenizer.answer_text(answer.tolist())
                messages.append({"role": "assistant", "content": text})
                right.append(verify(row["task"], text, row["answer"]))
        places.append(torch.tensor(right, dtype=torch.float64).roll(turn))  # back to the order of the questions
    lines = []
    for task in ("all", "sudoku", "seats", "countdown"):
        mine = torch.tensor([task in ("all", row["task"]) for row in rows])
        for turn, place in enumerate(places, 1):
            gain = (place - places[0])[mine]
            interval = 1.96 * gain.std().item() / math.sqrt(len(gain))
            beside = f"{100 * gain.mean():+.1f} ± {100 * interval:.1f}" if turn > 1 else ""
            lines.append([task, str(len(gain)), str(turn), f"{place[mine].mean():.1%}", beside])
    header = ["puzzles", "questions", "asked as number", "solved", "points beside the first"]
    print(f"\n{name_of_model}: {len(rows)} dialogues of {TURNS}, {machine()}\n\n{table(header, lines)}", flush=True)


def stop_gain(model, tokenizer: Tokenizer, ids: list[list[int]], length: int) -> None:  # noqa: ANN001
    """Stopping at EOS beside the oracle in as many blocks, one prompt at a time; exact texts must be the same."""
    shape = model.shape
    reference = oracle.Reference(dict(model.state_dict()), shape.n_heads, shape.rope_theta, shape.norm_eps)
    prompts, mask = [torch.tensor([p]) for p in ids], model.special_tokens.mask_id
    for name in STOPPING:
        texts: dict[str, list[str]] = {}
        params = params_of(MODES[name], length)

        def text(tokens: torch.Tensor) -> str:
            return tokenizer.answer_text(tokens[0, -length:].tolist())

        def by_oracle(block: int = params.block_length, texts: dict = texts) -> None:
            settings = {"steps": length, "new": length, "block": block, "mask_id": mask}
            texts["oracle"] = [text(oracle.generate(reference, p, **settings)) for p in prompts]

        def by_us(params: SamplingParams = params, texts: dict = texts) -> None:
            results: list[Generation] = [generate(model, p, params) for p in prompts]
            texts["ours"] = [text(result.tokens) for result in results]
            texts["forwards"] = [str(result.forwards) for result in results]

        timing = interleaved({"oracle": by_oracle, "ours": by_us}, "oracle", 7)["ours"]
        same = sum(a == b for a, b in zip(texts["oracle"], texts["ours"], strict=True))
        forwards = sum(map(int, texts["forwards"])) / len(prompts)
        print(
            f"\n{name} with stop at EOS, room for {length} tokens in blocks of {params.block_length}: {timing.ratio:.2f}"
            f" times the oracle ({timing.spread}), {forwards:.1f} forwards of {length}, {same} of {len(prompts)} texts identical"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "models" / "grpo", sys.argv[2:])
