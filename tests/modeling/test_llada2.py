"""LLaDA2.0 and 2.1 against the published modelling code (tests/golden): plain, by blocks, padded, ragged and cached."""

import pytest
import torch
from torch.testing import assert_close

from llada_core.modeling import load_model
from llada_core.modeling.attention import BlockCausal
from llada_core.modeling.block import RotaryTables, rotate
from tests.reference import BLOCKS, GOLDEN, arrays, golden_model
from tests.tiny import tiny_model

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
# case -> length of its blocks, its file of ids, how many of the last positions were kept
CASES = {
    "a_plain": (None, "a_plain"), "b_masks": (None, "b_masks"), "c_block1": (1, "c_block1"), "c_block4": (4, "c_block4"),
    "c_block8": (8, "c_block8"), "d_block8_partial": (8, "d_block8_partial"), "e_block32_long": (32, "e_block32_long"),
    "h": (4, "h_hidden"), "v21_plain": (None, "v21_plain"), "v21_block4": (4, "v21_plain"), "v21_block8": (8, "v21_plain"),
}  # fmt: skip


def golden(name: str) -> torch.Tensor:
    return arrays("logits_llada2")[name]


def model_of(case: str):
    return golden_model("llada21_tiny" if case.startswith("v21") else "llada2_tiny")


def by_blocks(length: int | None) -> dict[str, BlockCausal]:
    return {} if length is None else {"block_causal": BlockCausal(length)}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits(case):
    length, ids = CASES[case]
    if case == "h":
        length = int(golden("h_hidden_block_length"))
    logits = model_of(case)(golden(f"{ids}_input_ids"), **by_blocks(length)).logits
    if f"{case}_logits" in arrays("logits_llada2"):
        assert_close(logits, golden(f"{case}_logits"), **TOLERANCE)
    else:
        assert_close(logits[:, -16:], golden(f"{case}_logits_last16"), **TOLERANCE)


@torch.no_grad()
def test_a_block_as_long_as_the_row_is_the_bidirectional_model():
    ids = golden("a_plain_input_ids")
    logits = golden_model("llada2_tiny")(ids, block_causal=BlockCausal(13)).logits
    assert_close(logits, golden("a_plain_logits"), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "length"), [("f_padright_full", None), ("f_padright_block4", 4), ("g_padleft_block4", 4)]
)
def test_padding_on_either_side(case, length):
    """On the left, positions and blocks count from a row's first real token."""
    at = arrays("logits_llada2").get(f"{case}_position_ids")
    mask = golden(f"{case}_attention_mask") if at is None else golden(f"{case}_allow")[:, -1].long()
    logits = golden_model("llada2_tiny")(golden(f"{case}_input_ids"), mask, slots=at, **by_blocks(length)).logits
    kept = mask.bool()
    assert_close(logits[kept], golden(f"{case}_logits")[kept], **TOLERANCE)


@torch.no_grad()
def test_hidden_states_and_the_first_layer_piece_by_piece():
    model, length = golden_model("llada2_tiny"), int(golden("h_hidden_block_length"))
    out = model(golden("h_hidden_input_ids"), output_hidden_states=True, block_causal=BlockCausal(length))
    assert_close(torch.stack(out.hidden_states), golden("h_hidden_states"), **TOLERANCE)
    block = model.blocks[0]
    q, k, _ = block.qkv_proj(golden("h_attn0_in")).split(block.fused, dim=-1)
    cos, sin = RotaryTables(600000.0, 8).upto(11, torch.device("cpu"))
    assert_close(cos[None], golden("h_rope_cos"), **TOLERANCE)
    for own, norm, name in ((q, block.q_norm, "q"), (k, block.k_norm, "k")):
        normed = norm(own.unflatten(-1, (-1, 16)))
        assert_close(normed.transpose(1, 2), golden(f"h_attn0_{name}_before_rope"), **TOLERANCE)
        turned = rotate(normed, cos[:, None], sin[:, None])
        assert_close(turned.transpose(1, 2), golden(f"h_attn0_{name}"), **TOLERANCE)
    assert_close(block.mlp(golden("h_dense0_in")), golden("h_dense0_out"), **TOLERANCE)


@torch.no_grad()
def test_chosen_experts_their_weights_and_what_comes_out():
    block = golden_model("llada2_tiny").blocks[int(golden("router_layer"))]
    assert torch.equal(block.mlp.expert_bias, golden("router_bias"))
    out, routing = block.mlp(golden("router_in"))
    assert_close(routing.logits, golden("router_logits"), **TOLERANCE)
    ours, order = routing.experts.sort(-1)
    theirs, their_order = golden("router_topk_experts").sort(-1)
    assert torch.equal(ours, theirs)
    weights = golden("router_topk_weights").gather(1, their_order)
    assert_close(routing.weights.gather(1, order), weights, **TOLERANCE)
    shared = block.shared_expert(golden("router_in"))
    assert_close(shared, golden("router_shared_out"), **TOLERANCE)
    assert_close(out + shared, golden("router_out"), **TOLERANCE)


