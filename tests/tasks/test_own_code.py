"""Functions of one's own as FILE.py:FUNCTION: found beside the profile, copied, part of what a result depends on."""

import json
from pathlib import Path

import datasets
import pytest

from llada_core.modeling import save_model
from llada_core.settings import ConfigError, function_at, read_yaml
from llada_core.training.rewards import reward_named
from tasks.graph import load_stage, require_listed
from tasks.launch.program import reproduce
from tasks.launch.workspace import open_workspace
from tasks.own_code import files_of, found, moved, with_benchmarks
from tasks.project import Project
from tests.tiny import tiny_pair

ROOT = Path(__file__).parents[2]
PROFILE = """\
name: mine
stages: [prepare]
data:
  root: DATA
  workers: 1
  tokenizer: {vocab_size: 300}
  sft: {length: 64, validation: 0.0, sources: [{name: visits.csv, map: "./my_maps.py:turns"}]}
launch: {kind: inline}
"""
MAPS = """\
def ask(row):
    return f"Who came from {row['town']}?"


def turns(row):
    said = [{"role": "user", "content": ask(row)}, {"role": "assistant", "content": row["guest"]}]
    return {"messages": said}
"""
PREPARE = """\
  prepare:
    cmd: python -m tasks.prepare
    deps: [llada_core/data, tasks/work/prepare.py]
    params: [seed, data]
    outs: [data]
"""


def text_of(workspace: Project) -> str:
    from llada_core.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(workspace.root / "data/tokenizer")
    return "".join(
        tokenizer.decode(row) for row in datasets.load_from_disk(str(workspace.root / "data/sft/train"))["input_ids"]
    )


def test_a_map_beside_the_profile_goes_along_and_an_edit_of_it_is_another_result(project: Path, tmp_path: Path) -> None:
    (project / "dvc.yaml").write_text("stages:\n" + PREPARE)
    mine = tmp_path / "mine"  # in no repository
    mine.mkdir()
    (mine / "visits.csv").write_text("town,guest\nUlm,Ada\nBonn,Ben\n")
    (mine / "my_maps.py").write_text(MAPS)
    (mine / "my-run.yaml").write_text(PROFILE.replace("DATA", str(mine)))
    first = open_workspace(Project.at(project), str(mine / "my-run.yaml"))
    assert read_yaml(first.root / "params.yaml")["data"]["sft"]["sources"][0]["map"] == "own/my_maps.py:turns"
    reproduce(first, [])
    assert "Who came from Ulm?" in text_of(first)
    card = json.loads((first.root / "data/sft/card.json").read_text())
    assert sorted(card["examples"]) == ["Who came from Bonn?", "Who came from Ulm?"]
    (made,) = project.glob("runs/prepare-*")
    assert (made / "tree/own/my_maps.py").read_text() == MAPS
    assert "own/my_maps.py" in json.loads((made / "request.json").read_text())["inputs"]
    assert open_workspace(Project.at(project), str(mine / "my-run.yaml")).root == first.root
    (mine / "my_maps.py").write_text(MAPS.replace("Who came", "Which guest came"))  # in a function that the map calls
    second = open_workspace(Project.at(project), str(mine / "my-run.yaml"))
    assert second.root != first.root
    reproduce(second, [])
    assert "Which guest came from Ulm?" in text_of(second)
    assert len(list(project.glob("runs/prepare-*"))) == 2


