"""A small project in a folder of its own: the real `tasks` and configuration, toy stages that need no torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

PARAMS = """\
name: toy
seed: 1
stages: [pretrain, sft]
model: {d_model: 8, n_layers: 1, n_heads: 1}
pretrain: {max_steps: 4, learning_rate: 0.5}
sft: {max_steps: 3, init_from: pretrain}
launch: {kind: local, poll_seconds: 0.2, restarts: 1, grace_seconds: 5}
"""

DVC = """\
stages:
  pretrain:
    cmd: python -m tasks.pretrain
    deps: [tasks/pretrain.py, inputs]
    params: [seed, pretrain]
    outs: [models/pretrain]
  sft:
    cmd: python -m tasks.sft
    deps: [tasks/sft.py, "models/${sft.init_from}"]
    params: [sft]
    outs: [models/sft]
  evaluate:
    foreach: [b1, b2]
    do:
      cmd: python -m tasks.evaluate ${item}
      deps: [models/sft]
      params: [seed]
      outs: ["reports/eval/${item}.json"]
"""

# Counts steps into a checkpoint; asked by files in the project, it waits, fails or dies at a step.
TOY = '''\
"""A toy stage: counts to max_steps, resumes from its checkpoint, and misbehaves when a file asks for it."""
import json, os, time
from pathlib import Path
from tasks.errors import StoppedError
from tasks.launch.program import StageContext, stage_program

SOURCE = {source!r}
LABEL = "first"

def work(w: StageContext) -> float:
    run, asked = w.run.path, Path(w.run.request["root"])
    (run / "checkpoints").mkdir(exist_ok=True)
    saved = sorted((run / "checkpoints").glob("step-*"))
    step = int(saved[-1].name[5:]) if saved else 0
    print(LABEL, "micro batches of", w.params.training({stage!r}).micro_batch_size, flush=True)
    value = Path(SOURCE).read_text()
    while step < w.params.training({stage!r}).max_steps:
        if (run / "STOP").exists():
            raise StoppedError("stopped")
        step += 1
        (run / "checkpoints/new").mkdir(exist_ok=True)
        (run / "checkpoints/new/state.json").write_text(json.dumps(step))
        os.replace(run / "checkpoints/new", run / f"checkpoints/step-{{step:08d}}")  # it may be killed at any moment
        with (run / "metrics.jsonl").open("a") as f:
            f.write(json.dumps({{"step": step, "time": 1000.0 + step, "loss": 1.0 / step}}) + "\\n")
        print(LABEL, "step", step, flush=True)
        with (run / "steps.txt").open("a") as f:
            f.write(f"{{step}} {{os.getpid()}} {{time.time()}}\\n")
        if (asked / f"die-{stage}-{{step}}").exists():
            (asked / f"die-{stage}-{{step}}").unlink()
            os.kill(os.getpid(), 9)
        if (asked / f"mistake-{stage}-{{step}}").exists():
            raise ValueError("a mistake of the user")
        while (asked / f"wait-{stage}-{{step}}").exists() and not (run / "STOP").exists():
            time.sleep(0.02)
    out = Path("models/{stage}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "weights").write_text(f"{{value}} {stage} {{step}} {{LABEL}}")
    return 7200.0

if __name__ == "__main__":
    stage_program({stage!r}, work)
'''


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An initialised DVC and git project with stages pretrain and sft; the working directory is in it."""
    root = tmp_path / "project"
    for package in ("tasks", "llada_core"):
        shutil.copytree(REPOSITORY / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for stage, source in (("pretrain", "inputs/text"), ("sft", "models/pretrain/weights")):
        (root / "tasks" / f"{stage}.py").write_text(TOY.format(stage=stage, source=source))
    (root / "inputs").mkdir(parents=True)
    (root / "inputs/text").write_text("hello")
    (root / "params.yaml").write_text(PARAMS)
    (root / "dvc.yaml").write_text(DVC)
    for name in (".gitignore", ".dvcignore"):
        shutil.copy(REPOSITORY / name, root / name)
    shutil.copytree(REPOSITORY / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    for command in (
        ["init", "-q"],
        ["config", "user.email", "a@b"],
        ["config", "user.name", "a"],
        ["add", "-A"],
        ["commit", "-qm", "toy"],
    ):
        subprocess.run(["git", *command], cwd=root, check=True)
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/bin")
    monkeypatch.setenv("LLADAFLOW_TRACKING", "off")
    return root
