"""Losses and gradients equal those of ML-GSAI's guideline, dllm's MDLMTrainer and d1, recorded in tests/golden."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llada_core.data.batches import Batch
from llada_core.modeling import load_model
from llada_core.sampling.denoiser import GuidedDenoiser, PlainDenoiser
from llada_core.sampling.query import Query
from llada_core.settings import NoiseParams
from llada_core.tokenizer import SpecialTokens
from llada_core.training.objectives import DiffusionObjective
from llada_core.training.params import GRPOParams, PretrainParams
from llada_core.training.rollouts import Completions, Masks, group_advantages, policy_loss, token_log_probabilities

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
SPECIAL = SpecialTokens(mask_id=126, eos_id=120, pad_id=120, bos_id=121, eot_id=122)


def arrays(name):
    with np.load(GOLDEN / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


LOSS, POLICY = arrays("loss.npz"), arrays("grpo.npz")


@pytest.fixture
def model():
    return load_model(GOLDEN / "llada_tiny", special_tokens=SPECIAL)


def batch(tokens, maskable, attention_mask=None):
    return Batch(tokens, maskable.bool(), attention_mask, None, torch.arange(len(tokens)))


def loss_of(model, rows, u_t, uniforms, normalise="token", right_shift=False, **noise):
    params = PretrainParams(max_steps=1, normalise=normalise, right_shift=right_shift, noise=NoiseParams(**noise))
    objective = DiffusionObjective(model, None, None, params, seed=0)
    t = params.noise.epsilon + (1 - params.noise.epsilon) * u_t
    found = objective.noisy_loss(model, rows, t, uniforms)
    return found.sum / found.parts["loss"][1]


def guideline(model, kind, width=None):
    ids = LOSS[f"{kind}_input_ids"][:, :width]
    answer = torch.arange(ids.shape[1]) >= (LOSS["sft_prompt_lengths"][:, None] if kind == "sft" else 0)
    rows = batch(ids, answer.expand(ids.shape))
    return loss_of(model, rows, LOSS["pt_u_t"], LOSS["pt_u_mask"][:, :width], "sequence" if kind == "sft" else "token")


def dllm(model, task, bos=False, **settings):
    ids = LOSS["pt_input_ids" if task == "pt" else "sft_input_ids"]
    labels = {"pt": ids, "sft_padded_eos_visible": LOSS["dllm_sft_labels"]}.get(task)
    mask = None
    if labels is None:
        mask = LOSS["dllm_sft_attention_mask"]
        labels = torch.where(mask == 1, LOSS["dllm_sft_labels"], -100)
    if bos:
        ids, labels = (
            torch.cat([torch.full_like(ids[:, :1], 121), ids], 1),
            torch.nn.functional.pad(labels, (1, 0), value=-100),
        )
        mask = None if mask is None else torch.nn.functional.pad(mask, (1, 0), value=1)
    uniforms = LOSS["dllm_u_mask_bos" if bos else "dllm_u_mask"]
    return loss_of(model, batch(ids, labels != -100, mask), LOSS["dllm_u_t"], uniforms, **settings)


@pytest.mark.parametrize(
    ("kind", "width", "name"), [("pt", None, "pt_loss"), ("sft", None, "sft_loss"), ("pt", 9, "pt_truncated9_loss")]
)
def test_the_guideline_losses(model, kind, width, name):
    assert float(guideline(model, kind, width).detach()) == pytest.approx(float(LOSS[name]), rel=1e-4)


@pytest.mark.parametrize("case", CASES["dllm_losses"], ids=lambda c: "-".join(str(v) for v in list(c.values())[:5]))
def test_the_dllm_losses(model, case):
    loss = dllm(
        model, case["task"], case["bos_prepended"], normalise=case["loss_norm_type"], right_shift=case["right_shift_logits"],
        schedule=case["scheduler"], weight={"scheduler": "elbo", "uniform": "uniform"}[case["loss_weight_type"]],
    )  # fmt: skip
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-4)


@pytest.mark.parametrize("name", CASES["grad_l2_norms"])
def test_the_gradient_of_every_parameter(model, name):
    by_name = {"pretrain_guideline": lambda: guideline(model, "pt"), "sft_guideline": lambda: guideline(model, "sft")}
    by_name.get(name, lambda: dllm(model, name.removeprefix("dllm_")))().backward()
    norms = {key: float(p.grad.norm()) for key, p in model.named_parameters()}
    assert norms == pytest.approx(CASES["grad_l2_norms"][name], rel=1e-3)


def completions():
    prompt, answer = POLICY["prompt_ids"], POLICY["completion_ids"]
    tokens = torch.cat([prompt, answer], 1)
    written = torch.arange(tokens.shape[1]).expand(tokens.shape) >= prompt.shape[1]
    scored = torch.cat([torch.zeros_like(prompt).bool(), POLICY["completion_mask"].bool()], 1)
    return Completions(tokens, torch.ones_like(tokens), scored, written, POLICY["advantages_no_std"])


def masks(rows, iteration):
    masked = rows.written.clone()
    masked[:, : POLICY["prompt_ids"].shape[1]] = POLICY["prompt_mask_patterns"][iteration]
    return Masks(masked, masked, torch.ones(len(masked)), 1)


@pytest.mark.parametrize("iteration", range(3))
@pytest.mark.parametrize(("folder", "name"), [("llada_tiny", "logps"), ("llada_tiny_eos", "ref_logps")])
def test_the_log_probabilities_of_d1(folder, name, iteration):
    rows = completions()
    model = load_model(GOLDEN / folder, special_tokens=SPECIAL)
    got = token_log_probabilities(model, rows, masks(rows, iteration), 126)[:, POLICY["prompt_ids"].shape[1] :]
    wanted = POLICY[name][iteration] * POLICY["completion_mask"]
    torch.testing.assert_close(got.detach(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("iteration", range(3))
def test_the_guided_log_probabilities_of_d1(model, iteration):
    rows, width = completions(), POLICY["prompt_ids"].shape[1]
    noisy = rows.tokens.masked_fill(masks(rows, iteration).masked, 126)
    wanted = rows.written.flatten().nonzero()[:, 0]
    with torch.no_grad():
        first, count = noisy.new_zeros(len(noisy)), len(noisy)
        query = Query(noisy, None, ~rows.written, wanted, 126, first, [0] * count, [True] * count)
        logits = GuidedDenoiser(PlainDenoiser(model), 0.5).logits(query)
    got = logits.log_softmax(-1).gather(1, rows.tokens[:, width:].reshape(-1, 1)).view(-1, rows.tokens.shape[1] - width)
    torch.testing.assert_close(got, POLICY["logps_cfg0p5"][iteration], atol=1e-4, rtol=1e-4)


def clipping_acts(now, old, rows, epsilon, sign):
    ratio, advantage = (now - old).exp(), sign * rows.advantages[:, None]
    acts = ((ratio > 1 + epsilon) & (advantage > 0)) | ((ratio < 1 - epsilon) & (advantage < 0))
    return float((acts & rows.scored).sum() / rows.scored.sum())


@pytest.mark.parametrize("case", CASES["grpo_losses"], ids=lambda c: f"beta{c['beta']}-eps{c['epsilon']}")
def test_the_policy_loss_of_d1(model, case):
    rows, index, width = completions(), case["iteration_index"], POLICY["prompt_ids"].shape[1]
    params = GRPOParams(max_steps=1, beta=case["beta"], epsilon=case["epsilon"])
    pad = torch.nn.functional.pad
    old, reference = (pad(POLICY[name][index], (width, 0)) for name in ("old_logps_for_loss", "ref_logps"))
    chosen = masks(rows, index)
    now = token_log_probabilities(model, rows, chosen, 126)
    result = policy_loss(params, now, old, reference if case["beta"] else None, rows, chosen)
    count = rows.scored.sum()
    (result.sum / count).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(result.sum.detach() / count) == pytest.approx(case["loss"], rel=1e-4)
    assert float(norm) == pytest.approx(case["grad_l2_total"], rel=1e-3)
    assert float(result.clipped / count) == pytest.approx(clipping_acts(now, old, rows, case["epsilon"], 1))
    # d1's clip ratio counts the tokens outside the range where clipping does nothing; ours those where it acts.
    assert clipping_acts(now, old, rows, case["epsilon"], -1) == pytest.approx(case["clip_ratio"], rel=1e-4)
    if case["kl"] is not None:
        assert float(result.kl / count) == pytest.approx(case["kl"], rel=1e-4)


@pytest.mark.parametrize(("name", "scaled"), [("advantages_no_std", False), ("advantages_std_eps1e4", True)])
def test_the_advantages_of_d1(name, scaled):
    rewards = POLICY["rewards"].double().view(2, 3)
    params = GRPOParams(max_steps=1, scale_rewards=scaled)
    got = group_advantages(rewards, torch.ones_like(rewards).bool(), params)
    torch.testing.assert_close(got.flatten().float(), POLICY[name], atol=1e-5, rtol=1e-4)
