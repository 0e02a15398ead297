"""Grouped products against the loop over experts, and router losses that add up."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from llada_core.modeling.architecture import ExpertShape
from llada_core.modeling.block import Experts, Routing, router_losses
from tests.tiny import tiny_model

SHAPE = ExpertShape(n_experts=6, per_token=2, width=16, shared_width=0, sparse=(True,), router_bias=False)


def routed(tokens=23, seed=0, experts=6):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 32, generator=g)
    weights, chosen = torch.rand(tokens, experts, generator=g).topk(2)
    return x, chosen, weights


@pytest.mark.parametrize("lopsided", [False, True])
def test_grouped_products_equal_the_loop_in_value_and_gradient(lopsided):
    experts = Experts(32, SHAPE)
    x, chosen, weights = routed()
    if lopsided:  # experts without a single token
        chosen = chosen.clamp(max=2)
    grads = []
    for way in (experts.forward, experts.loop):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = way(leaves[0], chosen, leaves[1])
        experts.zero_grad()
        out.square().sum().backward()
        grads.append([out, *(leaf.grad for leaf in leaves), *(p.grad.clone() for p in experts.parameters())])
    for grouped, looped in zip(*grads, strict=True):
        assert_close(grouped, looped, atol=1e-5, rtol=1e-4)


def test_a_token_may_choose_nothing_of_some_experts_and_one_token_is_enough():
    experts = Experts(32, SHAPE)
    x, chosen, weights = routed(tokens=1)
    assert_close(experts(x, chosen, weights), experts.loop(x, chosen, weights), atol=1e-6, rtol=1e-5)


def test_autocast_runs_the_experts_in_the_low_precision():
    experts = Experts(32, SHAPE)
    x, chosen, weights = routed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = experts(x, chosen, weights)
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), experts(x, chosen, weights), atol=1e-4, rtol=0.1)
    model = tiny_model("llada_moe").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randint(0, 120, (2, 8)), router_losses=True)
    (out.logits.float().sum() + out.router_losses.balance.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_model_with_grouped_products_equals_the_model_with_the_loop(monkeypatch):
    model, tokens = tiny_model("llada_moe"), torch.randint(0, 120, (3, 9))
    with torch.no_grad():
        grouped = model(tokens).logits
        monkeypatch.setattr(Experts, "forward", Experts.loop)
        assert_close(grouped, model(tokens).logits, atol=1e-5, rtol=1e-5)


def one_layer(logits):
    return Routing(logits, *reversed(logits.softmax(-1).topk(2)))


def test_losses_by_hand():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2 * 5, 4, generator=g)
    losses = router_losses([one_layer(logits)], 2, None)
    for row in range(2):
        own = logits[row * 5 : row * 5 + 5]
        chosen = F.one_hot(own.topk(2).indices, 4).sum(1).float()
        by_hand = 4 * (chosen.mean(0) / 2 * own.softmax(-1).mean(0)).sum()
        assert_close(losses.balance[row], by_hand)
        assert_close(losses.z[row], own.logsumexp(-1) ** 2)


def test_an_even_router_costs_one_and_a_collapsed_one_more():
    even = torch.eye(4).repeat(2, 1) * 3  # each token prefers another expert
    even = even + even.roll(1, 1)
    collapsed = torch.tensor([3.0, 2.0, 0.0, 0.0]).repeat(8, 1)
    assert_close(router_losses([one_layer(even)], 1, None).balance, torch.ones(1))
    assert router_losses([one_layer(collapsed)], 1, None).balance.item() > 1.5


def test_router_losses_do_not_depend_on_how_rows_are_batched_nor_on_padding():
    model, tokens = tiny_model("llada_moe"), torch.randint(0, 120, (4, 10))
    with torch.no_grad():
        whole = model(tokens, router_losses=True).router_losses
        parts = [model(tokens[i : i + 1], router_losses=True).router_losses for i in range(4)]
        mask = torch.ones(4, 13, dtype=torch.long)
        mask[:, :3] = 0
        padded = model(F.pad(tokens, (3, 0)), mask, router_losses=True).router_losses
    assert_close(whole.balance, torch.cat([p.balance for p in parts]), atol=1e-5, rtol=1e-5)
    assert_close(padded.balance, whole.balance, atol=1e-5, rtol=1e-5)
    assert_close(padded.z[:, 3:], whole.z, atol=1e-5, rtol=1e-5)
    assert not padded.z[:, :3].any()


def test_router_losses_of_a_dense_model_are_refused():
    with pytest.raises(ValueError, match="without sparse layers"):
        tiny_model()(torch.ones(1, 3, dtype=torch.long), router_losses=True)
