"""What a training stage will need, told before anything starts: memory of a GPU, disk, tokens, time; or a refusal.

All from shapes and settings, with full rows; no model is loaded, no data read.
"""

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llada_core.modeling.families import LoraParams
from llada_core.settings import ConfigError
from llada_core.training.params import GRPOParams, PreferenceParams, TrainingParams
from tasks.folders import write_json
from tasks.launch.launcher import launcher_for
from tasks.launch.plan_memory import (
    GIB,
    HERE,
    Asked,
    copies_of,
    estimate,
    machine_memory,
    memory_of,
    peak_of,
    room,
    shape_of,
    unknown_step,
)
from tasks.project import Params, Project, visible_gpus
from tasks.record.runs import RunFolder

FSDP = "distribution.kind: fsdp"


@dataclass(frozen=True)
class StageNeeds:
    """What a stage takes: bytes on each GPU by purpose, bytes on disk and per node, and how long it goes on."""

    parameters: int
    trained: int
    memory: dict[str, float]
    measured: bool  # the memory: from a step on tensors without memory, not by formula
    checkpoints: float
    exported: float
    host: float
    tokens: int  # of one step, at most
    steps: int | None
    flops: float | None

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def need(params: Params, stage: str, ranks: int, per_node: int = 1) -> StageNeeds:
    """The needs of a training stage on `ranks` GPUs."""
    from llada_core.training.progress import active_parameters, training_flops

    block = params.settled(stage, gpu=True)
    model, stored = shape_of(params, stage)
    active = active_parameters(model)
    if block.lora is not None:
        from llada_core.modeling import add_lora

        add_lora(model, block.lora)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
    rows, length, inference = work_of(params, stage)
    copies = copies_of(model, block, length)
    steps = steps_of(params, stage)
    flops = block.max_flops
    if block.flops_of is not None:
        flops = need(params, block.flops_of, ranks, per_node).flops
    elif steps is not None:
        flops = steps * training_flops(active, copies * rows * length, copies * inference)
    memory, measured = memory_of(asked_of(params, stage, ranks))
    moments = trained * (4 if block.optimiser == "muon" else 8)
    best = isinstance(block, GRPOParams) and block.keep_best
    kept = block.keep + 1 + best + (0 if not (block.milestone_every and steps) else steps // block.milestone_every)
    return StageNeeds(
        parameters=total,
        trained=trained,
        memory=memory,
        measured=measured,
        checkpoints=kept * (4 * trained + moments),
        exported=(trained * 4 if block.lora is not None and not block.lora.merge else total * stored),
        host=per_node * (4 * trained + stored * (total - trained)),
        tokens=rows * length,
        steps=steps,
        flops=flops,
    )


def asked_of(params: Params, stage: str, ranks: int) -> Asked:
    """The step of a stage whose memory is asked for."""
    rows, length, _ = work_of(params, stage)
    at_once = rows_at_once(params.training(stage), rows, ranks)
    return Asked(params.model_dump_json(), params, stage, ranks, at_once, length, accumulates=at_once * ranks < rows)


def place_of(params: Params, stage: str) -> str:
    """What a stage is planned for: launch.gpu, else this machine if it has no GPU and the run goes on here, else an H100.

    A run that starts from somebody's weights is planned for a GPU: it is described here and run elsewhere.
    """
    launch = params.launch.of(stage)
    small = launcher_for(launch).here and params.origin(stage) is None and not visible_gpus()
    return launch.gpu or (HERE if small else "H100")


def room_of(gpu: str, ranks: int) -> float:
    """Bytes that one rank may fill: those of its GPU, or its share of this machine's."""
    return room(gpu) / (ranks if gpu == HERE else 1)


def ranks_of(params: Params, stage: str) -> tuple[int, int]:
    """GPUs in all and on each node, as the stage's job would take them."""
    launcher = launcher_for(params.launch.of(stage))
    here = launcher.ranks_per_node(params.training(stage))
    return here * launcher.nodes, here


def script_of(params: Params, stage: str) -> str:
    """What the stage's job would run: the sbatch script, or the command line on this machine."""
    launcher = launcher_for(params.launch.of(stage))
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / f"{stage}-planned")
        run.path.mkdir()
        asked = {"stage": stage, "root": str(Path.cwd()), "all_params": params.model_dump(mode="json", by_alias=True)}
        write_json(run.path / "request.json", asked)
        return launcher.planned(launcher.script(run), run).replace(folder, str(Project.at().runs))


