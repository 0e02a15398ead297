"""Token for token what the reference projects generated, with no more forwards than they took."""

from itertools import pairwise

import pytest
import torch

from llada_core.sampling import generate, infill, stream
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.proposals import Proposer, gumbel_argmax
from llada_core.sampling.unmask import NOISES, even_transfer, expected_transfer
from tests.reference import DENSE, arrays, case, cases, golden_model, names

# Several deferred proposals of confidence 0 stand open at once, and torch.topk took them in no particular order.
TIES = {"eos_confidence_inf", "eos_both_semi"}
DLLM_TIES = {"begin_suppress"}


def llada_params(settings: dict) -> SamplingParams:
    values = dict(settings)
    if values.pop("logits_eos_inf", False):
        values["forbid_tokens"] = (DENSE.eos_id,)
    if values.pop("confidence_eos_eot_inf", False):
        values["defer_tokens"] = (DENSE.eos_id, DENSE.eot_id)
    return SamplingParams(max_new_tokens=values.pop("gen_length"), **values)


def llada_model(name: str):
    return golden_model("llada_tiny_eos" if name.startswith("eos") else "llada_tiny")


@pytest.mark.parametrize("name", [n for n in names("generate_llada") if n not in TIES])
def test_generate_llada(name):
    data, params = arrays("generate_llada"), llada_params(case("generate_llada", name)["settings"])
    mask = data.get(f"{name}__attention_mask")
    result = generate(llada_model(name), data[f"{name}__prompt"], params, attention_mask=mask)
    assert torch.equal(result.tokens, data[f"{name}__output"])
    assert result.forwards == case("generate_llada", name)["forward_calls"]


@pytest.mark.parametrize("name", ["full_remainder", "semi_ar_b8_s8", "cfg2_semi", "batch_equal", "eos_logits_inf_semi"])
def test_generate_llada_on_the_way(name):
    """The canvas is the recorded one before every single step."""
    data, params = arrays("generate_llada"), llada_params(case("generate_llada", name)["settings"])
    steps = list(stream(llada_model(name), data[f"{name}__prompt"], params))
    assert torch.equal(torch.stack([step.before for step in steps]), data[f"{name}__trajectory"])


def assert_valid_choice(model, params: SamplingParams, before, after, first: int, last: int) -> None:
    """From the recorded canvas: the written tokens are our proposals, and nothing surer was left open in the block."""
    proposer = Proposer.of(params, model.special_tokens.mask_id, before.device)
    block = torch.arange(first, last)
    open_here = block[before[0, block] == model.special_tokens.mask_id]
    with torch.no_grad():
        proposals, confidence = proposer.propose(model(before, positions=open_here).logits)
    scores = confidence.value
    taken = after[0, open_here] != model.special_tokens.mask_id
    assert torch.equal(after[0, open_here][taken], proposals[taken])
    assert taken.all() or scores[taken].min() >= scores[~taken].max() - 1e-6


@pytest.mark.parametrize("name", sorted(TIES))
def test_generate_llada_among_ties(name):
    data, params = arrays("generate_llada"), llada_params(case("generate_llada", name)["settings"])
    canvases = torch.cat([data[f"{name}__trajectory"], data[f"{name}__output"][None]])
    prompt = data[f"{name}__prompt"].shape[1]
    steps_per_block = params.steps // params.blocks
    ours = list(stream(golden_model("llada_tiny_eos"), data[f"{name}__prompt"], params))
    assert len(ours) == len(canvases) - 1
    for i, (before, after) in enumerate(pairwise(canvases)):
        first = prompt + i // steps_per_block * params.block_length
        assert_valid_choice(golden_model("llada_tiny_eos"), params, before, after, first, first + params.block_length)
        assert (before != after).sum() == ours[i].committed.sum()


@pytest.mark.parametrize("name", names("generate_moe"))
def test_generate_moe(name):
    data, params = arrays("generate_moe"), llada_params(case("generate_moe", name)["settings"])
    result = generate(golden_model("llada_moe_tiny"), data[f"{name}__prompt"], params)
    assert torch.equal(result.tokens, data[f"{name}__output"])
    assert result.forwards == params.steps


