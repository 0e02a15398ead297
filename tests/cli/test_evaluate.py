"""`llada eval`: a puzzle is asked on the canvas that params.yaml names, not on a default one."""

import json
from pathlib import Path

PUZZLE = {"id": "0", "task": "seats", "prompt": "seats 123", "answer": {"order": "123"}}
PARAMS = """
name: mine
stages: [evaluate]
evaluate:
  benchmarks: [seats]
  models: [m]
  puzzles: {sampling: {max_new_tokens: 6, block_length: 3, steps: 6}}
"""


def test_puzzles_are_measured_with_the_settings_of_the_project(call, tiny, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    Path("data/eval").mkdir(parents=True)
    Path("data/eval/seats.jsonl").write_text(json.dumps(PUZZLE) + "\n")
    Path("params.yaml").write_text(PARAMS)
    result = call("eval", "seats", "--model", tiny, "--out", "out")
    assert result.exit_code == 0, result.stderr
    (measured,) = json.loads(Path("out/seats.json").read_text())["models"].values()
    assert measured["settings"] == {"max_new_tokens": 6, "block_length": 3, "steps": 6}