def work_of(params: Params, stage: str) -> tuple[int, int, float]:
    """Rows of one step, the longest they can be, and tokens that are only sampled or scored for that step."""
    block, part = params.training(stage), _rows_of(params, stage)
    if part is None:
        raise ConfigError(f"{stage} reads data.{block.ROWS}, which this run does not describe: no length to plan with")
    if isinstance(block, GRPOParams):
        rows, asked = (
            block.prompts * block.generations * block.mask_copies,
            min(part.length, block.max_prompt_length or part.length),
        )
        length = asked + block.sampling.max_new_tokens
        share = 1 / block.iterations  # of a rollout, and of the scores of the updates that follow it
        sampled = block.prompts * block.generations * length * block.sampling.steps * share
        scored = rows * length * (1 - share + (block.beta > 0))
        return rows, length, sampled + scored
    if isinstance(block, PreferenceParams):
        rows = 2 * block.batch_size * block.mask_samples
        return rows, part.length, rows * part.length
    return block.batch_size, part.length, 0.0


def _rows_of(params: Params, stage: str) -> Any:
    """The block of the data that a stage trains on, None where this run does not describe it."""
    return None if params.data is None else params.data.parts.get(params.training(stage).ROWS)


def rows_at_once(block: TrainingParams, rows: int, ranks: int) -> int:
    """Rows in one forward and backward pass of a rank."""
    copies = block.mask_samples if isinstance(block, PreferenceParams) else 1
    if isinstance(block, GRPOParams):
        copies = block.mask_copies
    pairs = 2 if isinstance(block, PreferenceParams) else 1
    return min(block.micro_batch_size * copies * pairs, rows) if block.micro_batch_size else -(-rows // ranks)


def steps_of(params: Params, stage: str) -> int | None:
    """Updates of the whole run; None where only the data or a number of FLOPs tells."""
    block, part = params.training(stage), _rows_of(params, stage)
    if block.max_steps is not None or block.epochs is None or part is None or not part.sources:
        return block.max_steps
    if any(source.limit is None for source in part.sources):
        return None
    there = sum(source.limit * source.weight for source in part.sources) * (1 - part.validation)
    epoch = there // block.prompts * block.iterations if isinstance(block, GRPOParams) else there // block.batch_size
    return max(1, round(block.epochs * epoch))


def figures(params: Params, stage: str, gpu: str, mfu: float) -> dict[str, Any]:
    """The needs for programs: bytes, numbers, FLOPs and hours, None where only the data or a number of FLOPs tells."""
    ranks, per_node = ranks_of(params, stage)
    allowed, needs = room_of(gpu, ranks), need(params, stage, ranks, per_node)
    hours = None if needs.flops is None else needs.flops / (ranks * peak_of(gpu) * mfu) / 3600
    known = hours if hours == hours else None  # nan where the memory of a GPU alone was given
    return {"stage": stage, "gpu": gpu, "ranks": ranks, "room": allowed, "total": needs.total, "hours": known} | asdict(
        needs
    )


def told(params: Params, stage: str, gpu: str, mfu: float) -> str:
    """The needs in words."""
    ranks, per_node = ranks_of(params, stage)
    allowed = room_of(gpu, ranks)  # a GPU that is not known is told first
    needs = need(params, stage, ranks, per_node)
    unit, size = _unit(needs.total)
    parts = ", ".join(f"{name} {value / size:.1f}" for name, value in needs.memory.items() if value >= size / 20)
    how = "a training step run on tensors without memory" if needs.measured else "by formula"
    if (unknown := unknown_step(params.training(stage))) is not None:
        how = f"by formula, as of the diffusion loss: {unknown} has no fullest_step that says what it holds"
    lines = [
        f"{stage}: {needs.parameters:,} parameters, {needs.trained:,} of them trained, on {_where(gpu, ranks)}",
        f"  memory of a {'process' if gpu == HERE else 'GPU'} ({unit}; {how}): {parts}:"
        f" {needs.total / size:.1f} of {allowed / GIB:.1f}{' GiB' * (size != GIB)}",
        _disk(needs),
    ]
    if needs.flops is None:
        return "\n".join([*lines, f"  at most {needs.tokens:,} tokens per step; how many steps, the data will tell"])
    hours = needs.flops / (ranks * peak_of(gpu) * mfu) / 3600
    time = (
        f"{hours:.1f} h at an MFU of {mfu:.0%}"
        if hours == hours  # not nan
        else f"how long, {'the run will tell' if gpu == HERE else 'the memory of a GPU does not say'}"
    )
    steps = "" if needs.steps is None else f"{needs.steps:,} steps, "
    return "\n".join(
        [
            *lines,
            f"  at most {needs.tokens:,} tokens per step; {steps}{needs.flops:.2g} FLOPs: {time}",
        ]
    )


def _disk(needs: StageNeeds) -> str:
    """The row of what a stage writes, and of what a node reads at its start."""
    unit, size = _unit(needs.checkpoints)
    return (
        f"  disk ({unit}): checkpoints {needs.checkpoints / size:.1f}, exported model {needs.exported / size:.1f};"
        f" memory of a node at start {needs.host / size:.1f}"
    )


def _unit(largest: float) -> tuple[str, int]:
    """The name and bytes of the unit in which a row is told whose largest number this is; a small model's are MiB."""
    return ("GiB", GIB) if largest >= GIB else ("MiB", 2**20)


def _where(gpu: str, ranks: int) -> str:
    if gpu != HERE:
        return f"{ranks} x {gpu}"
    processes = f"{ranks} process{'es' * (ranks > 1)}"
    return f"{processes} of this machine ({os.cpu_count()} cores, {machine_memory() / GIB:.0f} GiB of memory, no GPU)"


def refuse(params: Params, stage: str, gpu: str) -> None:
    """Raises `ConfigError`, with what would help, for a stage that does not fit its GPUs or does not divide over them."""
    ranks, _ = ranks_of(params, stage)
    try:
        params.training(stage).share(ranks)
    except ValueError as error:
        raise ConfigError(f"{stage}: {error}") from None
    total = need(params, stage, ranks).total
    if total > room_of(gpu, ranks):
        ways = "; ".join(remedies(params, stage, ranks, gpu)) or "fewer tokens at once, a smaller model"
        lacks = (
            f"{stage} needs {total / GIB:.1f} GiB of a {'process' if gpu == HERE else 'GPU'}, "
            f"a plan may fill {room_of(gpu, ranks) / GIB:.1f} of {_where(gpu, ranks)}"
        )
        raise ConfigError(f"{lacks}; it would fit with {ways}")


def remedies(params: Params, stage: str, ranks: int, gpu: str) -> list[str]:
    """Changes of one or two settings with which the stage would fit, each with its GiB on a GPU."""
    block = params.settled(stage, gpu=True)
    light: dict[str, object] = {"activation_checkpointing": True, "micro_batch_size": 1}
    lora, four = LoraParams(merge=False), LoraParams(four_bit=True, merge=False)
    far = block.distribution.model_copy(update={"offload": True})
    sharded = block.distribution.model_copy(update={"kind": "fsdp", "processes": None})
    tries: list[tuple[str, dict[str, object], int]] = [
        ("activation_checkpointing: true", light | {"micro_batch_size": block.micro_batch_size}, ranks),
        ("activation_checkpointing: true and micro_batch_size: 1", light, ranks),
        ("lora: {merge: false}", light | {"lora": lora}, ranks),
        ("lora: {four_bit: true, merge: false}", light | {"lora": four}, ranks),
        ("distribution.offload: true", light | {"distribution": far}, ranks),
        *((f"{FSDP} on {n} GPUs", light | {"distribution": sharded}, n) for n in (2, 4, 8, 16, 32, 64)),
    ]
    found: list[str] = []
    for text, changes, count in tries:
        enough = FSDP in text and any(FSDP in one for one in found)  # more GPUs fit as well
        if count < ranks or enough or (block.lora is not None and "lora" in changes and "four_bit" not in text):
            continue
        other = block.model_copy(update=changes)
        try:
            type(block).model_validate(other.model_dump(), strict=False)
        except ValueError:  # what would fit, but is refused together with the stage's other settings
            continue
        changed = params.model_copy(update={stage: other})
        if estimate(asked_of(changed, stage, count)) > room(gpu):
            continue
        total = need(changed, stage, count).total
        if total <= room(gpu):
            found.append(f"{text} ({total / GIB:.1f} GiB)")
    return found
