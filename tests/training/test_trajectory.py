"""GRPO of models that attend by blocks: log-probabilities on the canvases that were sampled, against brute force."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from llada_core.modeling.attention import BlockCausal
from llada_core.sampling import generate, stream
from llada_core.sampling.params import SamplingParams
from llada_core.tokenizer import SpecialTokens
from llada_core.training.grpo import GRPO, PolicyData, objective
from llada_core.training.params import DistributionParams, GRPOParams
from llada_core.training.progress import read_metrics
from llada_core.training.rollouts import Completions, Prompt, sample_traced, token_log_probabilities
from llada_core.training.train import RunPaths, train
from llada_core.training.trajectory import local_steps, row_width, traced
from tests.tiny import tiny_model, tiny_pair
from tests.training.test_grpo import equal, likes_everything, write_prompts
from tests.training.test_ranks import launch, same, scenario

PROMPTS = [[10], [11, 12, 13, 14, 15], [16, 17], [18, 19, 20]]
WAYS = {
    "even": {"steps": 3},
    "a token a step": {"steps": 9},
    "threshold": {"steps": 9, "threshold": 0.012},
    "llada2.0": {"steps": 3, "sampler": "llada2.0", "threshold": 0.012},
    "cached": {"steps": 9, "threshold": 0.012, "cache": "prefix"},
}


def asked(**how):
    return SamplingParams(**{"max_new_tokens": 9, "block_length": 4, "temperature": 1.0, "seed": 3, **how})


def policy_of(model, trace, lengths, **changes):
    """A policy that has collected a rollout of these rows, all of them scored but for what is for nobody."""
    values = {
        "max_steps": 1,
        "prompts": 2,
        "generations": 2,
        "sampling": asked(steps=9),
        "beta": 0.0,
        "likelihood": "trajectory",
    }
    policy = GRPO(model, PolicyData([0, 1], [], None, likes_everything), GRPOParams(**values | changes), seed=0)
    places, tokens = torch.arange(trace.chosen.shape[1]), trace.chosen
    written = trace.when >= 0
    scored = written & (places < torch.tensor(lengths)[:, None] + policy.params.sampling.max_new_tokens)
    ends = torch.tensor([len(answer.request.tokens) for answer in trace.answers])
    attention = (places < ends[:, None]).long()
    advantages = torch.linspace(-1, 1, len(tokens))
    policy._rollout, policy._number = Completions(tokens, attention, scored, written, advantages, trace.when), 0
    return policy


def replayed(model, chosen, when, length, mask_id):
    """log p of every written token on the whole canvas of its step, a forward for each step of each row; (R, W) float64."""
    found = torch.zeros(chosen.shape, dtype=torch.float64)
    for row, (tokens, steps) in enumerate(zip(chosen, when, strict=True)):
        for step in range(int(steps.max()) + 1):
            canvas = torch.where(steps >= step, mask_id, tokens)[None]
            log_p = model(canvas, block_causal=BlockCausal(length)).logits[0].double().log_softmax(-1)
            here = (steps == step).nonzero()[:, 0]
            found[row, here] = log_p[here, tokens[here]]
    return found


def on_the_whole(policy, values):
    """(samples * R, T) log-probabilities of `policy`'s first micro-batch as (R, W): each token is asked for in one sample."""
    share = policy.work(None, 0, 0, 1).batches[0]
    whole = torch.zeros(policy._rollout.tokens.shape, dtype=torch.float64)
    order = policy._own(0, 1)
    parts = values(share).double().view(share.masks.samples, len(order), -1)
    assert ((parts != 0).sum(0) <= 1).all()
    whole[order[:, None], torch.arange(share.columns.start, share.columns.stop)] = parts.sum(0)
    return whole


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llada_blocks", "llada2"])
def test_the_steps_are_those_of_the_sampler(kind, way):
    model, params = tiny_model(kind, block_length=4).double(), asked(**WAYS[way])
    found = traced(model, PROMPTS, params, width=row_width(5, params, model), at_once=3)
    steps = list(stream(model, PROMPTS, params))
    for row, prompt in enumerate(PROMPTS):
        own, total = slice(14 - 9 - len(prompt), None), len(prompt) + 9
        for number, step in enumerate(steps):
            written = step.committed[row, own].nonzero()[:, 0]
            assert (found.when[row, :total] == number).nonzero()[:, 0].tolist() == written.tolist()
        assert torch.equal(found.chosen[row, :total], steps[-1].tokens[row, own])
    assert found.forwards >= len(steps)
    assert [a.tokens[:10].tolist() for a in found.answers[:1]] == [
        generate(model, PROMPTS, params).tokens[0, 4:].tolist()
    ]


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llada_blocks", "llada2"])
def test_log_probabilities_are_those_of_the_sampled_canvases(kind, way):
    """One forward for the n-th steps of all blocks is what a forward for each step of each row says."""
    model, params = tiny_model(kind, block_length=4).double(), asked(**WAYS[way])
    trace = traced(model, PROMPTS, params, width=row_width(5, params, model), at_once=None)
    policy = policy_of(model, trace, [len(p) for p in PROMPTS], sampling=params)
    found = on_the_whole(policy, lambda share: token_log_probabilities(model, share.rows, share.masks, 126, 4))
    wanted = replayed(model, trace.chosen, trace.when, 4, 126)
    assert_close(found, torch.where(policy._rollout.scored, wanted, 0.0), atol=2e-6, rtol=1e-6)
    most = 4 if way == "a token a step" else 3
    assert 1 < policy._samples() <= (most if "threshold" not in WAYS[way] else 4)


