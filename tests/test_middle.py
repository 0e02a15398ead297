"""Ways into the middle: fine-tuning, GRPO and evaluation of a model that is already there, at tiny width."""

import json
from pathlib import Path

import pytest
import yaml

from llada_core.modeling import save_model
from tasks.project import Params
from tests.test_pipeline import clone, llada
from tests.tiny import tiny_pair

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]

PUZZLES = {
    "sudoku": {"validation": 4, "evaluate": 6, "new_grids": 6},
    "seats": {"people": 5, "validation": 4, "evaluate": 6},
}


def puzzles(part: str, rows: int) -> dict[str, dict[str, object]]:
    """The puzzles with training rows for one part."""
    return {name: settings | {part: rows} for name, settings in PUZZLES.items()}


SAMPLING = {"max_new_tokens": 18, "block_length": 18, "steps": 3}
EVALUATION = {"benchmarks": ["sudoku", "seats"], "batch_size": 8, "puzzles": {"sampling": SAMPLING}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout, with a model in the published layout beside it."""
    home = clone(tmp_path_factory.mktemp("middle"))
    model, tokenizer = tiny_pair()
    save_model(model, home.parent / "published")
    tokenizer.save(home.parent / "published")
    return home


def profile(home: Path, name: str, **blocks: object) -> Path:
    """Runs a profile; returns its workspace."""
    file = home.parent / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"name": name, **blocks}))
    done = llada(home, "run", str(file))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (workspace,) = (home / "workspaces").glob(f"{name}-????????")
    return workspace


def scored(workspace: Path) -> set[str]:
    """The models that the report has a score for."""
    return set(json.loads((workspace / "reports/eval/sudoku.json").read_text())["models"])


def test_fine_tuning_of_a_published_base_model(home: Path) -> None:
    base = str(home.parent / "published")
    workspace = profile(
        home,
        "own-sft",
        stages=["prepare", "sft", "evaluate", "report", "register"],
        data={"tokenizer": {"name": base}, "puzzles": puzzles("sft", 40), "sft": {"length": 120}},
        sft={"init_from": base, "max_steps": 2, "batch_size": 4, "validation_rows": 4},
        evaluate={**EVALUATION, "models": [base, "sft"]},
        report={"comparisons": []},
        register={"name": "own", "model": "sft", "sampling": SAMPLING},
    )
    assert scored(workspace) == {"published", "sft"}
    assert "| published |" in (workspace / "reports/table.md").read_text()
    assert json.loads((workspace / "reports/training/sft.json").read_text())["weight_change"] > 0
    assert not (workspace / "models/pretrain").exists()


def test_grpo_of_a_published_instruct_model(home: Path) -> None:
    base = str(home.parent / "published")
    workspace = profile(
        home,
        "own-grpo",
        stages=["prepare", "grpo"],
        data={"tokenizer": {"name": base}, "puzzles": puzzles("grpo", 20), "grpo": {"length": 100}},
        grpo={
            "init_from": base, "max_steps": 1, "prompts": 2, "generations": 2, "iterations": 1, "validation_rows": 2,
            "sampling": SAMPLING | {"temperature": 1.0},
        },
    )  # fmt: skip
    assert (workspace / "models/grpo/model.safetensors").exists()


def test_evaluation_alone_of_a_folder_and_a_registered_model(home: Path) -> None:
    models = [str(home.parent / "published"), "models:/own@champion", f"again={home.parent / 'published'}"]
    workspace = profile(
        home,
        "evaluation",
        stages=["prepare", "evaluate", "report"],
        data={"puzzles": PUZZLES},
        evaluate={**EVALUATION, "models": models},
        report={"comparisons": []},
    )
    assert scored(workspace) == {"published", "own-at-champion", "again"}


def test_the_tutorial_ends_in_an_answer(home: Path) -> None:
    text = (home / "docs/tutorial.md").read_text()
    (home.parent / "my-data").mkdir()
    pair = [{"role": "user", "content": "What opens at nine?"}, {"role": "assistant", "content": "The library."}]
    (home.parent / "my-data/train.jsonl").write_text((json.dumps({"messages": pair}) + "\n") * 40)
    big, small = (block.split("```")[0] for block in text.split("```yaml\n")[1:])
    assert Params.parse(yaml.safe_load(big), "the tutorial").sft is not None
    blocks = yaml.safe_load(small.replace("/path/to/my-data", str(home.parent / "my-data")))
    blocks["model"] |= {"d_model": 32, "n_layers": 2, "mlp_hidden_size": 64}
    blocks["sft"] |= {"max_steps": 40}
    workspace = profile(home, **blocks)
    asked = llada(home, "sample", "What opens at nine?", "--model", str(workspace / "models/sft"))
    assert asked.returncode == 0, asked.stderr
    assert "library" in asked.stdout
