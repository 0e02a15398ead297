"""What every training stage does inside its job: model and data in, trained model, receipt and curves out.

The working directory is the run's snapshot. Knows neither launchers nor the objective of a stage.
"""

from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llada_core.sampling.params import SamplingParams
from llada_core.settings import ConfigError, while_imported
from llada_core.training.params import GRPOParams, TrainingParams
from llada_core.usage import Usage
from tasks.errors import StageError, StoppedError
from tasks.folders import read_json, write_json
from tasks.project import Project
from tasks.record.registry import keep_base, lasting_name
from tasks.record.runs import StageContext, rank, verify_inputs
from tasks.stages import TRAINING_STAGES

if TYPE_CHECKING:
    from llada_core.tokenizer import Tokenizer

READ, EXAMPLES, LONGEST_ANSWER = 10_000, 6, 1024  # rows of the data, questions of them, tokens of an answer
# What differs from machine to machine, and so must not be in an output that DVC hashes.
TIMINGS = ("_per_second", "seconds", "time", "memory_gb", "mfu", "step", "tokens", "flops", "share")


def train_stage(work: StageContext) -> float:
    """Train, or go on; writes models/<stage> and reports/training/<stage>.*; returns the seconds it took in all."""
    params = _settled(work)
    verify_inputs(work)
    with while_imported():
        from llada_core.tokenizer import Tokenizer
        from llada_core.training.train import RunPaths, train
    tokenizer = Tokenizer.load(Path("data/tokenizer"))
    model = _model(work, params, tokenizer)
    base = "" if params.lora is None else _base(work, params)
    place = RunPaths(data=Path("data"), run=work.run.path, export=Path("models") / work.stage, base=base)
    receipt = train(params, model, tokenizer, place, seed=work.params.seed, follow=work.follow)
    if not receipt.finished:
        raise StoppedError(f"{work.stage}: stopped at step {receipt.steps}, saved; the same command goes on from there")
    if rank() == 0:
        try:
            _write_receipts(work, {"steps": receipt.steps, "tokens": receipt.tokens, "flops": receipt.flops})
            block_length = (params.blocks and params.blocks.length) or model.block_length
            if usage := learnt_usage(params, tokenizer, Path("data") / params.ROWS, block_length):
                usage.save(Path("models") / work.stage)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise StageError(
                f"{work.stage}: trained and exported, but its receipts failed: {' '.join(str(error).split())}; the same "
                "command writes them without training again"
            ) from error
    return receipt.seconds


def _settled(work: StageContext) -> TrainingParams:
    """The stage's block without a question left: `flops_of` is the number that the other stage's receipt gives, and what
    depends on the machine is as the run's first job was submitted, also where a later one runs on another machine.
    """
    from llada_core.training.accelerator import rank_device

    params = work.params.settled(work.stage, gpu=rank_device().type != "cpu")
    if work.params.training(work.stage).precision == "auto":
        params = params.model_copy(update=work.run.request.get("machine", {}))
    if rank() == 0 and (told := _taken(work, params)):
        print(told, flush=True)
    if params.flops_of is None:
        return params
    spent = read_json(Path("models") / params.flops_of / "training.json")["flops"]
    return params.model_copy(update={"flops_of": None, "max_flops": spent})


def _taken(work: StageContext, params: TrainingParams) -> str:
    """Which of the settings that follow the start nobody gave, what was taken for them, and why; empty if none."""
    given, origin = work.run.request["all_params"].get(work.stage, {}), work.params.origin(work.stage)
    elsewhere = f"weights trained elsewhere ({origin})"
    taken = []
    if "learning_rate" not in given:
        taken.append(f"learning_rate {params.learning_rate:g} for {elsewhere if origin else 'weights of this run'}")
    if given.get("precision", "auto") == "auto":
        why = (
            f"{elsewhere} {'on' if params.precision == 'bf16' else 'without'} a GPU"
            if origin
            else "weights of this run"
        )
        taken.append(f"precision {params.precision} for {why}")
    return f"{work.stage}: {', '.join(taken)}" if taken else ""


def _model(work: StageContext, params: TrainingParams, tokenizer: Any) -> Any:
    from llada_core.modeling import load_model, new_model
    from llada_core.training.accelerator import loading_device

    if params.init_from is not None:
        quantised = params.lora is not None and params.lora.four_bit
        double = params.lora is not None and params.lora.double_quant
        return load_model(
            _source(params.init_from), bits=4 if quantised else None, double_quant=double, device=loading_device(params)
        )
    if work.params.model is None:
        raise ConfigError(f"{work.stage}.init_from is empty and params.yaml has no block 'model'")
    return new_model(work.params.model, tokenizer.vocab_size, tokenizer.special, work.params.seed)


def _source(init_from: str) -> Path:
    """The folder that training starts from: another stage's output, or one from outside."""
    return Path("models") / init_from if init_from in TRAINING_STAGES else Path(init_from)