def every_completion(vocabulary):
    """All answers of three tokens to one prompt of one."""
    answers = torch.tensor(list(itertools.product(range(vocabulary), repeat=3)))
    return torch.cat([torch.full((len(answers), 1), 5), answers], 1)


SMALL = SpecialTokens(mask_id=7, eos_id=6, pad_id=6)


@pytest.mark.parametrize("order", [(-1, 0, 1, 1), (-1, 0, 1, 2), (-1, 0, 2, 1)])
def test_the_gradient_is_that_of_the_expected_reward(order):
    """Over all completions of a tiny vocabulary, in a block of two behind half of one: what the loss says is the derivative
    of the reward that is expected.
    """
    model = tiny_model("llada_blocks", vocab_size=8, special=SMALL, block_length=2).double()
    chosen = every_completion(8)
    when = torch.tensor(order).repeat(len(chosen), 1)
    rewards = (chosen[:, 1:] * torch.tensor([1, 3, 2])).sum(1) % 5 / 5
    # Brute force: a forward for each step of the whole row.
    log_p = torch.zeros(len(chosen), dtype=torch.float64)
    for step in range(max(order) + 1):
        canvas = torch.where(when >= step, 7, chosen)
        logits = model(canvas, block_causal=BlockCausal(2)).logits.double().log_softmax(-1)
        log_p = log_p + (logits.gather(-1, chosen[..., None])[..., 0] * (when == step)).sum(1)
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    (log_p.exp() * rewards).sum().backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    params = GRPOParams(
        max_steps=1, prompts=2, generations=2, beta=0.0, likelihood="trajectory",
        sampling=SamplingParams(max_new_tokens=3, block_length=2, steps=2, temperature=1.0),
    )  # fmt: skip
    policy = GRPO(model, PolicyData([0, 1], [], None, likes_everything), params, seed=0)
    weighted = (log_p.exp() * rewards).detach().float()
    written = when >= 0
    policy._rollout = Completions(chosen, torch.ones_like(chosen), written, written, weighted, when)
    policy._number = 0
    work = policy.work(model, 0, 0, 1)
    policy.loss(model, work.batches[0]).sum.backward()
    found = -torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert wanted.abs().max() > 1e-3
    assert_close(found, wanted, atol=1e-6, rtol=1e-3)