BOTH = PROFILE.replace("[prepare]", "[prepare, evaluate]") + "evaluate: {models: [sft], benchmarks: [./asked.csv]}\n"
FAULTS = {  # change of the profile -> what is said
    ("./asked.csv", "./no_answer.csv"): r"no_answer\.csv, row 1: the last message is no reply",
    ("./asked.csv", "./no_rows.jsonl"): r"no_rows\.jsonl: no rows; expected a question with its answer",
    ("./asked.csv", "./task.jsonl"): r"task\.jsonl, row 1: task 'sudoko' has no verifier; did you mean 'sudoku'",
    (
        "./asked.csv",
        "./words.jsonl",
    ): r"words\.jsonl, row 1: answer \[4\]: the verifier of 'math' compares with an object",
    (
        "./asked.csv",
        "./no_target.jsonl",
    ): r"row 1: answer .*: the verifier of 'countdown' needs 'target', a number, which is not there",
    ("./asked.csv", "./short.jsonl"): r"row 1: .* needs 'puzzle', 16 digits of 0 to 4, which is '1030'",
    ("./asked.csv", "./nowhere.csv"): r"there is no file \./nowhere\.csv",
    ("./asked.csv", "./recipe.yaml"): r"recipe\.yaml: the key 'definition' is missing",
    ("./asked.csv", "sudokuu"): r"there is no benchmark 'sudokuu'; did you mean 'sudoku'",
    ("./asked.csv", "base_humaneval"): r"base_humaneval runs programs .* evaluate\.run_code: true",
    ("./my_maps.py:turns", "./my_maps.py:trns"): r"my_maps\.py has no function 'trns'; did you mean 'turns'",
    ("./my_maps.py:turns", "./broken.py:turns"): r"broken\.py is not Python: .*line 1",
    ("./my_maps.py:turns", "llada_core.data.maps.dolyy"): r"maps\.py has no function 'dolyy'; did you mean 'dolly'",
    ("visits.csv", "visit.csv"): r"'visit\.csv': no file",
    ("root: DATA", "root: /not/there"): r"below /not/there \(which is not there\), ",
    (
        "launch:",
        "grpo: {init_from: sft, reward: publishd, max_steps: 1}\nlaunch:",
    ): r"grpo\.reward 'publishd'; did you mean",
    ("./my_maps.py:turns", "./my_maps.py"): r"map '\./my_maps\.py': write it as \./file\.py:function",
    ("./my_maps.py:turns", "llada_cor.data.maps.dolly"): r"no module named 'llada_cor\.data\.maps'; .* \./my_file\.py",
    ("./my_maps.py:turns", "llada_core.data.mapps.dolly"): r"no module named 'llada_core\.data\.mapps'",
    ("./my_maps.py:turns", "mine.turns"): r"no module named 'mine'",
    ("[./asked.csv]", "./asked.csv"): r"evaluate\.benchmarks: Input should be a valid tuple",
    ("[./asked.csv]", "5"): r"evaluate\.benchmarks: Input should be a valid tuple",
    ("[./asked.csv]", "[./asked.csv], overrides: {asked: 5}"): r"evaluate\.overrides\.asked: Input should be",
    ("evaluate: {", "evaluate: sudoku\nx: {"): r"evaluate: Input should be a valid dictionary",
    ("launch:", "register: {nam: mine}\nlaunch:"): r"unknown key 'register\.nam'; did you mean 'name'",
    ("launch:", "regster: {name: mine}\nlaunch:"): r"unknown key 'regster'; did you mean 'register'\?",
    ("vocab_size", "vocab_sise"): r"unknown key 'data\.tokenizer\.vocab_sise'",
}


def test_what_a_stage_would_stop_at_is_told_before_anything_is_made(project: Path, tmp_path: Path) -> None:
    (project / "dvc.yaml").write_text("stages:\n" + PREPARE + EVALUATE)
    (mine := tmp_path / "mine").mkdir()
    for name, text in {
        "asked.csv": "question,answer\nWho?,Ada\n",
        "no_answer.csv": "question,answer\nWho?,\n",
        "no_rows.jsonl": "",
        "task.jsonl": '{"prompt": "1030", "task": "sudoko", "answer": {}}\n',
        "words.jsonl": '{"prompt": "2 + 2", "task": "math", "answer": [4]}\n',
        "no_target.jsonl": '{"prompt": "Make it", "task": "countdown", "answer": {"numbers": [3, 4]}}\n',
        "short.jsonl": '{"prompt": "1030", "task": "sudoku", "answer": {"puzzle": "1030"}}\n',
        "recipe.yaml": "task: gsm8k\n",
        "visits.csv": "town,guest\nUlm,Ada\n",
        "my_maps.py": MAPS + "raise SystemExit('run before its stage')\n",
        "broken.py": "def turns(row:\n",
    }.items():
        (mine / name).write_text(text)
    before = sorted(path.name for path in project.iterdir())
    for (old, new), says in FAULTS.items():
        (mine / "run.yaml").write_text(BOTH.replace(old, new).replace("DATA", str(mine)))
        with pytest.raises((ConfigError, FileNotFoundError), match=says):
            open_workspace(Project.at(project), str(mine / "run.yaml"))
        assert sorted(path.name for path in project.iterdir()) == before, new