# Fast-dLLM's cached loops run one more forward over a block that is already complete when the cached steps finish it.
WASTED = {"prefix_b8_thr0.2": 2, "dual_b8_thr0.2": 2, "prefix_b8_thr0.4": 1, "dual_b8_thr0.4": 1, "prefix_b8_thr0.6": 1}


@pytest.mark.parametrize("name", names("generate_fastdllm"))
def test_generate_fastdllm(name):
    data, settings = arrays("generate_fastdllm"), dict(case("generate_fastdllm", name)["settings"])
    function = case("generate_fastdllm", name)["function"]
    cache = {"generate": "none", "generate_with_prefix_cache": "prefix", "generate_with_dual_cache": "dual"}[function]
    result = generate(golden_model("llada_tiny"), data[f"{name}__prompt"], llada_params({**settings, "cache": cache}))
    assert torch.equal(result.tokens, data[f"{name}__output"])
    assert result.forwards == case("generate_fastdllm", name)["nfe"] - WASTED.get(name, 0)


def dllm_case(name: str):
    """Prompts or templates, our settings, and what dllm wrote in place of each row's masks."""
    settings, data = dict(case("sampler_dllm", name)["settings"]), arrays("sampler_dllm")
    rows = [[t for t in row if t >= 0] for row in data[f"{name}__inputs_padded_minus1"].tolist()]
    longest = max(map(len, rows))
    length = settings.pop("max_length", None)
    new = settings.pop("max_new_tokens", None) or (length - longest if length else 1)
    params = SamplingParams(
        max_new_tokens=new,
        block_length=settings.pop("block_size") or longest,
        schedule=case("sampler_dllm", name)["scheduler"],
        forbid_tokens=tuple(settings.pop("suppress_tokens", ())),
        defer_tokens=tuple(settings.pop("begin_suppress_tokens", ())),
        **settings,
    )
    return rows, params


@pytest.mark.parametrize("name", [n for n in names("sampler_dllm") if n not in DLLM_TIES])
def test_sampler_dllm(name):
    rows, params = dllm_case(name)
    data, model = arrays("sampler_dllm"), golden_model("llada_tiny_eos" if "suppress" in name else "llada_tiny")
    output, steps = data[f"{name}__output"], len(data[f"{name}__histories"]) - 1
    if case("sampler_dllm", name)["kind"] == "infill":
        result = infill(model, rows, params)
        expected = [out[: len(row)] for out, row in zip(output, rows, strict=True)]
    else:
        result = generate(model, rows, params)
        expected = [out[len(r) : len(r) + params.max_new_tokens] for out, r in zip(output, rows, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(result.answers, expected, strict=True))
    assert result.forwards == steps


def test_sampler_dllm_among_ties():
    (row,), params = dllm_case("begin_suppress")
    canvases = arrays("sampler_dllm")["begin_suppress__histories"]
    for before, after in pairwise(canvases):
        assert_valid_choice(golden_model("llada_tiny_eos"), params, before, after, len(row), len(row) + 12)


@pytest.mark.parametrize("row", cases()["schedule"], ids=lambda row: f"{row['mask_num']}over{row['steps']}")
def test_schedules(row):
    count, steps = torch.tensor([row["mask_num"]]), torch.tensor([row["steps"]])
    assert even_transfer(count, steps, row["steps"])[0].tolist() == row["llada"]
    for name, noise in NOISES.items():
        quotas = expected_transfer(count, steps, row["steps"], noise=noise)[0].tolist()
        assert [q for q in quotas if q] == row[f"dllm_{name}"]


def test_schedules_of_several_rows():
    table = cases()["schedule_multirow"]
    counts = torch.tensor(table["mask_num"])
    steps = torch.full_like(counts, table["steps"])
    assert even_transfer(counts, steps, table["steps"]).tolist() == table["llada"]
    for name, noise in NOISES.items():
        assert expected_transfer(counts, steps, table["steps"], noise=noise).tolist() == table[f"dllm_{name}"]


@pytest.mark.parametrize("number", [0, 2])
def test_gumbel(number):
    values = {k.split("_", 1)[1]: v for k, v in arrays("gumbel").items() if k.startswith(f"case{number}")}
    drawn = gumbel_argmax(values["logits"], float(values["temperature"]), values["uniform"].clone())
    assert torch.equal(drawn, values["argmax"])