def test_the_gradient_is_the_slope_of_the_loss():
    model, params = tiny_model("llada2", block_length=4).double(), asked(steps=9)
    trace = traced(model, PROMPTS, params, width=row_width(5, params, model), at_once=None)
    policy = policy_of(model, trace, [len(p) for p in PROMPTS], iterations=2)
    policy._remember_old(model, 0)
    share = policy.work(model, 1, 0, 1).batches[0]
    weight = (
        model.blocks[0].attn_out.weight if hasattr(model.blocks[0], "attn_out") else next(model.blocks[0].parameters())
    )
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
    policy.loss(model, share).sum.backward()
    slope, ends = (weight.grad * direction).sum(), []
    with torch.no_grad():
        for by in (1e-3, -2e-3):
            weight.add_(direction, alpha=by)
            ends.append(float(policy.loss(model, share).sum))
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(float(slope), rel=2e-2)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_ratio_is_one_until_the_weights_move(ratio):
    model, params = tiny_model("llada_blocks", block_length=4), asked(steps=9)
    trace = traced(model, PROMPTS, params, width=row_width(5, params, model), at_once=None)
    policy = policy_of(model, trace, [len(p) for p in PROMPTS], iterations=3, ratio=ratio)
    policy._remember_old(model, 0)
    assert policy._old.shape[0] == 1  # all updates have the same canvases
    for update in range(3):
        work = policy.work(model, update, 0, 1)
        (share,) = work.batches
        assert (share.old is None) == (update == 0)
        now = token_log_probabilities(model, share.rows, share.masks, 126, 4)
        assert_close(now.detach(), now.detach() if share.old is None else share.old, atol=2e-6, rtol=0.0)
        loss = policy.loss(model, share)
        assert loss.parts["clipped"][0] == 0
        rows = policy._rollout
        counted = rows.scored.sum() if ratio == "token" else len(rows.tokens)
        assert work.counts == [float(counted)]
        assert loss.parts["loss"][1] == counted
        each = rows.scored.sum(1) if ratio == "token" else torch.ones(len(rows.tokens))
        assert float(loss.sum.detach()) == pytest.approx(-float((rows.advantages * each).sum()), abs=1e-5)


def test_a_ratio_by_sequence_is_that_of_all_its_tokens():
    model, params = tiny_model("llada_blocks", block_length=4), asked(steps=9)
    trace = traced(model, PROMPTS, params, width=row_width(5, params, model), at_once=None)
    policy = policy_of(model, trace, [len(p) for p in PROMPTS], iterations=2, ratio="sequence", epsilon=1e6)
    policy._remember_old(model, 0)
    with torch.no_grad():
        before = replayed(model, trace.chosen, trace.when, 4, 126)
        model.get_output_embeddings().weight.mul_(1.2)
        after = replayed(model, trace.chosen, trace.when, 4, 126)
        loss = policy.loss(model, policy.work(model, 1, 0, 1).batches[0])
    rows = policy._rollout
    ratios = (((after - before) * rows.scored).sum(1) / rows.scored.sum(1)).exp()
    assert float(loss.sum) == pytest.approx(-float((ratios * rows.advantages).sum()), rel=1e-4)


@pytest.mark.parametrize("likelihood", ["trajectory", "elbo", "one_forward"])
def test_micro_batches_sum_to_the_whole(likelihood):
    model, params = tiny_model("llada2", block_length=4), asked(steps=9)
    trace, found = traced(model, PROMPTS, params, width=row_width(5, params, model), at_once=None), {}
    for micro in (None, 1):
        policy = policy_of(
            model, trace, [len(p) for p in PROMPTS], iterations=2, likelihood=likelihood, micro_batch_size=micro,
            mask_samples=2, beta=0.0,
        )  # fmt: skip
        policy._remember_old(model, 0)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.01)
        work = policy.work(model, 1, 0, 1)
        model.zero_grad()
        sum(policy.loss(model, batch).sum for batch in work.batches).backward()
        found[micro] = model.get_output_embeddings().weight.grad.clone(), work.tokens
        with torch.no_grad():
            model.get_output_embeddings().weight.div_(1.01)
    assert_close(found[None][0], found[1][0], atol=1e-5, rtol=1e-3)
    assert found[1][1] < found[None][1]  # blocks behind the scored ones are left out


