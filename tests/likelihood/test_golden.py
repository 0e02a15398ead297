"""LLaDA's own numbers: likelihoods of recorded canvases, lattices of counts, the greedy check."""

import numpy as np
import pytest

from llada_core import likelihood
from llada_core.likelihood import ESTIMATORS, Likelihood, Plan, greedy_matches, lattice, log_likelihood
from tests.reference import DENSE, arrays, case, cases, golden_model, names

MODEL = "llada_tiny"


@pytest.mark.parametrize("name", names("likelihood"))
def test_recorded_canvases(name, monkeypatch):
    data = {k.split("__")[1]: v for k, v in arrays("likelihood").items() if k.startswith(f"{name}__")}
    noisy = data["noisy"].flatten(0, 1).numpy()
    share = data["p_mask"].flatten(0, 1)[:, 0].double().numpy()
    recorded = Plan((noisy == DENSE.mask_id)[:, len(data["prompt"]) :], 1 / share / len(noisy))
    scorer = Likelihood(golden_model(MODEL), cfg_scale=case("likelihood", name)["cfg_scale"])
    monkeypatch.setattr(likelihood, "plan", lambda *_: recorded)  # the masks that were drawn when they were recorded
    (found,) = scorer.scores([(data["prompt"], data["answer"])])
    assert found == pytest.approx(float(data["log_likelihood"]), rel=1e-5)
    assert scorer.num_samples == len(np.unique(noisy, axis=0))


def test_enumeration():
    data = arrays("likelihood")
    found = log_likelihood(golden_model(MODEL), data["exact__prompt"], data["exact__answer"], estimator="exact")
    assert found == pytest.approx(float(data["exact__log_likelihood"]), rel=1e-6)
    assert log_likelihood(golden_model(MODEL), data["exact__prompt"], data["exact__answer"]) == found


def test_one_token_is_exact_with_one_sample():
    data = arrays("likelihood")
    for samples in (1, 128):
        for estimator in ESTIMATORS:
            scorer = Likelihood(golden_model(MODEL), samples=samples, estimator=estimator)
            (found,) = scorer.scores([(data["c__prompt"], data["c__answer"])])
            assert found == pytest.approx(float(data["c__log_likelihood"]), rel=1e-5)
            assert scorer.num_samples == 1


def test_lattices():
    for row in cases()["likelihood_stratified_counts"]:
        assert lattice(row["batch"], row["target_len"], row["k"]) == row["mask_counts"]


@pytest.mark.parametrize("check", cases()["greedy_check"], ids=lambda check: f"greedy{check['i']}")
def test_greedy_check(check):
    data, at = arrays("likelihood"), f"greedy{check['i']}__"
    pairs = [(data[at + "prefix"], data[at + f"target_{verdict}"]) for verdict in ("true", "false")]
    assert greedy_matches(golden_model(MODEL), pairs, cfg_scale=check["cfg"]) == [True, False]


def test_greedy_check_of_many_lengths_at_once():
    data = arrays("likelihood")
    plain = [c["i"] for c in cases()["greedy_check"] if not c["cfg"]]
    pairs = [
        (data[f"greedy{i}__prefix"], data[f"greedy{i}__target_{verdict}"])
        for i in plain
        for verdict in ("true", "false")
    ]
    for batch_tokens in (1, 20, 8192):
        assert greedy_matches(golden_model(MODEL), pairs, batch_tokens=batch_tokens) == [True, False] * len(plain)