def test_every_setting_that_names_a_function_is_found_and_named_anew(tmp_path: Path) -> None:
    (tmp_path / "a.py").touch()
    values = {
        "grpo": {"reward": "./a.py:f", "sampling": {"rule": "a.py:g"}},
        "data": {"map": "pkg.module.f", "name": "b.py:f"},
    }
    files = found(values, [tmp_path / "nowhere", tmp_path])
    assert files_of(values) == ["a.py"]
    assert moved(values, files) == {
        "grpo": {"reward": "own/a.py:f", "sampling": {"rule": "own/a.py:g"}},
        "data": {"map": "pkg.module.f", "name": "b.py:f"},
    }
    with pytest.raises(ConfigError, match=r"'\./c\.py:f': there is no file \./c\.py in "):
        found({"map": "./c.py:f"}, [tmp_path])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").touch()
    with pytest.raises(ConfigError, match=r"two files of one's own are called a\.py"):
        found([{"map": "a.py:f"}, {"map": "sub/a.py:f"}], [tmp_path])


def test_a_reward_is_an_input_of_its_stage_and_dvc_has_to_know_it(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    params = {"stages": ["grpo"], "grpo": {"init_from": "sft", "reward": "./my_reward.py:brief"}}
    assert "my_reward.py" in load_stage(Project(tmp_path), "grpo", params).inputs
    spec = read_yaml(tmp_path / "dvc.yaml")
    with pytest.raises(ConfigError, match=r"add `- my_reward.py` to deps of grpo there, or run .* as a profile"):
        require_listed(spec, params)
    spec["stages"]["grpo"]["deps"].append("my_reward.py")
    require_listed(spec, params)


def test_a_function_of_a_file_and_what_is_wrong_with_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_reward.py").write_text("def brief(task, text, answer):\n    return 1 / (1 + len(text))\n")
    assert reward_named("./my_reward.py:brief")("any", "abc", {}) == 0.25
    Path("my_reward.py").write_text("def brief(task, text, answer):\n    return 0.0\n")
    assert reward_named("my_reward.py:brief")("any", "abc", {}) == 0.0
    for path, says in {
        "./my_reward.py:breif": "did you mean 'brief'",
        "./nowhere.py:f": "there is no file nowhere.py",
        "my_rewards.brief": "is written ./my_file.py:function",
    }.items():
        with pytest.raises(ConfigError, match=says):
            function_at(path, "grpo.reward")
    Path("broken.py").write_text("x = 1\ny = x / 0\n")
    with pytest.raises(ConfigError, match=r"broken.py cannot be imported: ZeroDivisionError: division by zero \(line"):
        function_at("broken.py:f", "grpo.reward")


MEASURED = """\
name: mine
stages: [evaluate]
evaluate:
  models: [MODEL]
  benchmarks: [./my_questions.csv, ./my_gsm8k.yaml]
  puzzles: {sampling: {max_new_tokens: 8, block_length: 8, steps: 8}}
  root: ROOT
launch: {kind: inline}
"""
RECIPE = """\
task: gsm8k
definition: gsm8k
version: 3
kind: generate
metric: exact_match,flexible-extract
shots: 1
chance: 0.0
settings: {sampling: {max_new_tokens: 8, block_length: 8, steps: 8}}
local: {folder: gsm8k, change: {dataset_name: null}}
"""
STEMS = ("my_questions", "my_gsm8k")
EVALUATE = """\
  evaluate:
    foreach: ${evaluate.benchmarks}
    do:
      cmd: python -m tasks.evaluate ${item}
      deps: [llada_core/evaluation, tasks/work/evaluate.py]
      params: [evaluate.models, evaluate.limit, evaluate.puzzles, evaluate.overrides]
      outs: ["reports/eval/${item}", "reports/eval/${item}.json"]
"""


@pytest.mark.slow
def test_benchmarks_beside_the_profile_are_measured_and_an_edit_measures_that_one_anew(
    project: Path, tmp_path: Path
) -> None:
    (project / "dvc.yaml").write_text("stages:\n" + EVALUATE)
    (mine := tmp_path / "mine").mkdir()
    (mine / "my_questions.csv").write_text("question,answer\nWho?,Ada\nWhere?,Ulm\n")
    (mine / "my_gsm8k.yaml").write_text(RECIPE)
    (mine / "gsm8k").mkdir()
    row = json.dumps({"question": "One and one?", "answer": "So #### 2"}) + "\n"
    for name in ("train.jsonl", "test.jsonl"):
        (mine / "gsm8k" / name).write_text(row)
    model, tokenizer = tiny_pair(max_sequence_length=512)
    save_model(model, mine / "model", tokenizer)
    text = MEASURED.replace("MODEL", str(mine / "model")).replace("ROOT", str(mine))
    (mine / "my-run.yaml").write_text(text)

    def measured() -> Project:
        workspace = open_workspace(Project.at(project), str(mine / "my-run.yaml"))
        reproduce(workspace, [])
        return workspace

    first = measured()
    found = {name: json.loads((first.root / f"reports/eval/{name}.json").read_text()) for name in STEMS}
    assert [each["models"]["model"]["n"] for each in found.values()] == [2, 1]
    assert "Where?" in (first.root / "reports/eval/my_questions/model.samples.jsonl").read_text()
    assert sorted(path.name for path in (first.root / "own").iterdir()) == ["my_gsm8k.yaml", "my_questions.jsonl"]
    (mine / "my_questions.csv").write_text("question,answer\nWho?,Ada\nWhen?,now\n")
    second = measured()
    assert second.root != first.root
    assert "When?" in (second.root / "reports/eval/my_questions/model.samples.jsonl").read_text()
    assert len(list(project.glob("runs/evaluate-my_questions-*"))) == 2
    assert len(list(project.glob("runs/evaluate-my_gsm8k-*"))) == 1  # does not depend on the other's questions
    (mine / "my_questions.csv").write_text("question,answer\nWho?,\n")
    with pytest.raises(ConfigError, match=r"my_questions.csv, row 1"):
        open_workspace(Project.at(project), str(mine / "my-run.yaml"))


def test_a_file_is_a_benchmark_of_a_profile_alone(tmp_path: Path) -> None:
    params = {"stages": ["evaluate"], "evaluate": {"benchmarks": ["sudoku", "./mine.csv"]}}
    with pytest.raises(ConfigError, match="run the same settings as a profile"):
        require_listed({"stages": {}}, params)
    with pytest.raises(ConfigError, match=r"'./my mine.csv' names a benchmark; use letters"):
        with_benchmarks({"evaluate": {"benchmarks": ["./my mine.csv"]}})
    named = with_benchmarks({"evaluate": {"benchmarks": ["sudoku", "./MINE.CSV", "b.jsonl.gz"]}})["evaluate"]
    assert named["benchmarks"] == ["sudoku", "MINE", "b"]
    assert named["overrides"] == {"MINE": {"questions": "./MINE.CSV"}, "b": {"questions": "b.jsonl.gz"}}
