"""How fast rows become token rows, beside the tokenizer's own `encode_batch_fast` on the same text.

    python -m benchmarks.tokenise DATA_ROOT

Ours includes reading JSON, map function, chat template, sides, truncation, packing, hashing and writing. Theirs makes
encodings that nobody reads; `read` is theirs with each encoding's `.ids` taken, without which no id leaves the library:
what is the most that ours could be. CPU seconds of one process, best of nine in turn, so that other work counts little.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from llada_core.config.data import PartParams, PretrainData, SFTData, SourceParams
from llada_core.data.build import Workers, build, chunks_of, texts_in
from llada_core.data.sources import find
from llada_core.tokenizer import train_tokenizer


def main(root: Path) -> None:
    rows = {"pretrain": ("gutenberg", PretrainData(length=1024)), "sft": ("alpaca", SFTData(length=4096))}
    for stage, (name, block) in rows.items():
        print(json.dumps({"benchmark": f"tokenise {stage} {name}", **compare(root, stage, name, block)}))


def compare(root: Path, stage: str, name: str, block: PartParams) -> dict[str, float]:
    """Tokens per CPU second of theirs, of theirs read, of ours; and the ratios to theirs."""
    source = SourceParams(name=name)
    origin = find(source, stage, [root])
    texts = [text for chunk in chunks_of(source, origin) for text in texts_in(stage, chunk)]
    rates: dict[str, list[float]] = {"encode_batch_fast": [], "read": [], "ours": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = train_tokenizer(texts[:1000], 4096, folder / "tokenizer")
        for attempt in range(9):
            for entry, size in (("encode_batch_fast", len), ("read", lambda encoding: len(encoding.ids))):
                start = time.process_time()
                tokens = encode_all(tokenizer.fast.backend_tokenizer, texts, size)
                rates[entry].append(tokens / (time.process_time() - start))
            start = time.process_time()
            with Workers(1) as workers:
                card = build(
                    stage, block, folder / "tokenizer", chunks_of(source, origin), workers, folder / str(attempt)
                )
            tokens = card["train"]["tokens"] + card["validation"]["tokens"]
            rates["ours"].append(tokens / (time.process_time() - start))
    best = {entry: max(found) for entry, found in rates.items()}
    ratios = {f"{entry} ratio": round(best[entry] / best["encode_batch_fast"], 3) for entry in ("read", "ours")}
    return {entry: round(rate) for entry, rate in best.items()} | ratios


def encode_all(engine: Tokenizer, texts: list[str], size: Callable[[Encoding], int]) -> int:
    """Encodes in batches of a thousand; returns the number of tokens."""
    return sum(
        size(encoding)
        for i in range(0, len(texts), 1000)
        for encoding in engine.encode_batch_fast(texts[i : i + 1000], add_special_tokens=False)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