@torch.no_grad()
def test_without_its_bias_or_its_groups_a_router_chooses_otherwise():
    """What the golden experts are worth: nine rows in ten differ."""
    moe = load_model(GOLDEN / "llada2_tiny", special_tokens=BLOCKS).blocks[int(golden("router_layer"))].mlp
    theirs = golden("router_topk_experts").sort(-1).values
    moe.expert_bias.zero_()
    ours = moe(golden("router_in"))[1].experts.sort(-1).values
    assert (ours == theirs).all(1).float().mean() < 0.5


@torch.no_grad()
def test_embeddings_positions_and_bfloat16():
    model, data = golden_model("llada2_tiny"), arrays("logits_llada2")
    length = int(data["i_inputs_embeds_block_length"])
    logits = model(inputs_embeds=data["i_inputs_embeds"], **by_blocks(length)).logits
    assert_close(logits, data["i_inputs_embeds_logits"], **TOLERANCE)

    ids = data["j_positions_from100_input_ids"]
    at = torch.arange(100, 111).expand(2, -1)  # in the reference also by blocks of 4
    assert_close(model(ids, slots=at, **by_blocks(4)).logits, data["j_positions_from100_logits"], **TOLERANCE)

    low = load_model(GOLDEN / "llada2_tiny", special_tokens=BLOCKS, dtype=torch.bfloat16)
    logits = low(data["k_bf16_input_ids"], **by_blocks(int(data["k_bf16_block_length"]))).logits.float()
    expected = data["k_bf16_logits_as_float32"]
    assert (logits - expected).abs().mean() < 0.3
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.85


@torch.no_grad()
@pytest.mark.parametrize("length", [4, 8])
def test_cached_block_by_block_and_after_a_prefill(length):
    model, name = golden_model("llada2_tiny"), f"l_cache_b{length}"
    ids, how = golden(f"{name}_input_ids"), by_blocks(length)
    width = ids.shape[1]
    assert_close(model(ids, **how).logits, golden(f"{name}_full_logits"), **TOLERANCE)

    cache, parts = model.new_cache(1, width), []
    for first in range(0, width, length):
        at = torch.arange(first, first + length)[None]
        parts.append(model(ids[:, at[0]], cache=cache, slots=at, **how).logits)
    assert_close(torch.cat(parts, 1), golden(f"{name}_cached_logits"), **TOLERANCE)
    if length == 4:
        for kept, theirs in ((cache.keys, "key"), (cache.values, "value")):
            assert_close(kept[0][:, :-4].transpose(1, 2), golden(f"{name}_layer0_{theirs}"), **TOLERANCE)

    prefilled, at = model.new_cache(1, width), torch.arange(width)[None]
    model(ids[:, :-length], cache=prefilled, slots=at[:, :-length], **how)
    for _ in range(2):
        logits = model(ids[:, -length:], cache=prefilled, slots=at[:, -length:], **how).logits
        assert_close(logits, golden(f"{name}_prefill_then_block_logits"), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, 8])
def test_cached_equals_uncached_in_float64(length):
    """Windows at different places of ragged rows, each after all of its row's finished blocks."""
    model, generator = (
        load_model(GOLDEN / "llada2_tiny", special_tokens=BLOCKS, dtype=torch.float64),
        torch.Generator().manual_seed(0),
    )
    ids, how = torch.randint(0, 150, (3, 4 * length), generator=generator), by_blocks(length)
    whole = model(ids, **how).logits
    assert whole.dtype == torch.float64
    cache = model.new_cache(3, 4 * length)
    starts = torch.tensor([0, length, 2 * length])
    for at in (torch.arange(2 * length).expand(3, -1), starts[:, None] + torch.arange(2 * length)):
        logits = model(ids.gather(1, at), cache=cache, slots=at, **how).logits
        expected = whole.gather(1, at[..., None].expand(-1, -1, whole.shape[-1]))
        assert (logits - expected).abs().max() < 1e-12


@torch.no_grad()
def test_a_later_block_changes_nothing_before_it():
    model = load_model(GOLDEN / "llada2_tiny", special_tokens=BLOCKS, dtype=torch.float64)
    ids = golden("c_block4_input_ids")
    changed = ids.clone()
    changed[:, 8:] = 7
    before, after = (model(x, **by_blocks(4)).logits[:, :8] for x in (ids, changed))
    assert (before - after).abs().max() < 1e-12


@pytest.mark.parametrize(("experts", "per_token"), [(2, 2), (4, 2), (7, 3), (24, 20), (64, 8)])
def test_a_fresh_model_of_any_size(experts, per_token):
    model = tiny_model("llada2", num_experts=experts, experts_per_token=per_token)
    assert (model.block_length, model.shape.moe.sparse) == (32, (False, True))
    assert model(torch.arange(12)[None], **by_blocks(4)).logits.shape == (1, 12, 136)
