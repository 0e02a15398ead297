"""What a GPU holds while it trains: the real training step, run on tensors that have shapes and lifetimes but no memory.

torch's FakeTensorMode runs every operation for its shapes alone, MemTracker adds up what is alive. So this sees what a
count by hand forgets: what autograd keeps, casts, chunks, gathered shards. Not seen: what a kernel takes for itself,
the allocator's fragments, CUDA's context.

The pretended tensors lie on the CPU, since a build of torch without CUDA cannot even slice pretended CUDA tensors.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import _disable_current_modes

from llada_core.data.batches import Batch
from llada_core.modeling import MaskPredictor
from llada_core.modeling.attention import BlockCausal
from llada_core.modeling.predictor import Prediction
from llada_core.settings import function_at
from llada_core.training.accelerator import optimiser_for, precision_policy
from llada_core.training.grpo import GRPO, PolicyData
from llada_core.training.objectives import DiffusionObjective, Loss
from llada_core.training.params import GRPOParams, PreferenceParams, SFTParams, TrainingParams
from llada_core.training.preference import PairBatch, Preference

_NAMES = {
    "weights": ("Parameter", "Buffer"),
    "gradients": ("Gradient",),
    "optimiser": ("Optstate",),
    "activations": ("Activation",),
    "temporary": ("Temp", "Other"),
}


Case = tuple[Any, Any]  # an objective, and a micro-batch that its `loss` takes
Step = Callable[[Any, MaskPredictor, int, int], Case]


def case_of(params: TrainingParams) -> Step | None:
    """What makes the step to be run, of (params, model, rows, length); None where the objective does not say.

    An objective of one's own says it by a function `fullest_step` beside the one that `OBJECTIVE` names.
    """
    known: dict[str, Step] = {
        SFTParams.OBJECTIVE: _diffusion,
        GRPOParams.OBJECTIVE: _policy,
        PreferenceParams.OBJECTIVE: _preference,
    }
    if params.OBJECTIVE in known:
        return known[params.OBJECTIVE]
    return getattr(sys.modules[function_at(params.OBJECTIVE, "objective").__module__], "fullest_step", None)


def footprint(
    model: MaskPredictor, params: TrainingParams, rows: int, length: int, *, ranks: int = 1, accumulates: bool = False
) -> dict[str, dict[str, float]]:
    """Bytes at the fullest moment of each part of a step (forward, backward, update) of one GPU, by purpose.

    model: on the meta device, weights in the dtypes and with the adapters that they train with; it is changed. rows x
    length tokens go through a forward, every one of them hidden that can be. `ranks` share the model where
    `params.distribution` is fsdp. `accumulates`: gradients of an earlier micro-batch are there. Made for the kinds none,
    ddp (whose buckets are not counted) and fsdp (whose offload is not). Raises `ValueError` for an objective that does not
    say what its step is (`case_of`).
    """
    if (case := case_of(params)) is None:
        raise ValueError(f"objective {params.OBJECTIVE} does not say what a step of it holds: give it a fullest_step")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    sharded = params.distribution.kind == "fsdp"
    with _pretended_ranks(ranks if sharded else 1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copies of pretended tensors, and transformers' next names for what it has
        with mode:
            _give_shapes(model)
        objective, batch = case(params, model, rows, length)
        pretence = _Pretence(mode, _Tracker())
        wrapped = _Pretended(model, pretence, low=params.precision == "bf16")
        frozen = getattr(getattr(objective, "reference", None), "copied", None)
        if params.activation_checkpointing:
            model.network.gradient_checkpointing_enable({"use_reentrant": False})
        if sharded:
            _shard(model, params, ranks)
        with mode:
            optimiser = optimiser_for(model.train(), params)
            trained = [p for p in model.parameters() if p.requires_grad]
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            optimiser.step()  # from here on there are moments
            if not accumulates:
                optimiser.zero_grad(set_to_none=True)
        pretence.tracker.track_external(model, optimiser, *([] if frozen is None else [frozen]))
        if frozen is not None:
            objective.reference.copied = _Pretended(frozen, pretence, low=False)
        found = {}
        with pretence.shapes_only():
            # The objective counts and picks hidden positions on the CPU, which takes their values.
            with _disable_current_modes():
                loss: Loss = objective.loss(wrapped, batch)
            found["forward"] = _fullest(pretence.tracker)
            (loss.sum if loss.extra is None else loss.sum + loss.extra).backward()
            found["backward"] = _fullest(pretence.tracker)
            if (
                not sharded
            ):  # there it takes little, and DTensor would work out its shapes with whole tensors, all counted
                torch.nn.utils.clip_grad_norm_(trained, params.clip)
            optimiser.step()
            found["update"] = _fullest(pretence.tracker)
        return found


class _Tracker(MemTracker):
    """One that takes frozen weights too (torch's wants to be told of every weight's gradient)."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        trains = all(parameter.requires_grad for parameter in module.parameters())  # else each of its parts is asked
        return super()._track_module_params_and_buffers(module, install_grad_hooks and trains)

    def _update_peak_stats(self, peak_state: Any) -> None:
        """After every operation, and therefore without the peaks of single modules."""
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)


