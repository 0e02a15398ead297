"""Low-rank adapters on a mask predictor, through peft: added, stored, loaded, switched off, merged.

Stored adapters have peft's own format and the published parameter names.
"""

import contextlib
import copy
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llada_core.files import written_whole
from llada_core.modeling.block import Experts, LowRank
from llada_core.modeling.families import LoraParams
from llada_core.modeling.fused import unfuse_projections
from llada_core.modeling.predictor import MaskPredictor, SavesItself
from llada_core.settings import require_package

_log = logging.getLogger(__name__)
_WEIGHTS, _PREFIX = "adapter_model.safetensors", "base_model.model."
# Rounding errors of that share of the changes: the typical change is then smaller than one unit in the last place.
_NOTABLE = 0.3


def add_lora(model: MaskPredictor, params: LoraParams, seed: int = 0) -> None:
    """Puts trainable low-rank adapters, random by `seed` alone, on the target layers and freezes everything else.

    targets: "all-linear" (every linear layer of the blocks, never head or router), a regular expression on whole
    module names, or module names. experts: routed experts too, each with factors of its own. modules_to_save: names of
    modules outside of the adapted layers, which train whole, as copies. `ValueError` names a target or module that matches
    nothing, or experts or biases that the network does not have.
    """
    require_package("peft", "train", "an adapter")
    from peft import LoraConfig

    network = model.network
    _require_bare(network)
    if params.experts and not any(isinstance(module, Experts) for module in network.modules()):
        raise ValueError(f"lora.experts: there are no routed experts in {type(network).__name__}; use experts: false")
    config = LoraConfig(
        r=params.r,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=_target_pattern(model, params.targets) if params.targets else [],
        target_parameters=["experts.gate_up", "experts.down"] if params.experts else None,
        bias=params.bias,
        modules_to_save=_whole_modules(model, params) or None,
    )
    shapes_alone = all(
        parameter.is_meta for parameter in network.parameters()
    )  # of a plan: adapters take no memory too
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(config, network, shapes_alone=shapes_alone)
    network.peft_config = {"default": config}
    if params.bias != "none" and not any(
        p.requires_grad and n.endswith(".bias") for n, p in network.named_parameters()
    ):
        raise ValueError(
            f"lora.bias {params.bias}: there are no such biases in {type(network).__name__}; use bias: none"
        )


def _inject(config: Any, network: Any, *, shapes_alone: bool = False) -> None:
    """Adapters as peft makes them; those of experts' tables are multiplied with rows here, not added into the tables."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora.layer import ParamWrapper

    class OnRows(ParamWrapper):
        """One around the other, they hand what they add to the experts inside, which peft's own would copy."""

        def forward(
            self, x: Tensor, experts: Tensor, weights: Tensor, changes: Mapping[str, LowRank] | None = None
        ) -> Any:
            if self.disable_adapters or self.merged:
                return self.base_layer(x, experts, weights, changes)
            down, up = (layer["default"].weight for layer in (self.lora_A, self.lora_B))
            # Two matrices of peft's: A (E R, I), expert by expert, and B (O, R E), whose neighbours are of other experts.
            up = up.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)
            own = LowRank(down.unflatten(0, (self.num_experts, -1)), up, self.scaling["default"])
            return self.base_layer(x, experts, weights, {**(changes or {}), self.parameter_name: own})

    inject_adapter_in_model(config, network, low_cpu_mem_usage=shapes_alone)
    for _, layer in _adapted(network):
        if type(layer) is ParamWrapper:
            layer.__class__ = OnRows


def linear_layers(model: MaskPredictor) -> list[str]:
    """Names of the linear layers inside the blocks: what "all-linear" adapts; head and router are none of them."""
    network = model.network
    head = network.get_output_embeddings()
    body = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and module is not head and re.search(r"\.\d+\.", name)
    ]
    return [name for name in body if not name.endswith("mlp.gate")]


