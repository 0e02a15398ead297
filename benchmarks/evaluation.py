"""How fast evaluation is beside what the reference evaluators do: one request per forward batch, fixed length, no stop.

The same questions of the default run's puzzles, the same weights; answers must be the same texts. Ours goes through
lm-eval's model with batches of 8 and stops at the end token.

`python -m benchmarks.evaluation [MODEL_FOLDER]`
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import torch
from lm_eval.api.instance import Instance

from benchmarks import oracle
from benchmarks.timing import interleaved, table
from llada_core.config.evaluation import Settings
from llada_core.evaluation.answering import Answerer, Options
from llada_core.evaluation.harness import LladaLM
from llada_core.modeling import load_model
from llada_core.tokenizer import Tokenizer

QUESTIONS, ROUNDS = 24, 3


def main(folder: Path, length: int = 24) -> None:
    """Prints answers per second of both and their ratio, for every puzzle file beside the model."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    model.fuse_for_inference()
    plain = load_model(folder)
    shape = plain.shape
    reference = oracle.Reference(dict(plain.state_dict()), shape.n_heads, shape.rope_theta, shape.norm_eps)
    settings = Settings(
        sampling={"max_new_tokens": length, "block_length": length, "steps": length, "stop_at_eos": True}
    )
    lines = []
    for file in sorted((folder.parents[1] / "data" / "eval").glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:QUESTIONS]]
        texts = [tokenizer.chat_text([{"role": "user", "content": row["prompt"]}]) for row in rows]
        answers: dict[str, list[str]] = {}

        def ours(texts: list[str] = texts, answers: dict[str, list[str]] = answers) -> None:
            lm = LladaLM(Answerer(model, tokenizer, Options(settings, batch_size=8)))
            asked = [Instance("generate_until", {}, (text, {"until": []}), i) for i, text in enumerate(texts)]
            with contextlib.redirect_stderr(io.StringIO()):
                answers["ours"] = lm.generate_until(asked)

        def theirs(texts: list[str] = texts, answers: dict[str, list[str]] = answers) -> None:
            answers["oracle"] = []
            for text in texts:
                prompt = torch.tensor([tokenizer.encode(text, user=False)])
                mask = tokenizer.special.mask_id
                written = oracle.generate(reference, prompt, steps=length, new=length, block=length, mask_id=mask)
                answers["oracle"].append(tokenizer.answer_text(written[0, -length:].tolist()))

        timing = interleaved({"oracle": theirs, "ours": ours}, "oracle", ROUNDS)
        same = sum(a == b for a, b in zip(answers["oracle"], answers["ours"], strict=True))
        rates = [len(rows) / min(timing[name].seconds) for name in ("oracle", "ours")]
        found = timing["ours"]
        lines.append(
            [
                file.stem,
                f"{rates[0]:.1f}",
                f"{rates[1]:.1f}",
                f"{found.ratio:.1f} ({found.spread})",
                f"{same}/{len(rows)}",
            ]
        )
        print(f"{file.stem}: {found.ratio:.1f} times", file=sys.stderr, flush=True)
    header = ["puzzles", "oracle answers/s", "ours answers/s", "times", "same texts"]
    print(f"\n{folder}: {QUESTIONS} questions each, room for {length} tokens, one thread\n\n{table(header, lines)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "models" / "grpo")
