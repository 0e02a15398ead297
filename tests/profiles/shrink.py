"""A profile of an 8B model on many GPUs as the same profile at tiny width on two ranks: everything else stays."""

import json
from pathlib import Path
from typing import Any

from llada_core.settings import read_yaml
from tasks.project import Params
from tasks.stages import TRAINING_STAGES
from tests.tiny import tiny_tokenizer

PROFILES = Path(__file__).parents[2] / "profiles"
SMALL = {"max_steps": 2, "batch_size": 8, "micro_batch_size": 2, "validation_rows": 4, "samples": 0, "save_every": 2}
GROUPS = {
    "prompts": 2,
    "generations": 2,
    "iterations": 2,
    "micro_batch_size": 2,
    "reward": "tests.profiles.shrink.told",
}
SAMPLING = {"max_new_tokens": 8, "block_length": 4, "steps": 4}
LENGTHS = {"pretrain": 32, "sft": 96, "grpo": 256}


def told(task: str, text: str, answer: dict[str, Any]) -> float:
    """A reward that tells a random model's completions apart: the published ones give all of them nothing, and then
    a profile without a KL term has nothing to learn."""
    return float(sum(map(ord, text)) % 97)


def shrunk(name: str, root: Path, processes: int = 2) -> Params:
    """The profile with the tiny tokenizer, short rows, few steps and `processes` ranks; its sources lie in `root`."""
    values = read_yaml(PROFILES / f"{name}.yaml")
    data = values["data"] | {"root": str(root), "workers": 1, "tokenizer": {"name": str(root / "tokenizer")}}
    for stage in LENGTHS.keys() & data.keys():
        sources = [source | {"limit": 40, "streaming": False} for source in data[stage]["sources"]]
        data[stage] = data[stage] | {"length": LENGTHS[stage], "validation": 0.2, "sources": sources}
    values["data"] = data
    for stage in (s for s in TRAINING_STAGES if s in values):
        block: dict[str, Any] = {k: v for k, v in values[stage].items() if k not in ("epochs", "init_from")} | SMALL
        if stage == "grpo":
            block |= GROUPS | {"sampling": block["sampling"] | SAMPLING}
        if block.get("lora"):
            block["lora"] = block["lora"] | {"r": 4, "four_bit": False}  # which needs a GPU
        if "distribution" in block:
            # Offloading pins memory, which needs a GPU.
            block["distribution"] = block["distribution"] | {"processes": processes, "offload": False}
        values[stage] = block
    values["model"] = {"d_model": 32, "n_layers": 2, "n_heads": 4}
    values["launch"] = {"processes": processes}
    return Params.parse(values, name)


def write_sources(root: Path) -> Path:
    """The profiles' data sets below a data root, in their authors' columns, and the tiny tokenizer."""
    tiny_tokenizer().save(root / "tokenizer")
    texts = [f"{i} and {i + 1}" for i in range(60)]
    messages = [[{"role": "user", "content": t}, {"role": "assistant", "content": t[::-1]}] for t in texts]
    rows = {
        "alpaca": [{"instruction": t, "input": "", "output": t[::-1]} for t in texts],
        "tulu-3-sft-mixture": [{"messages": m} for m in messages],
        "dclm": [{"text": f"{t}. " * 4} for t in texts],
        "gsm8k": [{"question": t, "answer": f"<<1+1=2>>so #### {i}"} for i, t in enumerate(texts)],
    }
    for name, lines in rows.items():
        (root / name).mkdir(parents=True)
        (root / name / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows["tulu-3-sft-mixture"]))
    return root