@dataclass(frozen=True)
class _Pretence:
    """The two modes of a pretended step."""

    mode: FakeTensorMode
    tracker: MemTracker

    @contextmanager
    def shapes_only(self) -> Iterator[None]:
        """While it lasts every operation, new tensors included, runs for its shapes alone and is tracked."""
        with self.mode, self.tracker:  # in this order: the tracker counts what runs in the mode that it found
            yield


class _Pretended(nn.Module):
    """A model whose forward is given real ids and runs for its shapes alone, in the precision that the loop gives it."""

    def __init__(self, model: nn.Module, pretence: _Pretence, *, low: bool) -> None:
        super().__init__()
        self.model, self._pretence, self._low = model, pretence, low

    def to(self, device: torch.device) -> "_Pretended":  # type: ignore[override]
        """Stays: pretended weights lie nowhere, and torch cannot exchange them in place."""
        return self

    def __call__(  # noqa: PLR0913 - as the model; not forward, whose hooks the tracker would follow
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
        router_losses: bool = False,
        block_causal: BlockCausal | None = None,
        certainty: bool = False,
    ) -> Any:
        """As the model's; no mask, since rows of full length have no padding.

        By blocks a GPU's FlexAttention keeps what its plain attention keeps of rows as wide; a CPU's way keeps more.

        A reference is not run: without gradients it holds less than the policy, before which it has gone.
        """
        if not torch.is_grad_enabled():
            assert targets is not None
            return Prediction(nll=self._pretence.mode.from_tensor(torch.zeros(len(targets))))
        given = [None if x is None else self._pretence.mode.from_tensor(x) for x in (input_ids, positions, targets)]
        with self._pretence.shapes_only(), torch.autocast("cpu", torch.bfloat16, enabled=self._low):
            return self.model(
                given[0], None, positions=given[1], targets=given[2], router_losses=router_losses, certainty=certainty
            )


def _give_shapes(model: nn.Module) -> None:
    """Pretended weights in place of meta ones, which no optimiser takes; tied ones stay tied."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(
                    torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad
                )
            module.register_parameter(name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty_like(buffer, device="cpu"))


def _diffusion(params: TrainingParams, model: MaskPredictor, rows: int, length: int) -> Case:
    """Everything hidden, in the shortest blocks of all steps."""
    objective = DiffusionObjective(model, None, None, params, seed=0)  # type: ignore[arg-type]
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), None, None, torch.arange(rows))
    shortest = objective.blocks.shortest(objective.block_length)
    return objective, objective.hide(batch, torch.ones(rows), torch.zeros(rows, length), shortest)


def _policy(params: GRPOParams, model: MaskPredictor, rows: int, length: int) -> Case:
    """The first update on a rollout, under the masks that it draws."""
    policy = GRPO(model, PolicyData([0] * params.prompts, [], None, _no_reward), params, seed=0)  # type: ignore[arg-type]
    policy.load_state(_rollout(params, rows, length))
    return policy, policy.work(model, 0, 0, 1).batches[0]


def _preference(params: PreferenceParams, model: MaskPredictor, rows: int, length: int) -> Case:
    """Pairs that are answer from the first token to the last, under the masks that they draw."""
    pairs = 2 * max(1, rows // (2 * params.mask_samples))
    tokens = torch.zeros(pairs, length, dtype=torch.int64)
    batch = PairBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), tokens + 1, torch.arange(pairs), 0)
    return Preference(model, [0] * params.batch_size, [], params, seed=0), batch  # type: ignore[arg-type]


def _no_reward(task: str, text: str, answer: Mapping[str, Any]) -> float:
    return 0.0


def _rollout(params: GRPOParams, rows: int, length: int) -> dict[str, Tensor]:
    """What a checkpoint would hold: completions that are scored to their end, a token a step."""
    count = max(1, rows // params.mask_copies)
    tokens, written = torch.zeros(count, length, dtype=torch.int64), torch.arange(length)
    late = (written >= length - params.sampling.max_new_tokens).expand(count, length)
    state = {
        "tokens": tokens,
        "attention": tokens + 1,
        "scored": late,
        "written": late,
        "advantages": torch.ones(count),
        "when": torch.where(late, written, -1),
    }
    return {f"rollout.{name}": x for name, x in state.items()} | {"number": torch.tensor([0])}


def _shard(model: MaskPredictor, params: TrainingParams, ranks: int) -> None:
    """As accelerate does: block by block, then what is around them."""
    mesh, policy = init_device_mesh("cpu", (ranks,)), precision_policy(params)
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@contextmanager
def _pretended_ranks(count: int) -> Iterator[None]:
    """This process as the first of `count` that answer at once, with nothing."""
    if count == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _fullest(tracker: MemTracker) -> dict[str, float]:
    """Bytes by purpose at the fullest moment since the last call."""
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    tracker._peak_mem.clear()  # the tracker itself only knows the fullest moment of all
    return {name: float(sum(snapshot[kind] for kind in kinds)) for name, kinds in _NAMES.items()}
