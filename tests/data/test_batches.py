"""Batches: a function of (seed, step) alone, padded as asked, bucketed by length."""

import numpy as np
import pytest
import torch

from llada_core.data.batches import BatchSampler, RowBatches
from llada_core.training.params import SFTParams

EOS = 9


class Table:
    """Rows of unequal length in memory."""

    def __init__(self, lengths, documents=False):
        self.rows = {"input_ids": [[i % 7] * n for i, n in enumerate(lengths)]}
        self.rows["maskable"] = [[0] + [1] * (n - 1) for n in lengths]
        if documents:
            self.rows["document_ids"] = [[0] * n for n in lengths]
        self.column_names = list(self.rows)

    def __len__(self):
        return len(self.rows["input_ids"])

    def __getitem__(self, rows):
        return {name: [column[i] for i in rows] for name, column in self.rows.items()}


def test_order_is_a_function_of_seed_and_step():
    one, other = BatchSampler(100, 8, seed=1), BatchSampler(100, 8, seed=1)
    steps = [other.rows(step) for step in range(40)]
    assert all((one.rows(step) == steps[step]).all() for step in reversed(range(40)))
    assert not (BatchSampler(100, 8, seed=2).rows(0) == steps[0]).all()
    epoch = np.concatenate(steps[:12])
    assert len(set(epoch)) == 96
    assert not (np.concatenate(steps[12:24]) == epoch).all()


def test_fewer_rows_than_a_batch_are_repeated():
    order = BatchSampler(3, 8, seed=0)
    assert len(order.rows(5)) == 8
    assert set(order.rows(5)) == {0, 1, 2}


def test_bucketing_keeps_every_row_once_and_lengths_close():
    lengths = np.random.default_rng(0).integers(5, 200, 512)
    plain, bucketed = BatchSampler(512, 8, seed=0), BatchSampler(512, 8, seed=0, lengths=lengths, bucket=16)
    assert sorted(np.concatenate([bucketed.rows(s) for s in range(64)])) == list(range(512))

    def waste(order):
        return sum(8 * lengths[order.rows(s)].max() for s in range(64)) / lengths.sum()

    assert waste(bucketed) < 1.1 < 1.5 < waste(plain)
    assert not all(lengths[bucketed.rows(s)].mean() <= lengths[bucketed.rows(s + 1)].mean() for s in range(16))


@pytest.mark.parametrize("padding", ["longest", "none", 2])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_join_to_the_whole_batch(padding, parts):
    table = Table([3, 8, 5, 2, 7, 4, 6, 3], documents=True)
    batches = RowBatches(table, BatchSampler(8, 4, seed=3), eos_id=EOS, padding=padding)
    whole = batches.batch(5)
    for part in range(parts):
        share = batches.batch(5, part=part, parts=parts)
        rows = slice(part * 4 // parts, (part + 1) * 4 // parts)
        width = share.tokens.shape[1]
        assert padding != "longest" or width == whole.tokens.shape[1]
        assert torch.equal(share.numbers, whole.numbers[rows])
        assert torch.equal(share.tokens, whole.tokens[rows, :width])
        assert torch.equal(share.maskable, whole.maskable[rows, :width])
        assert not whole.maskable[rows, width:].any()
    assert whole.numbers.tolist() == [20, 21, 22, 23]


def test_padding_longest_is_visible_and_trained_on():
    batch = RowBatches(Table([3, 6]), BatchSampler(2, 2, seed=0), eos_id=EOS, padding="longest").batch(0)
    short = batch.tokens[:, 3:].eq(EOS).all(1).int().argmax()
    assert batch.attention_mask is None
    assert batch.maskable[short].tolist() == [False, True, True, True, True, True]


def test_padding_by_micro_batch_is_visible_and_trained_on_up_to_its_own_longest_row():
    table, order = Table([3, 8, 5, 2, 7, 4, 6, 3]), BatchSampler(8, 4, seed=3)
    batches = RowBatches(table, order, eos_id=EOS, padding="micro_batch")
    widths = []
    for part in range(2):
        share, rows = batches.batch(0, part=part, parts=2), order.rows(0)[part * 2 : part * 2 + 2]
        lengths = [len(table.rows["input_ids"][row]) for row in rows]
        assert share.tokens.shape[1] == max(lengths)
        assert share.attention_mask is None
        for row, length in enumerate(lengths):
            assert share.tokens[row, length:].eq(EOS).all()
            assert share.maskable[row, 1:].all()
        widths.append(max(lengths))
    assert len(set(widths)) == 2  # "longest" would pad both to the wider one
    with pytest.raises(ValueError, match="set micro_batch_size"):
        SFTParams(max_steps=1, eos_padding="micro_batch")


def test_padding_none_and_a_number_hide_the_rest():
    order = BatchSampler(2, 2, seed=0)
    none = RowBatches(Table([3, 6]), order, eos_id=EOS).batch(0)
    short = none.attention_mask.sum(1).argmin()
    assert none.attention_mask[short].tolist() == [1, 1, 1, 0, 0, 0]
    assert none.maskable[short].tolist() == [False, True, True, False, False, False]
    one = RowBatches(Table([3, 6]), order, eos_id=EOS, padding=1).batch(0)
    assert one.attention_mask[short].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert one.maskable[short].tolist() == [False, True, True, True, False, False, False]
    assert one.attention_mask.sum().item() == 4 + 7


def test_a_share_of_batches_is_cut_to_a_random_length():
    batches = RowBatches(Table([16] * 8), BatchSampler(8, 4, seed=0), eos_id=EOS, random_length=0.3)
    widths = [batches.batch(step).tokens.shape[1] for step in range(200)]
    assert 30 < sum(width < 16 for width in widths) < 90
    assert widths == [batches.batch(step, part=1, parts=2).tokens.shape[1] for step in range(200)]
    assert min(widths) < 4


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="does not divide into 3 parts"):
        RowBatches(Table([2] * 4), BatchSampler(4, 4, seed=0), eos_id=EOS).batch(0, parts=3)
    with pytest.raises(ValueError, match="at least 1"):
        BatchSampler(0, 4, seed=0)
    with pytest.raises(ValueError, match="padding -1"):
        RowBatches(Table([2]), BatchSampler(1, 1, seed=0), eos_id=EOS, padding=-1)
