"""Kept answers: resuming after a kill, several ranks without a collective, batches that do not fit."""

import json

import pytest
import torch

from llada_core.evaluation.answering import AnswerStore, Shard, answer_all, keys_of

BATCHES = [[0, 1], [2, 3], [4]]
KEYS = [f"k{i}" for i in range(5)]


class Worker:
    """Answers i with its square and remembers what it was asked; dies at `until`."""

    def __init__(self, until: int | None = None) -> None:
        self.asked, self.until = [], until

    def __call__(self, numbers):
        if len(self.asked) == self.until:
            raise KeyboardInterrupt
        self.asked.append(list(numbers))
        return [{"square": i * i} for i in numbers]


def squares(store):
    return [store.get(key, {}).get("square") for key in KEYS]


def test_a_killed_evaluation_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        answer_all(BATCHES, KEYS, Worker(until=2), AnswerStore(tmp_path))
    path = tmp_path / "answers-00000-of-00001.jsonl"
    path.write_bytes(path.read_bytes() + b'{"keys": ["k4"], "ans')  # and was killed while it wrote
    store, worker = AnswerStore(tmp_path), Worker()
    answer_all(BATCHES, KEYS, worker, store)
    assert worker.asked == [[4]]
    assert squares(store) == squares(AnswerStore(tmp_path)) == [0, 1, 4, 9, 16]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3


def test_ranks_share_the_batches_and_the_first_has_all_answers(tmp_path):
    second = Worker()
    answer_all(BATCHES, KEYS, second, AnswerStore(tmp_path, Shard(1, 2)))
    assert second.asked == [[2, 3]]
    first, store = Worker(), AnswerStore(tmp_path, Shard(0, 2))
    answer_all(BATCHES, KEYS, first, store)
    assert first.asked == [[0, 1], [4]]
    assert squares(store) == [0, 1, 4, 9, 16]


def test_what_a_dead_rank_left_is_done_by_the_first(tmp_path):
    worker, store = Worker(), AnswerStore(tmp_path, Shard(0, 3))
    answer_all(BATCHES, KEYS, worker, store, patience=0.0)
    assert worker.asked == [[0, 1], [2, 3], [4]]
    assert squares(store) == [0, 1, 4, 9, 16]


def test_a_batch_that_does_not_fit_is_halved():
    sizes = []

    def work(numbers):
        sizes.append(len(numbers))
        if len(numbers) > 1:
            raise torch.OutOfMemoryError
        return [{"square": i * i} for i in numbers]

    store = AnswerStore()
    answer_all(BATCHES, KEYS, work, store)
    assert squares(store) == [0, 1, 4, 9, 16]
    assert sizes == [2, 1, 1, 2, 1, 1, 1]


def test_one_that_does_not_fit_alone_is_an_error():
    def work(numbers):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        answer_all([[0]], KEYS, work, AnswerStore())


def test_keys_tell_equal_requests_apart_and_do_not_depend_on_others():
    same = ("context", {"until": ["."]})
    keys = keys_of("generate_until", [same, ("other", {}), same])
    assert len(set(keys)) == 3
    assert keys_of("generate_until", [same])[0] == keys[0]
    assert keys_of("loglikelihood", [same])[0] != keys[0]


def test_the_launcher_says_which_share_is_ours(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Shard.of_process() == Shard(0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Shard.of_process() == Shard(3, 8)
