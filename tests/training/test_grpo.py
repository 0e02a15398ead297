"""Policy optimisation from prompts to a better policy, on a reward that a tiny model can earn."""

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset

from llada_core.sampling.params import SamplingParams
from llada_core.settings import ConfigError
from llada_core.training import grpo, rollouts
from llada_core.training.grpo import GRPO, PolicyData
from llada_core.training.params import GRPOParams
from llada_core.training.progress import Progress, read_metrics
from llada_core.training.rollouts import Completions, divergence
from llada_core.training.train import RunPaths, train
from tests.tiny import tiny_pair

SAMPLING = SamplingParams(max_new_tokens=6, block_length=6, steps=3, temperature=1.0)


def likes_low_ids(task, text, answer):
    """More of the letters a to m, more reward."""
    return sum("a" <= c <= "m" for c in text.lower()) / 6


def likes_everything(task, text, answer):
    """No answer is better than another."""
    return 1.0


def write_prompts(folder):
    """data/grpo as `prepare` writes it."""
    for part, count in (("train", 24), ("validation", 6)):
        rows = {
            "prompt_ids": [[10 + i, 20, 30][: 2 + i % 2] for i in range(count)],
            "task": ["sudoku"] * count,
            "answer": [json.dumps({"puzzle": "1" * 16})] * count,
            "prompt": [""] * count,
        }
        Dataset.from_dict(rows).save_to_disk(folder / "grpo" / part)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("data"))


def run(data, folder, follow=None, **changes):
    values = {
        "max_steps": 8,
        "prompts": 4,
        "generations": 4,
        "sampling": SAMPLING,
        "learning_rate": 3e-3,
        "log_every": 1,
        "save_every": 4,
        "samples": 0,
        "beta": 0.0,
        "reward": "tests.training.test_grpo.likes_low_ids",
    }
    model, tokenizer = tiny_pair()
    receipt = train(
        GRPOParams(**{**values, **changes}), model, tokenizer, RunPaths(data, folder), seed=1, follow=follow
    )
    return receipt, model


