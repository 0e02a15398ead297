"""One benchmark over several jobs: the result is that of one job, byte for byte, also when a share is killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llada_core.modeling import save_model
from tasks.project import Params
from tasks.record.runs import RunFolder, StageContext
from tasks.work import evaluate as stage
from tasks.work.evaluate import sharing
from tests.tasks.conftest import REPOSITORY, project  # noqa: F401  (a fixture)
from tests.tiny import tiny_pair
from tests.waiting import wait_for

SPEC = {"stages": {"evaluate": {"foreach": ["sudoku"], "do": {
    "cmd": "python -m tasks.evaluate ${item}", "deps": ["tasks/evaluate.py", "data/eval"],
    "params": ["evaluate.models", "evaluate.batch_size", "evaluate.puzzles"],
    "outs": ["reports/eval/${item}", "reports/eval/${item}.json"]}}}}  # fmt: skip
SAMPLING = {"max_new_tokens": 8, "block_length": 8, "steps": 8}
# Ends the second job with signal 9, once, when it is asked for its second batch.
DIES = """
_answer, _asked = Responder.generate, []


def _dies(self, asked):
    import os
    from pathlib import Path

    _asked.append(asked)
    if os.environ.get("LLADAFLOW_SHARD") == "1/2" and len(_asked) == 2 and (mark := Path({mark!r})).exists():
        mark.unlink()
        os.kill(os.getpid(), 9)
    return _answer(self, asked)


Responder.generate = _dies
"""


@pytest.fixture
def measuring(project: Path) -> Path:  # noqa: F811
    """The toy project with the real evaluation, nine puzzles and a tiny model."""
    shutil.copytree(REPOSITORY / "llada_core", project / "llada_core", dirs_exist_ok=True)
    file = project / "llada_core/evaluation/answering.py"
    file.write_text(file.read_text() + DIES.format(mark=str(project / "die")))
    (project / "dvc.yaml").write_text(yaml.safe_dump(SPEC))
    (project / "data/eval").mkdir(parents=True)
    row = {"task": "sudoku", "answer": {"puzzle": "0" * 16}}
    rows = [json.dumps({"id": str(i), "prompt": f"Solve {i}", **row}) for i in range(9)]
    (project / "data/eval/sudoku.jsonl").write_text("\n".join(rows))
    model, tokenizer = tiny_pair()
    save_model(model, project / "models/sft", tokenizer)
    return project


def measured(root: Path, **launch: object) -> dict[str, bytes]:
    """Every file of the results of a run made from nothing."""
    for name in ("runs", "reports"):
        shutil.rmtree(root / name, ignore_errors=True)
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["evaluate"] = {
        "benchmarks": ["sudoku"], "models": ["sft"], "batch_size": 2, "puzzles": {"sampling": SAMPLING},
    }  # fmt: skip
    params["launch"] |= launch
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    command = [sys.executable, "-m", "tasks.evaluate", "sudoku"]
    done = subprocess.run(command, cwd=root, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    out = root / "reports/eval"
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


SHARES = {"answers-00000-of-00002.jsonl": [2, 2, 1], "answers-00001-of-00002.jsonl": [2, 2]}


def answered(run: Path) -> dict[str, list[int]]:
    """Sizes of the batches in each process's file."""
    return {
        file.name: [len(json.loads(line)["keys"]) for line in file.read_text().splitlines()]
        for file in run.rglob("answers-*.jsonl")
    }


@pytest.mark.slow
def test_a_benchmark_shared_by_jobs_or_gpus_scores_as_one_process_does(measuring: Path) -> None:
    """First by two jobs, of which one is killed; then by one job that finds, as it were, two GPUs."""
    alone = measured(measuring)
    (measuring / "die").touch()
    assert measured(measuring, shards=2) == alone
    assert not (measuring / "die").exists()
    [run] = (measuring / "runs").glob("evaluate-*")
    assert "restart 1 of 1" in (run / "shards" / f"{run.name}-1of2" / "log.txt").read_text()
    assert answered(run) == SHARES
    place = measuring / "llada_core/modeling/place.py"
    place.write_text(place.read_text() + "\n\nprocesses_for = lambda *_: 2\n")
    assert measured(measuring, shards=1) == alone
    [run] = (measuring / "runs").glob("evaluate-*")
    assert answered(run) == SHARES
    assert "error" not in (run / "log.txt").read_text()


def test_a_number_of_processes_that_a_person_gives_is_the_launchers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "processes", lambda *_: 4)
    evaluate: dict[str, object] = {"models": ["m"]}
    for given, own in ((None, 4), (1, 1), (2, 1)):
        values = {"name": "n", "stages": ["evaluate"], "evaluate": evaluate, "launch": {"processes": given}}
        work = StageContext(Params.parse(values, "params.yaml"), RunFolder(tmp_path), "evaluate@x", "x")
        assert stage._processes(work, [tmp_path]) == own


@pytest.mark.parametrize(("gpus", "own"), [(0, 3), (1, 1)])
def test_without_a_gpu_processes_of_the_cpu_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, own: int
) -> None:
    monkeypatch.setattr(stage, "processes", lambda *_: 1)
    monkeypatch.setattr(stage, "visible_gpus", lambda: gpus)
    values = {"name": "n", "stages": ["evaluate"], "evaluate": {"models": ["m"]}, "launch": {"cpu_processes": 3}}
    work = StageContext(Params.parse(values, "params.yaml"), RunFolder(tmp_path), "evaluate@x", "x")
    assert stage._processes(work, [tmp_path]) == own


def test_who_shares_is_numbered_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    told = tmp_path / "told"
    told.mkdir()
    write = f"open({str(told)!r} + '/' + os.environ['RANK'], 'w').write(os.environ['LOCAL_RANK'] + os.environ['X'])"
    program = [sys.executable, "-c", f"import os, time; {write}; time.sleep(600)"]
    with sharing(3, program, {"X": "of"}):
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "3")
        with sharing(3, program):  # a rank starts none
            wait_for("two processes", lambda: sorted(p.read_text() for p in told.iterdir()) == ["1of", "2of"])
    assert "RANK" not in os.environ
