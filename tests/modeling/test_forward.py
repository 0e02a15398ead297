"""The one call: asked-for positions, likelihood without logits, masks of every shape, caches, gradients."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from llada_core.modeling import predictor
from llada_core.modeling.block import RotaryTables
from tests.tiny import TINY_BACKBONES, tiny_model

KINDS = ["llada", "llada_moe", *TINY_BACKBONES]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TOKENS = torch.randint(0, 120, (3, 12), generator=torch.Generator().manual_seed(0))
ASKED = torch.tensor([0, 5, 11, 12, 30, 35])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [False, True])
def test_positions_give_the_rows_of_the_whole(kind, hidden):
    model = tiny_model(kind)
    with torch.no_grad():
        whole = model(TOKENS).logits.flatten(0, 1)
        part = model(TOKENS, positions=ASKED, output_hidden_states=hidden)
    assert_close(part.logits, whole[ASKED], **CLOSE)
    if hidden:
        assert part.hidden_states[-1].shape == (3, 12, 32)
    with torch.no_grad():
        assert model(TOKENS, positions=ASKED[:0]).logits.shape == (0, model.vocab_rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [predictor.CHUNK_ELEMENTS, 300])
def test_targets_give_the_cross_entropy_and_its_gradients_chunked_or_not(kind, chunk, monkeypatch):
    monkeypatch.setattr(predictor, "CHUNK_ELEMENTS", chunk)
    model, targets = tiny_model(kind), TOKENS.flatten()[ASKED]
    plain = F.cross_entropy(model(TOKENS).logits.flatten(0, 1)[ASKED], targets, reduction="none")
    expected = torch.autograd.grad(plain.sum(), list(model.parameters()), allow_unused=True)
    out = model(TOKENS, positions=ASKED, targets=targets)
    assert out.logits is None
    assert out.nll.dtype == torch.float32
    assert_close(out.nll, plain, **CLOSE)
    got = torch.autograd.grad(out.nll.sum(), list(model.parameters()), allow_unused=True)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_ones_is_no_mask(kind):
    model = tiny_model(kind)
    with torch.no_grad():
        assert_close(model(TOKENS, torch.ones_like(TOKENS)).logits, model(TOKENS).logits, **CLOSE)


@pytest.mark.parametrize("kind", ["llada", "llada_moe", "distilbert"])
def test_padding_changes_nothing_whatever_its_token(kind):
    """Right padding for all; BERT's positions are absolute, so left padding is for relative ones alone."""
    model = tiny_model(kind)
    sides = [(0, 4)] if kind == "distilbert" else [(0, 4), (4, 0)]
    for side in sides:
        mask = F.pad(torch.ones_like(TOKENS), side)
        for token in (model.special_tokens.pad_id, 7):
            with torch.no_grad():
                padded = model(F.pad(TOKENS, side, value=token), mask).logits
            assert_close(padded[:, side[0] : side[0] + 12], model(TOKENS).logits.detach(), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_packed_in_one_row_do_not_see_each_other(kind):
    """A mask per query (B, W, T): the first document reads as if it were alone."""
    model = tiny_model(kind)
    document = torch.tensor([0] * 5 + [1] * 7).expand(3, -1)
    with torch.no_grad():
        packed = model(TOKENS, (document[:, :, None] == document[:, None, :]).long()).logits
        alone = model(TOKENS[:, :5]).logits
    assert_close(packed[:, :5], alone, **CLOSE)
    if model.supports_cache:  # relative positions: the second one too
        assert_close(packed[:, 5:], model(TOKENS[:, 5:]).logits.detach(), **CLOSE)


@pytest.mark.parametrize("kind", ["llada", "llada_moe"])
def test_a_window_over_a_fresh_cache_equals_the_full_pass(kind):
    model = tiny_model(kind)
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    slots = torch.tensor([[2, 3, 4], [5, 6, 7], [11, 0, 6]])
    with torch.no_grad():
        cache = model.new_cache(3, 12)
        full = model(TOKENS, mask, cache=cache).logits
        assert_close(full, model(TOKENS, mask).logits, **CLOSE)
        window = model(TOKENS.gather(1, slots), mask, cache=cache, slots=slots).logits
    assert_close(window, full.gather(1, slots[..., None].expand(-1, -1, full.shape[-1])), **CLOSE)


def test_a_window_that_changed_is_seen_by_the_next_one():
    model = tiny_model()
    changed = TOKENS.clone()
    changed[:, 3:6] = 100
    everything = torch.arange(12).expand(3, -1)
    with torch.no_grad():
        cache = model.new_cache(3, 12)
        model(TOKENS, cache=cache)
        model(changed[:, 3:6], cache=cache, slots=everything[:, 3:6])
        # after a refresh of all slots nothing of the old canvas is left
        assert_close(model(changed, cache=cache, slots=everything).logits, model(changed).logits, **CLOSE)
    with pytest.raises(ValueError, match="need slots"):
        model(changed[:, :4], cache=cache)


def test_rows_of_a_cache():
    model = tiny_model()
    with torch.no_grad():
        cache = model.new_cache(3, 12)
        model(TOKENS, cache=cache)
        kept = cache.rows(torch.tensor([2, 0]))
        slots = torch.arange(4, 8).expand(2, -1)
        logits = model(TOKENS[[2, 0], 4:8], cache=kept, slots=slots).logits
        assert_close(logits, model(TOKENS).logits[[2, 0], 4:8], **CLOSE)
    assert (kept.batch, kept.length, cache.batch) == (2, 12, 3)


def test_masked_lms_refuse_what_they_cannot_do():
    model = tiny_model("bert")
    assert not model.supports_cache
    with pytest.raises(ValueError, match="cannot use a key/value cache"):
        model.new_cache(1, 4)
    with pytest.raises(ValueError, match="knows no cache"):
        model(TOKENS, router_losses=True)


@pytest.mark.parametrize("kind", ["llada", "llada_moe"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    model = tiny_model(kind).train()
    grads = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(TOKENS, positions=ASKED, targets=TOKENS.flatten()[ASKED]).nll.sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_rope_tables_made_in_inference_mode_serve_training():
    model = tiny_model().train()
    with torch.inference_mode():
        model(TOKENS)
    model(TOKENS).logits.sum().backward()


def test_rope_tables_grow_and_keep_their_values():
    tables = RotaryTables(10000.0, 8)
    short = [t.clone() for t in tables.upto(5, torch.device("cpu"))]
    long = tables.upto(50, torch.device("cpu"))
    assert all(torch.equal(a, b[:5]) for a, b in zip(short, long, strict=True))
    assert tables.upto(3, torch.device("cpu"))[0].data_ptr() == long[0].data_ptr()


def test_a_row_that_sees_nothing_stays_finite():
    mask = torch.ones_like(TOKENS)
    mask[1] = 0
    with torch.no_grad():
        assert tiny_model()(TOKENS, mask).logits.isfinite().all()


def test_grouped_query_heads_match_repeated_ones():
    grouped, whole = tiny_model(n_kv_heads=2), tiny_model()
    weights = grouped.state_dict()
    for name in [n for n in weights if ".k_proj." in n or ".v_proj." in n]:
        weights[name] = weights[name].unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    whole.load_state_dict(weights)
    with torch.no_grad():
        assert_close(grouped(TOKENS).logits, whole(TOKENS).logits, **CLOSE)


@pytest.mark.parametrize(("kind", "changes"), [("llada", {"qk_norm": True, "n_kv_heads": 2}), ("llada_moe", {})])
def test_autocast_rounds_each_weight_and_leaves_the_residuals_in_fp32(kind, changes):
    """One GPU and DDP hold fp32 weights under autocast; FSDP2 sends them in bf16: the same forward pass, bit for bit."""
    whole, ids = tiny_model(kind, **changes), torch.arange(20)[None]
    for parameter in whole.parameters():
        parameter.data.mul_(1.2345)  # norms' weights of one would be exact in bf16
    sent = copy.deepcopy(whole).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mine, theirs = (model(ids, output_hidden_states=True) for model in (whole, sent))
    assert {state.dtype for state in mine.hidden_states} == {torch.float32}
    for one, other in zip((*mine.hidden_states, mine.logits), (*theirs.hidden_states, theirs.logits), strict=True):
        assert torch.equal(one, other)


def test_a_cache_has_the_dtype_that_autocast_computes_in():
    model, ids = tiny_model(), torch.arange(20)[None]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(ids).logits
        for asked, kept in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
            model.computes_in = asked
            cache = model.new_cache(1, 20)
            assert cache.keys[0].dtype == kept
            assert torch.equal(model(ids, cache=cache).logits, expected)
