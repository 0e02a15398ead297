"""Settings that do not go together, as people combine them: refused in one line that says what to use instead.

A new case from a bug report is a line of the table.
"""

import pytest

from llada_core.settings import ConfigError
from tasks.project import Params

LORA = {"max_steps": 1, "optimiser": "muon"}
REFUSED = [
    ("sft", LORA | {"lora": {}}, "optimiser muon .* use optimiser: adamw, or leave out lora"),
    ("sft", LORA | {"lora": {"r": 2, "merge": False}}, "use optimiser: adamw"),
    ("sft", LORA | {"lora": {"four_bit": True, "merge": False}}, "use optimiser: adamw"),
    ("sft", LORA | {"lora": {"modules_to_save": ["wte"]}}, "use optimiser: adamw"),
    ("pretrain", LORA | {"lora": {"targets": ["q_proj"]}}, "use optimiser: adamw"),
    ("grpo", LORA | {"beta": 0.0, "lora": {"bias": "lora_only"}}, "use optimiser: adamw"),
    ("sft_control", LORA | {"lora": {}}, "use optimiser: adamw"),
    ("preference", LORA | {"lora": {}, "distribution": {"kind": "ddp"}}, "use optimiser: adamw"),
]


@pytest.mark.parametrize(("stage", "block", "line"), REFUSED)
def test_what_does_not_go_together_says_what_to_use(stage: str, block: dict, line: str) -> None:
    values = {"name": "toy", "stages": [stage], stage: {"init_from": "owner/name", **block}}
    with pytest.raises(ConfigError, match=f"^params.yaml: {stage}: .*{line}"):
        Params.parse(values, "params.yaml")
    values[stage]["optimiser"] = "adamw"
    Params.parse(values, "params.yaml")
