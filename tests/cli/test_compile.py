"""`--compile` of sample and eval: the same answers, steps of the same shapes, and what it may take and took on stderr."""

import json
import re
from pathlib import Path

import pytest
import torch

from llada_core.sampling import SamplingParams, stream, stream_infill
from tests.cli.test_evaluate import PARAMS, PUZZLE
from tests.reference import golden_model
from tests.sampling.test_graph import traced  # noqa: F401 - a fixture

BASE = {"max_new_tokens": 8, "block_length": 4, "steps": 4}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("more", [{}, {"cache": "dual"}, {"stop_at_eos": True}], ids=str)
def test_streamed_steps_are_those_of_a_plain_batch(more):
    """Three rows on four seats, canvases narrower than the compiled one."""
    model, params = golden_model("llada_tiny"), SamplingParams(**{**BASE, **more})
    prompts = [[5, 9, 30], [7], [9] * 12]
    plain = list(stream(model, prompts, params))
    compiled = list(stream(model, prompts, params, compiled="graph"))
    assert len(plain) == len(compiled)
    for one, other in zip(plain, compiled, strict=True):
        for name in ("tokens", "before", "rows", "bounds"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert set(one.asked.tolist()) <= set(other.asked.tolist())
        asked = one.proposal >= 0
        assert torch.equal(one.proposal[asked], other.proposal[asked])


@pytest.mark.usefixtures("traced")
def test_templates_are_filled_alike():
    model, params = golden_model("llada_tiny"), SamplingParams(**BASE)
    mask = model.special_tokens.mask_id
    templates = [[5, mask, mask, 9], [mask, 3]]
    filled = [list(stream_infill(model, templates, params, compiled=way))[-1].tokens for way in ("off", "graph")]
    assert torch.equal(*filled)


@pytest.mark.usefixtures("traced")
def test_sample_says_what_compiling_may_take_and_took(call, tiny):
    asked = ("sample", "12 + 3", "a much longer question", "-m", tiny, "--max-new-tokens", "8", "--json")
    plain, compiled = call(*asked), call(*asked, "--compile", "graph")
    assert compiled.exit_code == 0, compiled.stderr
    assert compiled.stdout == plain.stdout
    assert "compil" not in plain.stderr
    assert "compile graph: at most " in compiled.stderr
    assert int(re.search(r"compiling: (\d+) shapes of a step in \d+\.\d s", compiled.stderr)[1]) >= 1
    filled = call("sample", "12[[2]]34", "-m", tiny, "--infill", "--compile", "graph")
    assert filled.exit_code == 0, filled.stderr
    assert filled.stdout == call("sample", "12[[2]]34", "-m", tiny, "--infill").stdout


@pytest.mark.parametrize("command", [("sample", "hi"), ("eval", "seats")])
def test_another_word_is_refused_in_one_line(call, tiny, command):
    result = call(*command, "-m", tiny, "--compile", "grap")
    assert result.exit_code == 2
    assert "grap" in result.stderr
    assert "graph" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_eval_says_it_too_and_scores_alike(call, tiny, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    Path("data/eval").mkdir(parents=True)
    rows = [{**PUZZLE, "id": str(i), "prompt": f"seats 12{i}"} for i in range(3)]
    Path("data/eval/seats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("params.yaml").write_text(PARAMS)
    plain = call("eval", "seats", "-m", tiny, "--out", "out")
    assert plain.exit_code == 0, plain.stderr
    told = (Path("out/seats.json")).read_bytes()
    compiled = call("eval", "seats", "-m", tiny, "--out", "again", "--compile", "graph")
    assert compiled.exit_code == 0, compiled.stderr
    assert "compile graph: at most " in compiled.stderr
    assert re.search(r"compiling: [1-9]\d* shapes of a step in", compiled.stderr)
    assert "compil" not in plain.stderr
    assert json.loads(told)["models"] == json.loads(Path("again/seats.json").read_bytes())["models"]


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_speed_is_measured_of_compiled_steps(call, tiny):
    """Each setting has an engine of its own, and they share what was compiled."""
    Path("data/eval").mkdir(parents=True)
    rows = [{**PUZZLE, "id": str(i), "prompt": f"seats 12{i}"} for i in range(2)]
    Path("data/eval/seats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("params.yaml").write_text(PARAMS)
    points = []
    for out, way in (("plain", "off"), ("compiled", "graph")):
        asked = call("eval", "seats", "-m", tiny, "--speed", "threshold=0.9", "--out", out, "--compile", way)
        assert asked.exit_code == 0, asked.stderr
        assert ("compiling: " in asked.stderr) == (way == "graph")
        kept = json.loads(Path(out, "speed-seats.json").read_bytes())["points"]
        points.append(
            {k: {w: {n: x for n, x in p.items() if "second" not in n} for w, p in v.items()} for k, v in kept.items()}
        )
    assert points[0] == points[1]
    assert points[0]["exact"]
