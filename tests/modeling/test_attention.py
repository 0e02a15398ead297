"""Attention by blocks: the two ways of computing it against a table of who sees whom, and neither makes such a table."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llada_core.modeling.attention import TILE, BlockCausal, Spans
from tests.reference import arrays
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def dense(spans: Spans, rows: int) -> torch.Tensor:
    """(B, W, T) bool, as FlexAttention is told of it, pair by pair."""
    width, keys = spans.query.shape[1], spans.key.shape[1]
    row, i, j = torch.arange(rows)[:, None, None], torch.arange(width)[:, None], torch.arange(keys)
    return spans.tiles.mask_mod(row, torch.tensor(0), i, j).expand(rows, width, keys)


def random(rows: int, heads: int, width: int) -> torch.Tensor:
    return torch.randn(rows, heads, width, 16, generator=torch.Generator().manual_seed(width + heads))


def padded(width: int) -> torch.Tensor:
    return (torch.arange(width) < torch.tensor([[width], [width - 7]])).long()


def ragged(length: int) -> Spans:
    """Windows of two rows, at blocks of their own, over a cache of 300 positions."""
    at = torch.tensor([[0], [3 * length]]) + torch.arange(2 * length)
    return Spans.of(BlockCausal(length), 2 * length, CPU, padded(300), at, 300)


def numbers(width: int) -> torch.Tensor:
    """Documents of two rows: one after each other, and one that ends where a tile does."""
    return torch.stack([1 + torch.arange(width) // 90, 1 + (torch.arange(width) >= TILE).long()])


SPANS = {
    "by 1": Spans.of(BlockCausal(1), 40, CPU, None, None, None),
    "by 32": Spans.of(BlockCausal(32), 300, CPU, None, None, None),
    "by 100, padded": Spans.of(BlockCausal(100), 300, CPU, padded(300), None, None),
    "one block": Spans.of(BlockCausal(512), 300, CPU, None, None, None),
    "copies": Spans.of(BlockCausal(16, copies=True), 280, CPU, None, None, None),
    "copies, a last short block": Spans.of(BlockCausal(48, copies=True), 400, CPU, padded(400), None, None),
    "documents": Spans.of(BlockCausal(24, documents=True), 300, CPU, numbers(300), None, None),
    "copies of documents": Spans.of(
        BlockCausal(16, copies=True, documents=True), 560, CPU, numbers(280).repeat(1, 2), None, None
    ),
    "ragged": ragged(4),
    "ragged, wide": ragged(40),
    "positions of its own": Spans.of(BlockCausal(4), 9, CPU, None, (torch.arange(9) - 3).clamp(0).expand(2, -1), None),
}


@pytest.mark.parametrize("case", SPANS)
def test_calls_by_block_equal_the_whole_table(case):
    spans = SPANS[case]
    width, keys = spans.query.shape[1], spans.key.shape[1]
    q, k, v = random(2, 4, width), random(2, 2, keys), random(2, 2, keys) + 1
    table = dense(spans, 2)
    assert table.any(-1).all()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=table[:, None], enable_gqa=True)
    assert_close(spans.by_blocks(q, k, v), expected, atol=1e-5, rtol=1e-5)
    if case in ("by 32", "copies", "copies of documents"):  # each takes FlexAttention seconds of tracing
        assert_close(spans.by_tiles(q, k, v), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", SPANS)
def test_a_tile_is_left_out_where_nothing_is_seen_and_whole_where_everything_is(case):
    spans = SPANS[case]
    table, tiles = dense(spans, 2), spans.tiles
    short = [-size % TILE for size in (table.shape[2], table.shape[1])]
    tall = F.pad(table, (0, short[0], 0, short[1])).unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE))
    some, whole = listed(tiles.kv_num_blocks, tiles.kv_indices), listed(tiles.full_kv_num_blocks, tiles.full_kv_indices)
    assert not (some & whole).any()
    seen = tall.any(-1).any(2)
    assert (seen <= (some | whole)).all(), "a tile in which something is seen is left out"
    complete = F.pad(table, (0, short[0], 0, short[1]), value=True).unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE))
    assert (whole <= complete.all(-1).all(2)).all(), "a tile that is taken whole hides something"


def listed(counts: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(R, Q, S) bool of a list of tiles."""
    named = torch.arange(places.shape[-1]) < counts[:, 0, :, None]
    return torch.zeros(named.shape, dtype=torch.bool).scatter(2, places[:, 0].long(), named)


@pytest.mark.parametrize(
    ("name", "length"), [("L5_block1", 1), ("L6_block4_partial", 4), ("L8_block4", 4), ("used", None)]
)
def test_who_sees_whom_of_a_noisy_and_a_clean_copy(name, length):
    data = arrays("loss_llada2")
    theirs = data["attention_mask_used" if name == "used" else f"attention_mask_{name}"]
    length = int(data["block_length"]) if length is None else length
    spans = Spans.of(BlockCausal(length, copies=True), len(theirs), CPU, None, None, None)
    assert torch.equal(dense(spans, 1)[0], theirs)


def test_gradients_by_block_are_those_of_the_whole_table():
    spans = SPANS["copies"]
    q, k, v = (random(1, n, 280).requires_grad_() for n in (4, 2, 2))
    spans.by_blocks(q, k, v).square().sum().backward()
    ours = [x.grad for x in (q, k, v)]
    again = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    F.scaled_dot_product_attention(
        *again, attn_mask=dense(spans, 1)[:, None], enable_gqa=True
    ).square().sum().backward()
    for own, expected in zip(ours, again, strict=True):
        assert_close(own, expected.grad, atol=1e-4, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation gave."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return found


LONG = 32768


def test_no_table_of_32k_by_32k_is_made_by_a_forward_or_for_the_tiles():
    model = tiny_model("llada2", max_sequence_length=LONG, n_layers=2).to(
        torch.bfloat16
    )  # which pretended experts take
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Largest() as seen:
        ids = torch.zeros(1, LONG, dtype=torch.long)
        assert model(ids, block_causal=BlockCausal(256), positions=torch.zeros(1, dtype=torch.long)).logits.shape == (
            1,
            136,
        )
        assert seen.numel <= 128 * LONG
    with FakeTensorMode(), Largest() as seen:
        for pattern in (BlockCausal(32), BlockCausal(32, copies=True)):
            assert Spans.of(pattern, LONG, CPU, None, None, None).tiles.shape == (1, 1, LONG, LONG)
        assert seen.numel <= 32 * LONG


@pytest.mark.parametrize(
    ("pattern", "width", "mask", "told"),
    [
        (lambda: BlockCausal(0), 8, None, "block length 0 is not 1 or more"),
        (lambda: BlockCausal(4), 8, torch.ones(1, 8, 8), r"takes a mask \(B, T\), not one of 3 dimensions"),
        (lambda: BlockCausal(4, documents=True), 8, None, "documents are told apart by a mask of their numbers"),
        (lambda: BlockCausal(4, copies=True), 7, None, "a noisy and a clean copy are of one length"),
    ],
)
def test_bad_input_is_told_in_one_line(pattern, width, mask, told):
    with pytest.raises(ValueError, match=told):
        Spans.of(pattern(), width, CPU, mask, None, None)
