"""lm-eval's `--model_args` as a loaded model and options, in our names or those of the reference evaluators.

Knows names of settings; does not know requests.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llada_core.evaluation.answering import Answerer, Options
from llada_core.evaluation.kept import key_of_answers
from llada_core.evaluation.params import SAMPLER_FIELDS, Settings
from llada_core.evaluation.requests import OTHER_NAMES, TOKEN_LISTS, token_list
from llada_core.evaluation.worklist import AnswerStore, Shard
from llada_core.modeling import MaskPredictor, load_model, load_to_answer
from llada_core.modeling.place import checked_bits, processes_for
from llada_core.modeling.pretrained import need_of
from llada_core.settings import ConfigError, nearest
from llada_core.tokenizer import Tokenizer

AUTO_BATCH = 32
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What the reference evaluators also take and what means nothing here.
_SILENT = ("max_batch_size", "mask_id", "save_dir", "trust_remote_code", "parallelize")


def from_arguments(given: Mapping[str, Any]) -> tuple[Answerer, AnswerStore]:
    """What `--model_args` (and lm-eval's batch size and device) name; raises `ConfigError`."""
    values = {OTHER_NAMES.get(k, k): v for k, v in given.items() if k not in _SILENT}
    name = values.pop("pretrained", None) or values.pop("model_path", None)
    if not name:
        raise ConfigError("model_args lacks pretrained=FOLDER_OR_NAME")
    samples = values.pop("mc_num", None) or values.pop("samples", None)
    answers = values.pop("answers", None)
    dtype, device, bits = str(values.pop("dtype", "auto")), values.pop("device", None), values.pop("bits", None)
    model = load(str(name), dtype, str(device or "auto"), bits)
    options = {k: values.pop(k) for k in ("max_length", "seed", "patience") if k in values}
    batch, greedy = str(values.pop("batch_size", 1)), bool(values.pop("is_check_greedy", False))
    allowed = [
        *SAMPLER_FIELDS,
        "eos",
        "pretrained",
        "dtype",
        "device",
        "bits",
        "mc_num",
        "is_check_greedy",
        "answers",
        *options,
    ]
    for key in values:
        if key not in [*SAMPLER_FIELDS, "eos"]:
            raise ConfigError(f"model_args: unknown setting {key!r}{nearest(key, allowed)}")
    values |= {k: token_list(values[k]) for k in TOKEN_LISTS if k in values}
    settings = Settings(sampling=values, samples=samples, cfg_scale=values.get("cfg_scale"))
    size = AUTO_BATCH if batch.startswith("auto") else int(batch)
    answerer = Answerer(model, Tokenizer.load(str(name)), Options(settings, size, check_greedy=greedy, **options))
    if not answers:
        return answerer, AnswerStore()
    determining = {"dtype": dtype, "bits": bits, "settings": settings.model_dump(), "greedy": greedy}
    determining |= {key: value for key, value in options.items() if key != "patience"}
    return answerer, AnswerStore(Path(answers) / key_of_answers(str(name), determining), Shard.of_process())


def processes(folders: Sequence[Path], dtype: str, device: str = "auto", bits: int | None = None) -> int:
    """How many processes of this machine answer best with these models, one after the other."""
    return processes_for([need_of(folder, DTYPES[dtype], bits) for folder in folders], device, bits)


def load(name: str, dtype: str = "auto", device: str = "auto", bits: int | None = None) -> MaskPredictor:
    """The model, ready to answer, on this process's own GPU if there is one; raises `ConfigError` for another dtype.

    Of the device "meta" only its shapes.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}{nearest(dtype, list(DTYPES))}")
    if device == "meta":
        return load_model(name, device="meta")
    return load_to_answer(name, dtype=DTYPES[dtype], device=device, bits=checked_bits(device, bits))
