"""The cross-entropy in place of its logits is F.cross_entropy, forwards and backwards, whole or in chunks."""

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from llada_core.modeling import predictor


def parts(rows=50, vocabulary=300, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 32, generator=draw).to(dtype).requires_grad_() for n in (rows, vocabulary))
    return x, weight, torch.randint(0, vocabulary, (rows,), generator=draw), torch.rand(rows, generator=draw)


def gradients(loss, *of):
    return torch.autograd.grad(loss.sum(), of)


@pytest.mark.parametrize("chunk", [1 << 28, 3000])
@pytest.mark.parametrize("cached", [1 << 20, 700])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients(monkeypatch, chunk, cached, dtype, close):
    monkeypatch.setattr(predictor, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(predictor, "CACHED_ELEMENTS", cached)
    x, weight, targets, factors = parts(dtype=dtype)
    found = predictor.projected_nll(x, lambda y: y @ weight.T, 300, targets)
    wanted = F.cross_entropy((x @ weight.T).float(), targets, reduction="none")
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(gradients(found * factors, x, weight), gradients(wanted * factors, x, weight), strict=True):
        torch.testing.assert_close(mine, theirs, atol=close, rtol=close)


def test_no_position_costs_nothing_and_has_a_gradient():
    x, weight, targets, _ = parts(rows=0)
    found = predictor.projected_nll(x, lambda y: y @ weight.T, 300, targets)
    assert found.shape == (0,)
    assert gradients(found, weight)[0].count_nonzero() == 0


def test_a_second_gradient_is_refused():
    x, weight, targets, _ = parts()
    loss = predictor.projected_nll(x, lambda y: y @ weight.T, 300, targets).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once"):
        loss.backward()


def peak(rows, chunk, monkeypatch):
    """Bytes at the worst moment of a loss and its gradient, weights and inputs left out."""
    monkeypatch.setattr(predictor, "CHUNK_ELEMENTS", chunk)
    x, weight, targets, factors = parts(rows, vocabulary=4000)
    with MemTracker() as tracker:
        (predictor.projected_nll(x, lambda y: y @ weight.T, 4000, targets) * factors).sum().backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def test_a_chunked_loss_holds_one_chunk_at_a_time(monkeypatch):
    chunk = 8 * 4000  # eight rows of logits
    few, many = peak(16, chunk, monkeypatch), peak(256, chunk, monkeypatch)
    whole = peak(256, 1 << 28, monkeypatch)
    print(few, many, whole)
    assert whole > 256 * 4000 * 4
    assert many < few + 240 * 600  # hidden rows, targets and losses grow; logits do not
