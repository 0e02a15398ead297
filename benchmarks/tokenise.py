"""How fast rows become token rows, beside the tokenizer's own `encode_batch_fast` on the same text.

    python -m benchmarks.tokenise DATA_ROOT

Ours includes reading JSON, map function, chat template, sides, truncation, packing, hashing and writing. CPU seconds of
one process, best of nine, so that other work on the machine counts little.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer

from llada_core.config.data import PartParams, PretrainData, SFTData, SourceParams
from llada_core.data.build import Workers, build, chunks_of, texts_in
from llada_core.data.sources import find
from llada_core.tokenizer import train_tokenizer


def main(root: Path) -> None:
    rows = {"pretrain": ("gutenberg", PretrainData(length=1024)), "sft": ("alpaca", SFTData(length=4096))}
    for stage, (name, block) in rows.items():
        print(json.dumps({"benchmark": f"tokenise {stage} {name}", **compare(root, stage, name, block)}))


def compare(root: Path, stage: str, name: str, block: PartParams) -> dict[str, float]:
    """Tokens per CPU second of both, and their ratio."""
    source = SourceParams(name=name)
    origin = find(source, stage, [root])
    texts = [text for chunk in chunks_of(source, origin) for text in texts_in(stage, chunk)]
    theirs, ours = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = train_tokenizer(texts[:1000], 4096, folder / "tokenizer")
        for attempt in range(9):
            start = time.process_time()
            tokens = encode_all(tokenizer.fast.backend_tokenizer, texts)
            theirs.append(tokens / (time.process_time() - start))
            start = time.process_time()
            with Workers(1) as workers:
                card = build(
                    stage, block, folder / "tokenizer", chunks_of(source, origin), workers, folder / str(attempt)
                )
            ours.append((card["train"]["tokens"] + card["validation"]["tokens"]) / (time.process_time() - start))
    return {
        "encode_batch_fast": round(max(theirs)),
        "ours": round(max(ours)),
        "ratio": round(max(ours) / max(theirs), 3),
    }


def encode_all(engine: Tokenizer, texts: list[str]) -> int:
    """Encodes in batches of a thousand; returns the number of tokens."""
    return sum(
        len(encoding)
        for i in range(0, len(texts), 1000)
        for encoding in engine.encode_batch_fast(texts[i : i + 1000], add_special_tokens=False)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
