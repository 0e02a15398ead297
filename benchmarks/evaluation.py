"""How fast evaluation is beside what the reference evaluators do: one request per forward batch, fixed length, no stop.

The same questions of the default run's puzzles, the same weights; answers must be the same texts. Ours goes through
lm-eval's model with batches of 8 and stops at the end token. Likelihoods: sudokus with four answers each, three of them
with digits replaced; ours takes as many samples as err no more than the oracle's 128 samples (`benchmarks.likelihood`).

`python -m benchmarks.evaluation [MODEL_FOLDER]`
"""

import contextlib
import io
import random
import sys
from itertools import islice
from pathlib import Path

import torch
from lm_eval.api.instance import Instance

from benchmarks import oracle
from benchmarks.champion import recipe
from benchmarks.likelihood import SAMPLES, samples_as_good
from benchmarks.timing import interleaved, table
from llada_core.evaluation.answering import Responder, ResponderOptions
from llada_core.evaluation.harness import LladaLM
from llada_core.evaluation.params import BenchmarkSettings
from llada_core.evaluation.requests import ChatText, prompt_ids
from llada_core.files import read
from llada_core.modeling import load_model
from llada_core.tokenizer import Tokenizer

PUZZLES, QUESTIONS, ROUNDS = ("sudoku", "countdown", "seats"), 24, 3
OPTIONS, TIMED = 200, 10  # questions for the error of likelihoods, and for their rate
SETTINGS: tuple[tuple[int, int, float | None], ...] = (  # length and block of both sides, threshold of ours
    (recipe().max_new_tokens, recipe().block_length, None),  # the default run's
    (64, 8, None),  # a long room in short blocks, as LLaDA 1.5 is evaluated
    (recipe().max_new_tokens, recipe().block_length, 0.999),  # approximate
)


def main(folder: Path) -> None:
    """Prints answers per second of both and their ratio, for the puzzles beside the model."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(folder, device="cpu"), Tokenizer.load(folder)
    plain = load_model(folder, device="cpu")
    shape = plain.shape
    reference = oracle.Reference(dict(plain.state_dict()), shape.n_heads, shape.rope_theta, shape.norm_eps)
    lines = []
    for file in (folder.parents[1] / "data" / "eval" / f"{name}.jsonl" for name in PUZZLES):
        rows = list(islice(read(file), QUESTIONS))
        texts = [chat(tokenizer, row["prompt"]) for row in rows]
        for length, block, threshold in SETTINGS:
            shape = {"max_new_tokens": length, "block_length": block, "steps": length, "threshold": threshold}
            told = [file.stem, str(length), str(block), "exact" if threshold is None else f"threshold {threshold}"]
            lines.append([*told, *compared(model, reference, tokenizer, texts, shape)])
            print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    header = ["puzzles", "length", "block", "mode", "oracle answers/s", "ours answers/s", "times", "same texts"]
    print(f"\n{folder}: {QUESTIONS} questions each, one thread\n\n{table(header, lines)}", flush=True)
    rows = list(islice(read(folder.parents[1] / "data" / "eval" / "sudoku.jsonl"), OPTIONS))
    likelihoods(model, reference, tokenizer, rows)


def chat(tokenizer: Tokenizer, question: str) -> ChatText:
    """A question as lm-eval hands it to its model."""
    messages = [{"role": "user", "content": question}]
    return ChatText(tokenizer.chat_text(messages), messages)


def likelihoods(model, reference, tokenizer: Tokenizer, rows: list[dict]) -> None:  # noqa: ANN001
    """Prints the errors, and the rates for whole answers and for their last digit alone."""
    rng, whole, last = random.Random(5), [], []
    for row in rows:
        text, solution = chat(tokenizer, row["prompt"]), row["solution"]
        options = [solution]
        for _ in range(3):
            other = list(solution)
            for place in rng.sample(range(16), 3):
                other[place] = rng.choice("1234")
            options.append("".join(other))
        whole.append((text, options))
        last.append((text + solution[:-1], list("1234")))
    prompts = prompt_ids([text for text, _ in whole], tokenizer)
    ids = [
        (prompt, [tokenizer.encode(o) for o in options]) for prompt, (_, options) in zip(prompts, whole, strict=True)
    ]
    num_samples, mask = samples_as_good(model, ids), tokenizer.special.mask_id
    for items, what in ((whole[:TIMED], "whole answers, 16 tokens"), (last[:TIMED], "last digits, one token")):
        pairs = [(text, option) for text, options in items for option in options]

        def ours(pairs: list[tuple[str, str]] = pairs) -> None:
            lm = LladaLM(
                Responder(model, tokenizer, ResponderOptions(BenchmarkSettings(samples=num_samples), batch_size=32))
            )
            asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
            with contextlib.redirect_stderr(io.StringIO()):
                lm.loglikelihood(asked)

        def theirs(pairs: list[tuple[str, str]] = pairs) -> None:
            for text, option in pairs:
                prompt, answer = (
                    torch.tensor(next(prompt_ids([text], tokenizer))),
                    torch.tensor(tokenizer.encode(option)),
                )
                oracle.log_likelihood(reference, prompt, answer, samples=SAMPLES, batch=16, mask_id=mask)

        timing = interleaved({"oracle": theirs, "ours": ours}, "oracle", ROUNDS)["ours"]
        print(
            f"{what}: ours with {num_samples} samples {timing.ratio:.1f} times the oracle's rate ({timing.spread})",
            flush=True,
        )


def compared(model, reference, tokenizer: Tokenizer, texts: list[str], sampling: dict) -> list[str]:  # noqa: ANN001
    """Both rates, the ratio within rounds, and how many texts are the same."""
    settings = BenchmarkSettings(sampling={**sampling, "stop_at_eos": True})
    length, block = sampling["max_new_tokens"], sampling["block_length"]
    answers: dict[str, list[str]] = {}

    def ours() -> None:
        lm = LladaLM(Responder(model, tokenizer, ResponderOptions(settings, batch_size=8)))
        asked = [Instance("generate_until", {}, (text, {"until": []}), i) for i, text in enumerate(texts)]
        with contextlib.redirect_stderr(io.StringIO()):
            answers["ours"] = lm.generate_until(asked)

    def theirs() -> None:
        prompts = [torch.tensor([ids]) for ids in prompt_ids(texts, tokenizer)]
        mask = tokenizer.special.mask_id
        rows = [oracle.generate(reference, p, steps=length, new=length, block=block, mask_id=mask)[0] for p in prompts]
        answers["oracle"] = [tokenizer.answer_text(row[-length:].tolist()) for row in rows]

    timing = interleaved({"oracle": theirs, "ours": ours}, "oracle", ROUNDS)
    same = sum(a == b for a, b in zip(answers["oracle"], answers["ours"], strict=True))
    rates = [f"{len(texts) / min(timing[name].seconds):.1f}" for name in ("oracle", "ours")]
    return [*rates, f"{timing['ours'].ratio:.1f} ({timing['ours'].spread})", f"{same}/{len(texts)}"]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "models" / "grpo")
