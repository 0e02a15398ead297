"""The two products are one function; which one runs depends on the processor and the shape alone."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from llada_core.modeling import linear as products
from llada_core.modeling.linear import Linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")


@pytest.fixture(autouse=True)
def any_shape(monkeypatch):
    """oneDNN on every maker's processor and for every size."""
    monkeypatch.setattr(products, "_WORTH", 1)
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)


@pytest.mark.parametrize("shape", [(5, 32), (2, 7, 32), (1, 32), (2, 3, 4, 32)])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients(shape, bias):
    layer = Linear(32, 48, bias=bias)
    x = torch.randn(shape).transpose(0, -2).requires_grad_()  # not contiguous
    leaves = [x, *layer.parameters()]
    weighing = torch.randn(48)
    ours, theirs = layer(x), F.linear(x, layer.weight, layer.bias)
    assert type(ours.grad_fn).__name__ == "_ProductBackward"
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad((out * weighing).sum(), leaves) for out in (ours, theirs))
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_a_frozen_weight_costs_no_gradient():
    layer = Linear(8, 8, bias=False).requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert_close(x.grad, layer.weight.sum(0).expand(4, -1))


def test_where_it_does_not_pay_or_may_not_be(monkeypatch):
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    assert products._pays(x, weight)
    assert not products._pays(x.bfloat16(), weight.bfloat16())
    assert not products._pays(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not products._pays(x, weight)
        assert Linear(8, 8)(x).dtype == torch.bfloat16
    assert not products._pays(x[:0], weight)
    monkeypatch.setattr(products, "_WORTH", 4 * 8 * 8 + 1)
    assert not products._pays(x, weight)