VARIANTS = {
    "d1": {"beta": 0.04, "iterations": 2},
    "elbo": {"likelihood": "elbo", "mask_samples": 2, "iterations": 2},
    "espo": {"likelihood": "elbo", "ratio": "sequence", "mask_samples": 2, "iterations": 2, "beta": 0.01},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reward_rises(data, tmp_path, variant):
    receipt, _ = run(data, tmp_path, max_steps=60, **VARIANTS[variant])
    rewards = [line["reward"] for line in read_metrics(tmp_path / "metrics.jsonl") if "reward" in line]
    print(rewards)
    assert sum(rewards[-5:]) > 1.3 * sum(rewards[:5])
    assert receipt.flops > 6 * receipt.parameters * receipt.tokens


@pytest.mark.parametrize("stop", [3, 4])
def test_a_stop_in_the_middle_of_a_rollout_changes_nothing(data, tmp_path, stop, monkeypatch):
    monkeypatch.setattr(GRPO, "validate", by_weights)

    def ask(line):
        if line["step"] == stop:
            (tmp_path / "cut" / "STOP").touch()

    changes = {"iterations": 3, "beta": 0.04, "sync_every": 2, "validate_every": 1, "keep": 1}
    _, whole = run(data, tmp_path / "whole", **changes)
    found = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    print([line["validation_correct"] for line in found if "validation_correct" in line])
    assert 0 < found[-1]["best_step"] < 8
    receipt, _ = run(data, tmp_path / "cut", follow=ask, **changes)
    assert receipt.steps == stop
    receipt, cut = run(data, tmp_path / "cut", **changes)
    assert receipt.finished
    assert equal(whole, cut)


def test_it_ends_once_validation_has_stopped_rising(data, tmp_path):
    receipt, _ = run(data, tmp_path, max_steps=60, learning_rate=1e-9, validate_every=2, validation_rows=4, patience=2)
    assert receipt.finished
    assert receipt.steps == 4  # nothing is better than the weights it began with, twice


def by_weights(policy, model, *_):
    """In place of answers that a tiny model never gets right: a score that goes up and down with the weights."""
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    return {"validation_correct": torch.tensor([total * 1e3 % 1.0, 1.0], dtype=torch.float64)}


def judged(monkeypatch, scores):
    """Validation of step 2n gives scores[n]."""
    calls = iter(scores)
    monkeypatch.setattr(GRPO, "validate", lambda *_: {"validation_correct": torch.tensor([next(calls), 1.0])})


@pytest.mark.parametrize("best", [0, 1, 2, 4])
def test_the_best_validated_weights_are_the_result(data, tmp_path, monkeypatch, best):
    scores = [0.25] * best + [0.5] * (5 - best)  # of equals the earliest
    judged(monkeypatch, scores)
    receipt, model = run(data, tmp_path / "whole", validate_every=2, keep=1)
    assert receipt.steps == 8
    lines = [line for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "best_step" in line]
    assert lines[-1]["best_step"] == 2 * best
    judged(monkeypatch, scores)
    wanted = run(data, tmp_path / "short", max_steps=2 * best, validate_every=2)[1] if best else tiny_pair()[0]
    assert equal(model, wanted)
    judged(monkeypatch, scores[-1:])
    _, longer = run(data, tmp_path / "whole", validate_every=2, keep=1, max_steps=10, extend=True)
    assert equal(longer, wanted)


@pytest.mark.parametrize(("validate_every", "untrained"), [(0, False), (2, True)])
def test_untrained_weights_are_never_a_silent_result(data, tmp_path, monkeypatch, validate_every, untrained):
    judged(monkeypatch, [0.5, *([0.25] * 4)])
    _, model = run(data, tmp_path, validate_every=validate_every)
    assert equal(model, tiny_pair()[0]) == untrained
    said = read_metrics(tmp_path / "metrics.jsonl")[-1]["event"]
    assert ("these are the result" if untrained else "no validation in between") in said


def test_no_task_pays_for_another():
    progress, rows = Progress(), {"sudoku": 64, "seats": 64}
    for sudoku, seats, best in ((1.0, 0.3, 0), (59 / 64, 0.9, 0), (62 / 64, 0.5, 2), (59 / 64, 0.95, 2), (1.0, 0.6, 4)):
        progress.compare((sudoku + seats) / 2, 0, {"sudoku": sudoku, "seats": seats}, rows)
        assert progress.best_step == best
        progress.step += 1


def test_a_step_that_loses_a_task_is_not_kept(data, tmp_path, monkeypatch):
    calls = iter([(0.5, 1.0), (0.9, 0.2), (0.6, 1.0), (0.1, 1.0), (0.1, 1.0)])

    def validate(*_):
        names = ("validation_correct", "validation_correct_sudoku")
        return {name: torch.tensor([share, 1.0]) for name, share in zip(names, next(calls), strict=True)}

    monkeypatch.setattr(GRPO, "validate", validate)
    run(data, tmp_path, validate_every=2)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["best_step"] == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_policy_starts_at_its_reference(data, tmp_path, precision):
    AcceleratorState._reset_state()
    run(data, tmp_path, max_steps=1, beta=0.04, precision=precision)
    assert [line["kl"] for line in read_metrics(tmp_path / "metrics.jsonl") if "kl" in line] == [0.0]
    AcceleratorState._reset_state()


def test_a_damaged_best_step_is_told(data, tmp_path, monkeypatch):
    judged(monkeypatch, [0.5, 0.1, 0.1, 0.1, 0.1])
    run(data, tmp_path, validate_every=2)
    next((tmp_path / "checkpoints" / "step-00000000").glob("shard-*")).write_bytes(b"")
    with pytest.raises(OSError, match="step-00000000, the best step by validation, is damaged"):
        run(data, tmp_path, validate_every=2)


def test_one_token_that_was_unlearnt_does_not_outweigh_the_others():
    gap = torch.linspace(-4, 1, 21)
    torch.testing.assert_close(divergence(gap), gap.exp() - gap - 1)  # d1's estimate
    far = torch.tensor([1.0, 1.5, 8.0, 200.0], requires_grad=True)
    value = divergence(far)
    value.sum().backward()
    torch.testing.assert_close(far.grad, torch.full((4,), math.e - 1))
    assert (value.diff() > 0).all()


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_rewards_that_do_not_differ_move_nothing(data, tmp_path):
    _, model = run(data, tmp_path, reward="tests.training.test_grpo.likes_everything", iterations=2, keep_best=False)
    assert equal(model, tiny_pair()[0])


def test_rewards_that_do_not_differ_leave_the_pull_to_the_reference(data):
    gradients = {}
    for beta in (0.0, 0.5):
        model, tokenizer = tiny_pair()
        params = GRPOParams(max_steps=1, prompts=2, generations=2, sampling=SAMPLING, beta=beta)
        table = Dataset.load_from_disk(str(data / "grpo" / "train"))
        policy = GRPO(model, PolicyData(table, table, tokenizer, likes_everything), params, seed=0)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.1)  # away from the reference
        for batch in policy.work(model, 0, 0, 1).batches:
            policy.loss(model, batch).sum.backward()
        gradients[beta] = sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
    assert gradients[0.0] == 0
    assert gradients[0.5] > 0


