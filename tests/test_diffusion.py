"""The forward process: schedules equal the recorded ones, noise is uniform, and a row's noise is the row's own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llada_core.diffusion import (
    Noise,
    alpha,
    alpha_derivative,
    corrupt,
    loss_weight,
    masked_nll,
)
from llada_core.settings import NoiseParams
from tests.tiny import SPECIAL, tiny_model

with np.load(Path(__file__).parent / "golden" / "schedulers.npz") as file:
    GOLDEN = {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_are_dllms(schedule):
    t = GOLDEN["t"]
    params = NoiseParams(schedule=schedule)
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(alpha(t, schedule), GOLDEN[f"{schedule}_alpha"], **close)
    torch.testing.assert_close(alpha_derivative(t, schedule), GOLDEN[f"{schedule}_alpha_derivative"], **close)
    torch.testing.assert_close(loss_weight(t, params), GOLDEN[f"{schedule}_weight"], **close)


def test_a_rows_noise_depends_on_nothing_but_seed_step_and_row():
    whole = Noise(3, 7, torch.arange(8), 8)
    part = Noise(3, 7, torch.tensor([5, 2]), 8)
    assert torch.equal(part.uniforms(20), whole.uniforms(33)[[5, 2], :20])
    assert torch.equal(part.times(NoiseParams()), whole.times(NoiseParams())[[5, 2]])
    for other in (Noise(4, 7, torch.arange(8), 8), Noise(3, 8, torch.arange(8), 8)):
        assert not torch.isclose(other.uniforms(20), whole.uniforms(20)).all(1).any()


def test_uniforms_are_uniform_and_independent():
    u = torch.cat([Noise(0, step, torch.arange(200), 200).uniforms(250) for step in range(4)]).double()
    share = torch.histc(u, 20, 0, 1) / u.numel()
    assert share.sub(0.05).abs().max() < 6 * (0.05 * 0.95 / u.numel()) ** 0.5
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u[:400], u[400:])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5 / a.numel() ** 0.5


def test_stratified_times_cover_the_interval_evenly_and_are_unbiased():
    params = NoiseParams(epsilon=1e-3)
    times = torch.stack([Noise(0, step, torch.arange(16), 16).times(params) for step in range(400)])
    assert torch.equal((times[0].sort().values * 16).long().clamp(max=15), torch.arange(16))
    assert times[:, 3].mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(("total", "step"), [(16, 0), (4096, 10**6), (3072, 20_000), (1280, 440_000)])
def test_stratified_times_stay_stratified_in_long_runs(total, step):
    """Step 10^6 of 4,096 rows is row four billion: every stratum still has exactly one row."""
    numbers = torch.arange(step * total, (step + 1) * total)
    times = Noise(0, step, numbers, total).times(NoiseParams(epsilon=1e-9)).double()
    strata = (times * total - times.min() * total).round().long().sort().values
    assert torch.equal(strata, torch.arange(total))
    uniforms = Noise(0, step, numbers, total).uniforms(4)
    assert len(uniforms[:, 0].unique()) > 0.99 * total


def test_only_maskable_tokens_are_hidden_and_at_the_asked_rate():
    tokens, maskable = torch.arange(400).repeat(100, 1) % 90, torch.arange(400).repeat(100, 1) >= 40
    noise = Noise(0, 0, torch.arange(100), 100)
    noisy, masked = corrupt(tokens, maskable, torch.full((100,), 0.3), 126, noise.uniforms(400))
    assert not (masked & ~maskable).any()
    assert torch.equal(noisy == 126, masked)
    assert torch.equal(noisy[~masked], tokens[~masked])
    assert masked[:, 40:].float().mean() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("kind", ["llada", "llada_moe", "bert"])
def test_the_loss_of_masked_positions_is_that_of_all_logits(kind):
    model = tiny_model(kind)
    tokens = torch.randint(0, 110, (3, 12), generator=torch.Generator().manual_seed(0))
    attention = (torch.arange(12) < torch.tensor([12, 9, 7])[:, None]).long()
    noisy, masked = corrupt(tokens, attention.bool(), torch.full((3,), 0.5), SPECIAL.mask_id, torch.rand(3, 12))
    found = masked_nll(model, noisy, tokens, masked, attention)
    logits = model(noisy, attention).logits
    wanted = torch.nn.functional.cross_entropy(logits[masked], tokens[masked], reduction="none")
    torch.testing.assert_close(found.nll, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.per_row(3)[1], wanted[masked.nonzero()[:, 0] == 1].sum(), atol=1e-5, rtol=1e-5)