def _target_pattern(model: MaskPredictor, targets: str | tuple[str, ...]) -> str:
    names = linear_layers(model)
    if targets == "all-linear":
        last = sorted({name.rpartition(".")[2] for name in names})
        return rf".*\.\d+\.(.*\.)?({'|'.join(last)})"
    patterns = [targets] if isinstance(targets, str) else [rf"(.*\.)?{re.escape(t)}" for t in targets]
    for target, pattern in zip([targets] if isinstance(targets, str) else targets, patterns, strict=True):
        if not any(re.fullmatch(pattern, name) for name in names):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ValueError(f"adapter target {target!r} matches no linear layer of the blocks; they are: {known}")
    # a bare name such as ff_out is the head's too: only layers of the blocks may match
    return rf"(?=.*\.\d+\.)({'|'.join(patterns)})"


def _whole_modules(model: MaskPredictor, params: LoraParams) -> list[str]:
    """Full names of the modules that train whole; in the blocks `ff_out` is a layer, outside of them it is the head."""
    network, adapted = model.network, set(linear_layers(model))
    if params.experts:
        adapted |= {name for name, module in network.named_modules() if isinstance(module, Experts)}
    others = {name for name, module in network.named_modules() if name and name not in adapted and _own(module)}
    found: list[str] = []
    for asked in params.modules_to_save:
        mine = sorted(name for name in others if name == asked or name.endswith(f".{asked}"))
        if not mine:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in others}))
            raise ValueError(
                f"lora.modules_to_save {asked!r} matches no module beside the adapted layers; they are: {known}"
            )
        found += mine
    return found