class Alone:
    """One of several ranks, without the others: what they would add is left out."""

    def __init__(self, index, count):
        self.index, self.count = index, count

    def join(self, part, start, total):
        whole = torch.zeros(total, *part.shape[1:])
        whole[start : start + len(part)] = part
        return whole


def with_rollout(model, advantages, ranks=(0, 1), **changes):
    """A policy that has collected its first rollout: rows of five tokens, the last three written."""
    values = {"max_steps": 1, "prompts": 2, "generations": 2, "sampling": SAMPLING, "beta": 0.0, **changes}
    policy = GRPO(model, PolicyData([0, 1], [], None, likes_everything), GRPOParams(**values), seed=0)
    tokens = torch.randint(10, 110, (len(advantages), 5), generator=torch.Generator().manual_seed(1))
    written = (torch.arange(5) >= 2).expand(tokens.shape)
    policy._rollout = Completions(tokens, torch.ones_like(tokens), written, written, torch.tensor(advantages))
    policy._number, policy.ranks = 0, Alone(*ranks)
    return policy


@pytest.fixture
def forwards(monkeypatch):
    """The number of rows of every forward, in order."""
    found, real = [], grpo.token_log_probabilities

    def counted(model, rows, *rest):
        found.append(len(rows.tokens))
        return real(model, rows, *rest)

    monkeypatch.setattr(grpo, "token_log_probabilities", counted)
    return found


@pytest.mark.parametrize("samples", [1, 2])
def test_each_rank_scores_the_old_policy_on_its_own_rows_in_micro_batches(forwards, samples):
    model, _ = tiny_pair()
    changes = {"iterations": 3, "likelihood": "elbo", "mask_samples": samples}
    advantages = [1.0, -1.0, 0.0, 0.5, -0.5, 2.0, 1.0]  # the third can change nothing
    whole = with_rollout(model, advantages, **changes)
    fed = whole._remember_old(model, 0)
    assert forwards == [6 * samples] * 2
    assert fed == 2 * 6 * samples * 5
    assert whole._old[:, 2].eq(0).all()
    parts = []
    for rank in range(2):
        forwards.clear()
        policy = with_rollout(model, advantages, (rank, 2), micro_batch_size=2, **changes)
        assert policy._remember_old(model, 0) == fed / 2
        assert forwards == [2 * samples, samples] * 2
        parts.append(policy._old)
    torch.testing.assert_close(sum(parts), whole._old)


@pytest.mark.parametrize("likelihood", ["elbo", "one_forward"])
def test_micro_batches_hold_rows_of_like_length_without_their_padding(likelihood):
    """Prompts of 0 to 4 tokens behind padding: the sum of the parts is that of the whole, with fewer positions."""
    model, _ = tiny_pair()
    found = {}
    for micro in (None, 2):
        policy = with_rollout(
            model, [1.0, -1.0, 0.5, -0.5, 2.0], likelihood=likelihood, iterations=2, beta=0.0, micro_batch_size=micro
        )
        rollout = policy._rollout
        padding = torch.tensor([0, 2, 1, 2, 0])
        attention = (torch.arange(5) >= padding[:, None]).long()
        policy._rollout = replace(rollout, attention=attention)
        policy._remember_old(model, 0)
        work = policy.work(model, 1, 0, 1)
        assert (policy._old != 0).any()
        losses = [policy.loss(model, batch) for batch in work.batches]
        model.zero_grad()
        sum(loss.sum for loss in losses).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[micro] = sum(float(loss.sum.detach()) for loss in losses), gradient, work.tokens, policy._old
    assert found[None][0] == pytest.approx(found[2][0], rel=1e-5)
    torch.testing.assert_close(found[None][1], found[2][1], atol=3e-5, rtol=1e-3)
    torch.testing.assert_close(found[None][3], found[2][3], atol=1e-5, rtol=1e-4)
    assert found[None][2] == 5 * 5
    assert found[2][2] == 2 * 3 + 2 * 5 + 5  # two with 2 of padding, 1 and 0, 0


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_rank_without_rows_runs_one_that_counts_nothing(forwards, ratio):
    model, _ = tiny_pair()
    changes = {"likelihood": "elbo", "mask_samples": 2, "ratio": ratio, "iterations": 2}
    policy = with_rollout(model, [0.0, 1.0, 0.0, -1.0, 0.5], (1, 2), micro_batch_size=1, **changes)
    policy._remember_old(model, 0)
    assert forwards == [2, 2]
    for update in range(2):
        work = policy.work(model, update, 1, 2)
        assert [len(batch.rows.tokens) for batch in work.batches] == [2, 2]
        assert work.tokens == 10
        nothing = policy.loss(model, work.batches[1])
        nothing.sum.backward()
        assert all(part.tolist() == [0.0, 0.0] for part in nothing.parts.values())
        assert sum(float(p.grad.abs().sum()) for p in model.parameters()) == 0