def _base(work: StageContext, params: TrainingParams) -> str:
    """How the adapter names what it starts from; kept before training, so that nothing is missing after it."""
    assert params.lora is not None
    if params.init_from is None:
        raise ConfigError(f"{work.stage}.lora adapts a model, and {work.stage}.init_from names none")
    source = _source(params.init_from)
    name = lasting_name(source, work.run.request["inputs"][str(source)])
    if rank() == 0:
        # A merged model needs its base no more; the adapter beside it is only for a merge that failed.
        keep_base(Project.at(work.run.path.parents[1]), source, name, copy=not params.lora.merge)
    return name


def _write_receipts(work: StageContext, spent: dict[str, Any]) -> None:
    from llada_core.modeling.folder import weight_distance
    from llada_core.training.progress import read_metrics

    lines = read_metrics(work.run.path / "metrics.jsonl")
    last = {key: value for line in lines for key, value in line.items() if _is_result(key, value)}
    if source := work.params.training(work.stage).init_from:
        last["weight_change"] = weight_distance(_source(source), Path("models") / work.stage)
    if differ := [line["groups_differ"] for line in lines if "groups_differ" in line]:
        last["groups_differ"] = sum(differ) / len(differ)  # of the whole training, not of its last rollout
    origin = {"stage": work.stage, "run": work.run.key, "inputs": work.run.request["inputs"]}
    write_json(Path("models") / work.stage / "training.json", origin | spent)
    write_json(Path("reports/training") / f"{work.stage}.json", last | spent)
    draw_curves(lines, Path("reports/training") / f"{work.stage}.png")


def learnt_usage(
    params: TrainingParams, tokenizer: "Tokenizer", data: Path, block_length: int | None = None
) -> Usage | None:
    """How a model that was trained on `data` is to be asked; None where it learnt no dialogues.

    Reinforcement learning says how it sampled; else one block has room for the longest reply of the first `READ` rows, or
    blocks of `block_length` have, written by the sampler that the model had or by LLaDA2.0's.
    Turns are told by how often a row opens a reply. The system prompt is that of the model it starts from, as are its
    example questions where the data keep none.
    """
    from datasets import load_from_disk

    before = None if params.init_from is None else Usage.load(_source(params.init_from))
    rows = load_from_disk(str(data / "train"))
    asked = next((name for name in ("maskable", "prompt_ids") if name in rows.column_names), None)
    if asked is None or not isinstance(tokenizer.fast.chat_template, str):
        return before
    rows = rows.select(range(min(READ, len(rows)))).with_format("numpy")
    opening = _reply_opening(tokenizer)
    shown = rows["input_ids" if asked == "maskable" else "prompt_ids"]
    several = any(np.asarray(ids, np.int64).tobytes().count(opening) > 1 for ids in shown)
    usage = (before or Usage()).model_copy(update={"turns": "multi" if several else "single"})
    if kept := (read_json(data / "card.json") if (data / "card.json").is_file() else {}).get("examples"):
        usage = usage.model_copy(update={"examples": tuple(kept)})
    if isinstance(params, GRPOParams):
        questions = tuple(dict.fromkeys(str(text) for text in rows["prompt"][:EXAMPLES]))
        sampling = params.validation or replace(params.sampling, temperature=0.0)
        return usage.model_copy(update={"sampling": sampling, "examples": questions})
    replies = [_longest_run(row) for row in rows["maskable"]] if asked == "maskable" else map(len, rows["chosen_ids"])
    room = min(max(replies), LONGEST_ANSWER)
    own = usage.sampling  # a sampler that its family has goes on with it, in the blocks that it learnt
    sampling = own.at_length(room) if own.sampler is not None else SamplingParams(room, room, room, stop_at_eos=True)
    if block_length is not None and own.sampler is not None:
        sampling = replace(sampling, block_length=block_length, steps=block_length)
    elif block_length is not None:
        sampling = SamplingParams(
            room, block_length, block_length, sampler="llada2.0", threshold=0.95, cache="prefix", stop_at_eos=True
        )
    return usage.model_copy(update={"sampling": sampling})


def _reply_opening(tokenizer: "Tokenizer") -> bytes:
    """The ids between a question and its reply, as int64: what prompts with different questions end with."""
    one, other = (tokenizer.chat_ids([{"role": "user", "content": text}])[::-1] for text in ("1", "b"))
    ending = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
    return np.asarray(ending[::-1], np.int64).tobytes()


def _longest_run(row: Any) -> int:
    """The longest run of ones in a row (L,) of 0 and 1."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(row, np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=1))


def draw_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """One small plot for each thing that was measured more than once; the same metrics give the same file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if _is_result(key, value):
                curves.setdefault(key, []).append((line["step"], value))
    names = sorted(key for key, points in curves.items() if len(points) > 1) or sorted(curves)
    rows = max(1, -(-len(names) // 3))
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, 3, number + 1)
        axes.plot(*zip(*curves[name], strict=True), marker="." if len(curves[name]) < 30 else "")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})


def _is_result(key: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and key not in TIMINGS and not key.endswith(TIMINGS[0]) and key != "back_to"