def _own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def save_adapter(
    model: MaskPredictor,
    folder: str | Path,
    base: str | Path,
    tokenizer: SavesItself | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the adapter and the name of its base (see `bases`); `folder` appears, or is replaced, when complete.

    `weights`: whole tensors under the network's own names, for a model whose parameters are sharded over ranks.
    """
    network = model.network
    stored = {model.family.published_name(k): v for k, v in _adapter_weights(network, weights).items()}
    config = network.peft_config["default"]
    name, _, revision = str(base).partition("@")
    config.base_model_name_or_path, config.revision = name, revision or None
    config.inference_mode = True
    with written_whole(Path(folder)) as staging:
        save_file({_PREFIX + k: v.contiguous() for k, v in stored.items()}, staging / _WEIGHTS, {"format": "pt"})
        config.save_pretrained(str(staging))
        if tokenizer is not None:
            tokenizer.save(staging)


def load_adapter(model: MaskPredictor, folder: str | Path) -> None:
    """Puts the adapter of `folder` into its base model; `ValueError` unless every one of its weights has a place."""
    require_package("peft", "train", "an adapter")
    from peft import PeftConfig, set_peft_model_state_dict

    network, folder = model.network, Path(folder)
    _require_bare(network)
    if not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder}: no {_WEIGHTS} there")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config.target_modules, str):
        config.target_modules = {model.family.own_layer(t) for t in config.target_modules}
    weights = {k.removeprefix(_PREFIX): v for k, v in load_file(folder / _WEIGHTS).items()}
    _inject(config, network)
    named = {model.family.own_name(k): v for k, v in weights.items()}
    places = {name: weight.shape for name, weight in _adapter_weights(network).items()}
    wrong = sorted(n for n in named.keys() | places.keys() if n not in named or places.get(n) != named[n].shape)
    if wrong:
        where = f"in {len(wrong)} places: {wrong[0]}"
        raise ValueError(f"{folder}: the adapter does not fit {type(network).__name__} {where}")
    for name, parameter in network.named_parameters():
        if ".lora_" in name:  # injected in the base's dtype; rounded to bf16, the merged model would be another one
            parameter.data = parameter.data.float()
    set_peft_model_state_dict(network, named)
    network.peft_config = {"default": config}


def _adapter_weights(network: Any, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What is stored of an adapter, by name; `weights` as in `save_adapter`."""
    from peft import get_peft_model_state_dict

    own = None if weights is None else dict(weights)
    found = get_peft_model_state_dict(network, own, save_embedding_layers=False)
    # With bias: all, peft also lists the biases inside of modules that train whole, and of those that these replace.
    return {n: w for n, w in found.items() if ".modules_to_save." not in n and ".original_module." not in n}


@contextlib.contextmanager
def adapter_off(model: MaskPredictor) -> Iterator[None]:
    """Within, the model computes what it did before its adapter was added."""
    network = model.network
    layers = [*_adapted(network), *_replaced(network)]
    for _, layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merge_adapter(model: MaskPredictor) -> float:
    """Adds the adapter into the weights, which keep their dtype, and removes it.

    Every layer is merged in fp32, compared there with the adapted one, and rounded to its own dtype once. Returns how
    much of the adapter that rounding took, |rounded - exact| / |exact - base| over all adapted weights: 0 in fp32, 1
    where no change was as large as half the last bit of its weight. `ValueError` names a layer whose merged weights do
    not compute what it computed; layers before it are merged by then.
    """
    network, lost, added = model.network, 0.0, 0.0
    # Under autocast the products would be compared in bf16, which knows three digits.
    with torch.autocast(model.device.type, enabled=False):
        for name, layer in _adapted(network):
            if name.endswith(".base_layer"):  # the inner one of two, merged with the outer
                continue
            exact, base = _merged_exactly(name, layer), layer.get_base_layer()
            for part, stored in base.named_parameters():
                wide = exact.get_parameter(part)
                rounded = wide.to(stored.dtype)
                lost += float((rounded.float() - wide).square().sum())
                added += float((wide - stored.float()).square().sum())
                stored.data = rounded
            network.set_submodule(name, base)
    for name, wrapper in _replaced(network):
        before = next(wrapper.original_module.parameters())
        network.set_submodule(name, wrapper.modules_to_save["default"].to(before.dtype).requires_grad_(False))
    share = (lost / added) ** 0.5 if added else 0.0
    if share > _NOTABLE:
        _log.warning(
            "rounded to %s, the merged weights miss %.0f %% of what the adapter changes; unmerged it keeps all of it",
            str(model.dtype).removeprefix("torch."),
            100 * share,
        )
    return share


def _merged_exactly(name: str, layer: Any) -> nn.Module:
    """An fp32 copy of an adapted layer's base with the adapter in its weights, checked on random inputs.

    What the adapter adds to the outputs, by peft's forward, is compared with what the change of the weights adds: a
    merge that is wrong is wrong by about as much as the adapter does, however little that is beside the weights. The
    allowed hundredth is far above what fp32, and TF32 where it is switched on, round away.
    """
    wide = copy.deepcopy(layer).float().eval()
    base = wide.get_base_layer()
    probe = _probe(base)
    before = {part: parameter.clone() for part, parameter in base.named_parameters()}
    plain = base(*probe)
    effect = wide(*probe) - plain
    for _, part in _adapted(wide):
        part.merge(safe_merge=True)
    if isinstance(base, Experts):  # not linear
        changed = base(*probe) - plain
    else:
        change = copy.deepcopy(base)
        for part, parameter in change.named_parameters():
            parameter.sub_(before[part])
        changed = change(*probe)
    apart = float((changed - effect).norm())
    if not apart <= 1e-2 * float(effect.norm()) + 1e-5 * float(plain.norm()):
        raise ValueError(
            f"merging the adapter changes what {name} computes by {apart / float(effect.norm()):.1e} of it"
        )
    return base


def _probe(layer: nn.Module) -> tuple[Tensor, ...]:
    """Sixteen inputs of a linear layer (16, I) fp32 or an embedding (16,) int64, or one for each of the experts."""
    weight: Any = next(layer.parameters())
    generator = torch.Generator().manual_seed(0)  # the same in every process
    if isinstance(layer, nn.Embedding):
        return (torch.randint(weight.shape[0], (16,), generator=generator).to(weight.device),)
    count = weight.shape[0] if isinstance(layer, Experts) else 16
    rows = torch.randn(count, weight.shape[-1], generator=generator).to(weight.device)
    if not isinstance(layer, Experts):
        return (rows,)
    return rows, torch.arange(count, device=weight.device)[:, None], torch.ones_like(rows[:, :1])


def _adapted(network: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)]


def _replaced(network: nn.Module) -> list[tuple[str, Any]]:
    """The modules that train whole: each holds the one before and the one that is trained."""
    from peft.utils import ModulesToSaveWrapper

    return [(name, module) for name, module in network.named_modules() if isinstance(module, ModulesToSaveWrapper)]


def _require_bare(network: nn.Module) -> None:
    """Refuses a network with an adapter, as peft would put a second one in its place; lets its layers be exchanged."""
    unfuse_projections(network)
    if _adapted(network):
        raise ValueError(
            "the model has an adapter already, which four or eight bits cannot take in; make a model of both with "
            "`llada export FOLDER --merge` and start from that"
        )
