"""Published parameter names of LLaDA-MoE, both ways, for transformers' loader and saver.

Knows names; does not know files. The dense family needs no entry: its names are the modules' own.
"""

from collections.abc import Mapping

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

_RENAMED = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "model.layers": "model.transformer.blocks",
    "lm_head": "model.transformer.ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
}


def own_name(published: str) -> str:
    """Our name of a LLaDA-MoE parameter that is not an expert's."""
    for theirs, ours in _RENAMED.items():
        published = published.replace(theirs, ours)
    return published


def published_name(own: str) -> str:
    """The published name of a LLaDA-MoE parameter of ours that is not an expert's."""
    for theirs, ours in reversed(_RENAMED.items()):
        own = own.replace(ours, theirs)
    return own


def published_shapes(own: Mapping[str, Tensor], *, sparse: bool) -> dict[str, tuple[int, ...]]:
    """Published name and shape of every weight of a state dict of ours; experts one by one."""
    if not sparse:
        return {name: tuple(weight.shape) for name, weight in own.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in own.items():
        stem, dot, stack = published_name(name).partition(".experts.")
        if not dot:
            shapes[stem] = tuple(weight.shape)
            continue
        n_experts, rows, columns = weight.shape
        parts = {"down_proj": rows} if stack == "down" else {"gate_proj": rows // 2, "up_proj": rows // 2}
        for part, height in parts.items():
            shapes.update({f"{stem}.experts.{e}.{part}.weight": (height, columns) for e in range(n_experts)})
    return shapes


def register_names() -> None:
    """Makes transformers load and save `LLaDAMoEModelLM` under the published names; experts are stacked on the way."""
    experts = [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down", [MergeModulelist(dim=0)]),
    ]
    renamings = [WeightRenaming(published, own) for published, own in _RENAMED.items()]
    register_checkpoint_conversion_mapping("LLaDAMoEModelLM", [*renamings, *experts], overwrite=True)