@torch.no_grad()
def test_what_stands_behind_an_end_is_as_it_was_when_others_were_chosen():
    model, tokenizer = tiny_pair("llada_blocks", block_length=4)
    head = model.get_output_embeddings().weight
    head[tokenizer.special.eos_id] *= 20  # at half of the places it is likely
    prompts = [Prompt(ids, "sudoku", {}) for ids in PROMPTS * 8]
    settings = asked(steps=9, stop_at_eos=True, remasking="random")
    chosen, final = (
        sample_traced(model, tokenizer, prompts, settings, width=5, at_once=7, as_chosen=as_chosen)
        for as_chosen in (True, False)
    )
    assert chosen.ended.any()
    assert chosen.texts == final.texts
    assert torch.equal(chosen.tokens[chosen.scored], final.tokens[chosen.scored])
    assert not torch.equal(chosen.tokens, final.tokens)
    behind = final.written & ~final.scored & final.ended[:, None]
    assert final.tokens[behind].eq(tokenizer.special.eos_id).float().mean() > 0.5
    wanted = replayed(model, chosen.tokens, chosen.when, 4, tokenizer.special.mask_id)
    rows = Completions(*chosen.tensors()[:4], torch.ones(len(prompts)), chosen.when)
    policy = GRPO(
        model, PolicyData([0, 1], [], None, likes_everything), GRPOParams(max_steps=1, prompts=2, beta=0.0, sampling=settings, likelihood="trajectory"), seed=0
    )  # fmt: skip
    policy._rollout, policy._number = rows, 0
    mask_id = tokenizer.special.mask_id
    found = on_the_whole(policy, lambda share: token_log_probabilities(model, share.rows, share.masks, mask_id, 4))
    assert_close(found, torch.where(chosen.scored, wanted, 0.0), atol=1e-4, rtol=1e-4)


def test_steps_within_blocks():
    when = torch.tensor([[-1, -1, 0, 2, 3, 3, 7, 5], [-1, 1, 0, 1, 2, 3, 4, 4]])
    assert local_steps(when, 4).tolist() == [[-1, -1, 0, 1, 0, 0, 2, 1], [-1, 1, 0, 1, 0, 1, 2, 2]]
    assert local_steps(when[:, :6], 4).tolist() == [[-1, -1, 0, 1, 0, 0], [-1, 1, 0, 1, 0, 1]]
    assert local_steps(when, 1).eq(torch.where(when < 0, -1, 0)).all()


def likes_low_ids(task, text, answer):
    """More of the letters a to m, more reward."""
    return sum("a" <= c <= "m" for c in text.lower()) / 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("data"))


SAMPLED = {"max_new_tokens": 6, "block_length": 4, "steps": 6, "temperature": 1.0}


