"""How fast rows become token rows, beside the tokenizer's own `encode_batch_fast` on the same text.

    python -m benchmarks.tokenise DATA_ROOT

Ours includes reading JSON, map function, chat template, sides, truncation, packing, hashing and writing. Theirs makes
encodings that nobody reads; `read` is theirs with each encoding's `.ids` taken, without which no id leaves the library:
what is the most that ours could be. Processor seconds of one process, in turn; the ratio is the median of nine rounds.
"""

import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from benchmarks.timing import interleaved
from llada_core.data.build import Workers, build, chunks_of, texts_in
from llada_core.data.params import PartParams, PretrainData, SFTData, SourceParams
from llada_core.data.sources import find
from llada_core.tokenizer import train_tokenizer


def main(root: Path) -> None:
    rows = {"pretrain": ("gutenberg", PretrainData(length=1024)), "sft": ("alpaca", SFTData(length=4096))}
    for stage, (name, block) in rows.items():
        print(json.dumps({"benchmark": f"tokenise {stage} {name}", **compare(root, stage, name, block)}))


def compare(root: Path, stage: str, name: str, block: PartParams) -> dict[str, float | str]:
    """Tokens per processor second of theirs and of ours; and how many times theirs ours and theirs read are."""
    source = SourceParams(name=name)
    origin = find(source, stage, [root])
    texts = [text for chunk in chunks_of(source, origin) for text in texts_in(stage, block, chunk)]
    with tempfile.TemporaryDirectory() as scratch:
        folder, made = Path(scratch), itertools.count()
        tokenizer = train_tokenizer(texts[:1000], 4096, folder / "tokenizer")
        engine = tokenizer.fast.backend_tokenizer

        def ours() -> int:
            target = folder / str(next(made))
            with Workers(1) as workers:
                card = build(stage, block, folder / "tokenizer", chunks_of(source, origin), workers, target)
            return card["train"]["tokens"] + card["validation"]["tokens"]

        entries: dict[str, Callable[[], int]] = {
            "encode_batch_fast": lambda: encode_all(engine, texts, len),
            "read": lambda: encode_all(engine, texts, lambda encoding: len(encoding.ids)),
            "ours": ours,
        }
        tokens = {entry: run() for entry, run in entries.items()}
        timings = interleaved(entries, "encode_batch_fast", 9)
    base = tokens["encode_batch_fast"]
    result: dict[str, float | str] = {
        f"{entry} tokens/s": round(tokens[entry] / statistics.median(timing.seconds))
        for entry, timing in timings.items()
    }
    for entry in ("read", "ours"):
        low, middle, high = (x * tokens[entry] / base for x in statistics.quantiles(timings[entry].ratios, n=4))
        result[f"{entry} ratio"] = f"{middle:.3f}, middle half {low:.3f}-{high:.3f}"
    return result


def encode_all(engine: Tokenizer, texts: list[str], size: Callable[[Encoding], int]) -> int:
    """Encodes in batches of a thousand; returns the number of tokens."""
    return sum(
        size(encoding)
        for i in range(0, len(texts), 1000)
        for encoding in engine.encode_batch_fast(texts[i : i + 1000], add_special_tokens=False)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