def test_validation_samples_no_more_at_once_than_a_rollout(data, tmp_path, monkeypatch):
    sizes, real = [], grpo.sample
    monkeypatch.setattr(grpo, "sample", lambda *a, **k: sizes.append(len(a[2])) or real(*a, **k))
    run(data, tmp_path, max_steps=1, prompts=1, generations=4)
    assert sizes == [4, 2, 4, 4, 2]  # six held-out prompts, a rollout, and these once more


def test_a_task_without_a_verifier_is_judged_by_its_reward(data, tmp_path):
    for part in ("train", "validation"):
        table = Dataset.load_from_disk(str(data / "grpo" / part))
        table = table.remove_columns("task").add_column("task", ["poem"] * len(table))
        table.save_to_disk(str(tmp_path / "data" / "grpo" / part))
    receipt, _ = run(tmp_path / "data", tmp_path / "run", max_steps=2, validate_every=1)
    assert receipt.finished
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert not any("correct" in name for line in lines for name in line)
    judged_by = [line for line in lines if "validation_reward" in line]
    assert [line["step"] for line in judged_by] == [0, 1, 2]
    best = max(judged_by, key=lambda line: line["validation_reward"])
    assert judged_by[-1]["best_step"] == best["step"]
    with pytest.raises(ConfigError, match=r"task 'poem' has none: give a function"):
        run(tmp_path / "data", tmp_path / "other", reward="default")


def test_long_prompts_lose_their_beginning(data, tmp_path, monkeypatch):
    table = Dataset.load_from_disk(str(data / "grpo" / "train"))
    assert [p.ids for p in rollouts.prompts_of(table, [0, 1], 2)] == [[10, 20], [20, 30]]
    assert rollouts.prompts_of(table, [1])[0].ids == [11, 20, 30]
    lengths, real = set(), rollouts.generate
    monkeypatch.setattr(
        rollouts, "generate", lambda m, p, *s, **how: lengths.update(map(len, p)) or real(m, p, *s, **how)
    )
    run(data, tmp_path, max_steps=1, max_prompt_length=1, samples=2)
    assert lengths == {1}


def ending(every, sampled):
    """As `sampled`, with an end token in the first place of every n-th completion alone."""
    tokens, scored, ended = sampled.tokens.clone(), sampled.scored.clone(), torch.zeros_like(sampled.ended)
    ended[::every] = True
    first = sampled.written.long().argmax(1)
    scored[:] = sampled.written
    for row in ended.nonzero()[:, 0]:
        scored[row, first[row] + 1 :] = False
    return replace(sampled, tokens=tokens, scored=scored, ended=ended)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_truncated_completions_move_nothing_when_they_are_masked(data, monkeypatch, ratio):
    real = grpo.sample
    monkeypatch.setattr(grpo, "sample", lambda *a, **k: ending(2, real(*a, **k)))
    table, gradients, counts = Dataset.load_from_disk(str(data / "grpo" / "train")), {}, {}
    for masked in (False, True):
        model, tokenizer = tiny_pair()
        params = GRPOParams(
            max_steps=1, prompts=2, generations=4, sampling=SAMPLING, ratio=ratio, likelihood="elbo", beta=0.1,
            mask_truncated_completions=masked,
        )  # fmt: skip
        policy = GRPO(model, PolicyData(table, table, tokenizer, likes_low_ids), params, seed=0)
        work = policy.work(model, 0, 0, 1)
        counts[masked] = work.counts
        assert work.notes["completion_tokens"] == (1 + 6) / 2
        assert work.notes["tokens_per_forward"] == (1 + 6) / 2 / SAMPLING.steps, "what stands behind an end is no token"
        assert work.notes.get("truncated") == (0.5 if masked else None)
        rows = work.batches[0].rows
        assert rows.scored.any(1).tolist() == [True, not masked] * 4
        assert not masked or rows.advantages[1::2].eq(0).all()
        policy.loss(model, work.batches[0]).sum.backward()
        gradients[masked] = model.get_output_embeddings().weight.grad.clone()
    assert counts == {False: [8.0 if ratio == "sequence" else 28.0], True: [4.0]}
    assert not torch.equal(gradients[False], gradients[True])