def run(data, folder, follow=None, kind="llada_blocks", **changes):
    values = {
        "max_steps": 8, "prompts": 4, "generations": 4, "sampling": SamplingParams(**SAMPLED), "learning_rate": 3e-3,
        "log_every": 1, "save_every": 4, "samples": 0, "beta": 0.0, "reward": "tests.training.test_trajectory.likes_low_ids",
        "likelihood": "trajectory", "router_balance": 0.0, "router_z": 0.0, "validation_rows": 2, "keep_best": False,
    }  # fmt: skip
    model, tokenizer = tiny_pair(kind, block_length=4)
    params = GRPOParams(**{**values, **changes})
    receipt = train(params, model, tokenizer, RunPaths(data, folder), seed=1, follow=follow)
    return receipt, model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llada_blocks", {"iterations": 2, "beta": 0.04}),
        ("llada2", {"merge_steps": 2}),
        ("llada_blocks", {"likelihood": "elbo", "mask_samples": 2, "ratio": "sequence", "iterations": 2}),
        ("llada_blocks", {"likelihood": "one_forward"}),
    ],
)
def test_the_reward_rises(data, tmp_path, kind, changes):
    receipt, _ = run(data, tmp_path, kind=kind, max_steps=50, **changes)
    rewards = [line["reward"] for line in read_metrics(tmp_path / "metrics.jsonl") if "reward" in line]
    print(rewards)
    assert sum(rewards[-5:]) > 1.3 * sum(rewards[:5])
    assert receipt.flops > 6 * receipt.parameters * receipt.tokens


@pytest.mark.parametrize("stop", [3, 4])
def test_a_stop_in_the_middle_of_a_rollout_changes_nothing(data, tmp_path, stop):
    def ask(line):
        if line["step"] == stop:
            (tmp_path / "cut" / "STOP").touch()

    changes = {"iterations": 3, "beta": 0.04, "sync_every": 2, "keep": 1}
    _, whole = run(data, tmp_path / "whole", **changes)
    receipt, _ = run(data, tmp_path / "cut", follow=ask, **changes)
    assert receipt.steps == stop
    receipt, cut = run(data, tmp_path / "cut", **changes)
    assert receipt.finished
    assert equal(whole, cut)


@pytest.mark.slow
def test_two_ranks_are_one(data, tmp_path):
    changes = {
        "stage": "grpo", "max_steps": 6, "prompts": 2, "generations": 3, "iterations": 3, "beta": 0.0, "validate_every": 3,
        "reward": "tests.training.test_trajectory.likes_low_ids", "likelihood": "trajectory", "sampling": SAMPLED,
        "validation_rows": 2, "keep_best": False,
    }  # fmt: skip
    shape = {"shape": {"block_length": 4}}
    launch(tmp_path, 1, [scenario(data, tmp_path / "one", model="llada_blocks", **changes) | shape])
    two = changes | {"distribution": {"kind": "ddp"}, "micro_batch_size": 1}
    launch(tmp_path, 2, [scenario(data, tmp_path / "two", model="llada_blocks", **two) | shape])
    same(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sampling": SamplingParams(**SAMPLED, rule="own.rule")}, r"sampling\.rule own\.rule may replace what is written"),
        ({"sampling": SamplingParams(**SAMPLED, sampler="llada2.1", threshold=0.9)}, r"sampling\.sampler llada2\.1 may replace"),
        ({"likelihood": "elbo", "merge_steps": 2}, "merge_steps is of likelihood trajectory, not of elbo"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_told(changes, told):
    with pytest.raises(ValueError, match=told):
        GRPOParams(**{"max_steps": 1, "likelihood": "trajectory", "sampling": SamplingParams(**SAMPLED), **changes})


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("llada", {}, "likelihood trajectory is for models that attend by blocks; llada sees every position"),
        ("llada_blocks", {"sampling": replace(SamplingParams(**SAMPLED), block_length=6)}, r"sampling\.block_length 6: this model attends by blocks of 4"),
        ("llada2", {"distribution": DistributionParams(kind="fsdp")}, "use ddp or zero2, not distribution fsdp"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_told(data, kind, changes, told):
    values = {"max_steps": 1, "likelihood": "trajectory", "sampling": SamplingParams(**SAMPLED), "beta": 0.0, **changes}
    length = {} if kind == "llada" else {"block_length": 4}
    with pytest.raises(ValueError, match=told):
        objective(GRPOParams(**values), tiny_model(kind, **length), None, data / "grpo", seed=0)
