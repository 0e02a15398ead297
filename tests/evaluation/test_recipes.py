"""Recipes and figures as files; what lm-eval is given for each; reference answers score 1 on real questions."""

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest

from llada_core.evaluation import recipes, taskset
from llada_core.evaluation.benchmark import Benchmark, benchmark, chosen, requests_of, run
from llada_core.evaluation.params import BenchmarkSettings, EvaluateParams
from llada_core.evaluation.requests import sampling_params
from llada_core.evaluation.statistics import mean_of_means
from llada_core.settings import ConfigError
from tests.evaluation.scripted import GoldLM
from tests.evaluation.test_llada2_recipes import PROMPTS
from tests.tiny import tiny_tokenizer

REVIEWED = Path(__file__).parents[1] / "golden" / "rendered_requests.json"
NOT_HERE = {
    "base_gpqa",
    "instruct_gpqa",
    "llada15_gpqa",
    "llada2_gpqa",
    "instruct_ifeval",
    "llada15_ifeval",
    "llada2_ifeval",
    "llada2_aime24",
    "llada2_aime25",
    "dream_mmlu_pro",
    "dream_ifeval",
    *(f"llada2_{name}" for name in PROMPTS),  # proven in test_llada2_recipes.py
}
# One member stands for a large group here; `python -m tests.evaluation.gold` proves them whole.
MEMBER = {
    "mmlu": ("mmlu_anatomy", 1),
    "mmlu_generative": ("mmlu_anatomy_generative", 3),
    "mmlu_pro": ("mmlu_pro_law", 3.1),
    "bbh": ("bbh_cot_fewshot_word_sorting", 4),
    "cmmlu": ("cmmlu_anatomy", 1),
    "ceval-valid": ("ceval-valid_logic", 2),
    "minerva_math": ("minerva_math_geometry", 3.1),
    "parallelbench": ("parallelbench_insert_random", 1),
}
HERE = [n for n in recipes.names() if n not in NOT_HERE]


def asks_otherwise(name, variant):
    """Whether a variant asks or scores otherwise than the recipe; LLaDA 1.5's ask what Instruct's ask."""
    recipe, other = recipes.find(name), recipes.find(f"{name}.{variant}")
    fields = ("task", "definition", "change", "metric", "shots", "chat", "turns")
    like = (
        name.startswith(("llada15", "llada2"))
        or recipe.variants[variant].like
        or "semi" in variant
        or variant.count("_")
    )
    return not like and any(getattr(recipe, f) != getattr(other, f) for f in fields)


VARIANTS = [f"{n}.{v}" for n in HERE for v in recipes.find(n).variants if asks_otherwise(n, v)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def small(name):
    recipe = recipes.find(name)
    task, version = MEMBER.get(recipe.task, (recipe.task, recipe.version))
    return recipe.model_copy(update={"task": task, "version": float(version)})


def scripted(name, root, *, limit=4, shift=0, **options):
    recipe = small(name)
    tasks = taskset.tasks_of(recipe, root)
    lm = GoldLM(tiny_tokenizer(), recipe, tasks, shift=shift, **options)
    return run(Benchmark(name, recipe, tasks, recipe.settings), lm, limit=limit)


def test_every_column_has_a_recipe_for_each_of_its_sources_that_one_can_repeat():
    columns = {name: [c.column for c in recipes.table(name).columns] for name in ("base", "instruct")}
    assert len(columns["base"]) == 14
    assert len(columns["instruct"]) == 10
    figures_alone = {"base": {"opencompass"}, "dream_base": {"dream", "dllm_dream"}, "illada": {"illada_likelihood"}}
    figures_alone |= {"illada_instruct": {"illada_paper"}, "llada_moe": {"moe_card"}, "llada_moe_base": {"moe_paper"}}
    # Fast-dLLM has no script for these two.
    no_script = {"fastdllm_math", "fastdllm_mbpp"}
    for name, table in recipes.tables().items():
        for column in table.columns:
            recipe = recipes.find(column.recipe)
            assert column.figures.keys() <= table.sources.keys()
            for source in column.figures.keys() - figures_alone.get(name, set()):
                if not (column.recipe in no_script and source.startswith("paper")):
                    assert recipe.of(source).variant == source


def test_figures_of_all_sources():
    row = {f.source: f.value for f in recipes.figures("base_gsm8k")}
    expected = {"official": 0.703, "length_512": 0.708, "length_256": 0.7, "opencompass": 0.719, "dllm": 0.707}
    expected |= {"confidence": 0.819, "moe_paper": 0.6641, "dream": 0.772, "dllm_dream": 0.77}
    assert row == pytest.approx(expected)
    instruct = {f.source: f.value for f in recipes.figures("instruct_gsm8k")}
    assert instruct["semi_autoregressive"] == pytest.approx(0.786)
    assert instruct["opencompass_semi_autoregressive"] == pytest.approx(0.789)
    official = [c.figures["official"] for c in recipes.table("base").columns]
    assert official == [65.9, 49.7, 45.9, 70.5, 46.1, 74.8, 73.6, 70.3, 31.4, 25.2, 35.4, 40.0, 70.5, 69.9]
    by_opencompass = [c.figures.get("opencompass") for c in recipes.table("instruct").columns]
    assert by_opencompass == [65.4, 36.6, 89.2, 75.3, 68.8, 29.6, 32.3, 47.0, 39.6, None]
    assert [c.figures["opencompass"] for c in recipes.table("llada15").columns] == [83.6, 42.3, 34.8, 51.2, 42.6, 65.2]


def test_a_table_as_one_of_its_sources_measured_it():
    columns = recipes.table("instruct.opencompass").columns
    assert [c.recipe for c in columns][:2] == ["instruct_mmlu.opencompass", "instruct_mmlu_pro.opencompass"]
    assert len(columns) == 10
    assert [c.column for c in recipes.table("base.length_512").columns] == ["BBH", "GSM8K", "Math", "HumanEval", "MBPP"]
    with pytest.raises(ConfigError, match="did you mean 'opencompass'"):
        recipes.table("instruct.opencompas")
    with pytest.raises(ConfigError, match="did you mean 'instruct'"):
        recipes.table("instrct")


def test_a_variant_says_what_it_asks_otherwise():
    internal, theirs = recipes.find("instruct_mmlu"), recipes.find("instruct_mmlu.opencompass")
    assert internal.departures(internal).keys() == {"prompt", "filter", "shots"}
    assert internal.departures(theirs).keys() == {"prompt", "shots", "filter", "metric"}
    assert theirs.departures(theirs) == {}
    assert theirs.settings == internal.settings
    later = recipes.find("llada15_gsm8k.opencompass")
    assert (later.task, later.shots) == ("gsm8k_opencompass", 4)
    assert later.settings == recipes.find("llada15_gsm8k").settings
    assert recipes.find("instruct_gsm8k").turns
    assert not recipes.find("instruct_gsm8k.dllm").turns


def test_llada2_is_asked_with_the_settings_of_its_reports_and_of_its_reproduction():
    """Each variant is one that the sampler takes; which column a table measures where no source is named is its own."""
    special = tiny_tokenizer().special
    sampled = {}
    for name in (n for n in recipes.names() if n.startswith("llada2_")):
        for variant in (recipes.find(name).variant, *recipes.find(name).variants):
            sampled[f"{name}.{variant}"] = sampling_params(recipes.find(f"{name}.{variant}").settings, special)
    assert {(p.block_length, p.steps, p.cache, p.stop_at_eos) for p in sampled.values()} == {(32, 32, "prefix", True)}
    told = {
        variant: {
            (p.sampler, p.threshold, p.editing_threshold) for n, p in sampled.items() if n.endswith(f".{variant}")
        }
        for variant in ("report", "dare", "dare21", "quality", "speed")
    }
    assert told == {
        "report": {("llada2.0", 0.95, 0.9)}, "dare": {("llada2.0", 0.95, 0.9)}, "dare21": {("llada2.1", 0.95, 0.9)},
        "quality": {("llada2.1", 0.7, 0.5)}, "speed": {("llada2.1", 0.5, 0.0)},
    }  # fmt: skip
    assert sampled["llada2_gpqa.dare"].max_new_tokens == 128
    assert {c.recipe.partition(".")[2] for c in recipes.table("llada21").columns} == {"quality"}
    assert [c.recipe for c in recipes.table("llada2").columns][:2] == ["llada2_mmlu", "llada2_mmlu_pro"]
    speed = next(f for f in recipes.figures("llada2_gpqa") if f.source == "speed")
    assert (speed.value, speed.tokens_per_forward, speed.model) == (pytest.approx(0.4836), 3.62, "LLaDA2.1-mini")


@pytest.mark.parametrize(
    ("name", "asked", "answer"), [("aime24", "Problem", "Answer"), ("aime25", "problem", "answer")]
)
def test_aime_is_asked_in_the_words_of_its_reproduction_and_judged_by_the_box(tmp_path, name, asked, answer):
    folder = tmp_path / name
    folder.mkdir()
    rows = [{asked: f"What is {n}?", answer: n} for n in (33, 204, 5)]
    split = "train" if name == "aime24" else "test"
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, records = scripted(f"llada2_{name}", tmp_path)
    assert (result["score"], result["n"]) == (1.0, 3)
    told = "What is 33?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert told in records[0]["prompt"]
    assert scripted(f"llada2_{name}", tmp_path, shift=1)[0]["score"] == 0.0
    values = {f.source: (f.value, f.tokens_per_forward) for f in recipes.figures("llada2_aime25")}
    assert values["quality"] == (pytest.approx(0.4333), 3.29)
    assert values["dare"] == (pytest.approx(0.2333), None)


def test_dream_is_asked_with_its_own_sampler():
    special = tiny_tokenizer().special
    for column in recipes.table("dream").columns:
        recipe = recipes.find(column.recipe)
        params = sampling_params(recipe.settings, special)
        assert (params.temperature, params.top_p, params.remasking, params.cache) == (0.1, 0.9, "entropy", "none")
        assert params.steps == params.max_new_tokens == params.block_length
        assert "settings" in recipe.departures(recipe), "its confidence is not ours, and the report says so"
        assert not recipe.turns
    assert sampling_params(recipes.find("dream_ifeval").settings, special).max_new_tokens == 1280


def test_a_variant_changes_only_what_it_names():
    official, dllm = recipes.find("base_gsm8k"), recipes.find("base_gsm8k.dllm")
    assert (official.settings.sampling["steps"], dllm.settings.sampling["steps"]) == (1024, 256)
    assert dllm.shots == official.shots
    semi = recipes.find("instruct_gsm8k.semi_autoregressive").settings.sampling
    assert (semi["max_new_tokens"], semi["block_length"], semi["eos"]) == (256, 8, "none")
    assert recipes.find("gsm8k").name == "base_gsm8k"
    arc = recipes.find("base_arc_c")
    assert recipes.find("base_arc_c.confidence").settings.that_matter("likelihood")["estimator"] == "confidence"
    assert "settings" in arc.departures(arc.of("confidence")), "a score by confidence is no likelihood"
    assert len(recipes.table("illada").columns) == 9
    assert recipes.find("base_mmlu.confidence").settings.framed
    assert not recipes.find("base_mmlu").settings.framed


@pytest.mark.parametrize(
    ("name", "message"),
    [("bse_mmlu", "did you mean 'base_mmlu'"), ("base_mmlu.dlm", "did you mean 'dllm'"), ("zzz", "allowed: arc_easy")],
)
def test_an_unknown_recipe_names_the_nearest(name, message):
    with pytest.raises(ConfigError, match=message):
        recipes.find(name)


@pytest.mark.parametrize("name", HERE + VARIANTS)
def test_reference_answers_score_one_through_the_whole_harness(data_root, name):
    if recipes.find(name).kind == "rolling":
        pytest.skip("a likelihood of text has no right answer")
    result, records = scripted(name, data_root)
    assert (result["score"], result["n"]) == (pytest.approx(1.0), 4)
    assert all(record["score"] == pytest.approx(1.0) for record in records)
    assert result["subset"]


OTHERS = ["base_gsm8k", "instruct_gsm8k", "instruct_math", "poem_next", "instruct_gsm8k.opencompass"]


@pytest.mark.parametrize("name", [*OTHERS, "instruct_math.opencompass"])
def test_another_questions_answer_is_wrong(data_root, name):
    result, _ = scripted(name, data_root, limit=20 if "math" in name else 40, shift=1)
    assert result["score"] <= 0.05


@pytest.mark.parametrize("name", [n for n in HERE + VARIANTS if recipes.find(n).kind == "generate"])
def test_an_empty_answer_is_wrong_and_no_error(data_root, name):
    recipe = small(name).model_copy(update={"gold": ""})
    tasks = taskset.tasks_of(recipe, data_root)
    lm = GoldLM(tiny_tokenizer(), recipe, tasks)
    result, records = run(Benchmark(name, recipe, tasks, recipe.settings), lm, limit=2)
    assert [record["reply"] for record in records] == ["", ""]
    assert (result["score"], lm.new_tokens) == (0.0, [0, 0])


def test_a_question_without_what_its_task_reads_is_told(data_root, tmp_path):
    (tmp_path / "piqa").mkdir()
    for file in (data_root / "piqa").iterdir():
        (tmp_path / "piqa" / file.name).write_text(file.read_text().replace('"goal"', '"gaol"'))
    with pytest.raises(ConfigError, match=r"base_piqa: no questions from .*: 'goal' is undefined"):
        taskset.tasks_of(recipes.find("base_piqa"), tmp_path)


def test_scripted_answers_come_out_of_many_steps_and_batches_of_one(data_root):
    whole, records = scripted("instruct_gsm8k", data_root, limit=3, batch_size=3, steps=1)
    stepped, same = scripted("instruct_gsm8k", data_root, limit=3, batch_size=1, steps=16)
    assert (records, whole["score"]) == (same, stepped["score"])


def told(text):
    """Length, hash, and both ends of a text: the benchmarks' own words are not kept here."""
    return [len(text), hashlib.sha256(text.encode()).hexdigest()[:16], text[:40], text[-40:]]


def test_first_prompt_stop_strings_and_filters_are_the_reviewed_ones(data_root):
    """The whole prompts were read before their hashes were kept; a change of one is a change of what is measured."""
    tokenizer, found = tiny_tokenizer(), {}
    for name in HERE + VARIANTS:
        recipe = small(name)
        tasks = taskset.tasks_of(recipe, data_root)
        lm = GoldLM(tokenizer, recipe, tasks)
        asked = requests_of(Benchmark(name, recipe, tasks, recipe.settings), lm, limit=1)
        (requests,) = asked.values()
        (task,) = tasks["tasks"].values()
        found[name] = {
            "prompt": told(requests[0].args[0]),
            "continuation": told(requests[0].args[1])
            if len(requests[0].args) > 1 and recipe.kind != "generate"
            else None,
            "asked": requests[0].args[1] if recipe.kind == "generate" else None,
            "filters": [[f["name"], [step["function"] for step in f["filter"]]] for f in task.config.filter_list or []],
            "metric": recipe.metric,
        }
    found = json.loads(json.dumps(found))
    if os.environ.get("WRITE_REVIEWED"):
        REVIEWED.write_text(json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    assert found == json.loads(REVIEWED.read_text(encoding="utf-8"))


def test_the_published_prompts_of_opencompass_to_the_letter(data_root):
    """What its files say, with one question in it."""
    tokenizer = tiny_tokenizer()

    def asked(name):
        recipe = small(name)
        tasks = taskset.tasks_of(recipe, data_root)
        lm = GoldLM(tokenizer, recipe, tasks)
        ((request, *_),) = requests_of(Benchmark(name, recipe, tasks, recipe.settings), lm, limit=1).values()
        return request.args[0].messages, request.doc

    messages, doc = asked("instruct_mmlu.opencompass")
    hint = "There is a single choice question about anatomy. Answer the question by replying A, B, C or D."
    assert [m["role"] for m in messages] == ["user", "assistant"] * 5 + ["user"]
    assert messages[0]["content"].startswith(f"{hint}\nQuestion: ")
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"], strict=True))
    assert messages[-1]["content"] == f"{hint}\nQ: {doc['question']}\n{options}\nA: "
    messages, doc = asked("instruct_math.opencompass")
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    assert [m["content"] for m in messages] == [f"{doc['problem']}\n{boxed}"]
    messages, doc = asked("instruct_mbpp.opencompass")
    assert len(messages) == 7
    tests = "\n".join(doc["test_list"])
    assert messages[-1]["content"] == (
        f"You are an expert Python programmer, and here is your task: {doc['text']} Your code should pass these tests:"
        f"\n\n {tests}  \n"
    )


def test_local_files_are_marked_where_they_are_not_the_whole_benchmark(data_root):
    asked = benchmark("instruct_math", EvaluateParams(), root=data_root, puzzles=Path("none"))
    assert asked.subset == "MATH-500 of 5000"
    assert asked.as_pinned
    changed = EvaluateParams(overrides={"instruct_math": BenchmarkSettings(sampling={"steps": 64})})
    assert not benchmark("instruct_math", changed, root=data_root, puzzles=Path("none")).as_pinned


def test_programs_run_only_with_the_opt_in(data_root):
    with pytest.raises(ConfigError, match="allow it with run_code"):
        benchmark("base_humaneval", EvaluateParams(), root=data_root, puzzles=Path("none"))


def test_damaged_and_absent_files_are_told_in_one_line(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "1 + 1?", "ans')
    with pytest.raises(ConfigError, match=r"base_gsm8k: no questions from .*gsm8k"):
        taskset.tasks_of(recipes.find("base_gsm8k"), tmp_path)
    with pytest.raises(ConfigError, match="not on the Hub; give a data root"):
        taskset.tasks_of(recipes.find("poem_next"), tmp_path)
    with pytest.raises(ConfigError, match="base_gpqa: no questions from the Hub"):
        taskset.tasks_of(recipes.find("base_gpqa"), tmp_path)


def test_another_version_of_a_task_is_refused(data_root):
    other = recipes.find("base_gsm8k").model_copy(update={"version": 2.0})
    with pytest.raises(ConfigError, match=r"pinned to version 2\.0 of gsm8k, installed is 3\.0"):
        taskset.tasks_of(other, data_root)


def test_drift_of_subtasks_is_told(data_root):
    result, _ = scripted("base_bbh", data_root, limit=2)
    assert result["drift"] == [
        "bbh_cot_fewshot_word_sorting: version 4.0 for 3.0 of lm-eval 0.4.8",
        "bbh_cot_fewshot_word_sorting: target delimiter '' for ' ' of lm-eval 0.4.8",
    ]
    recipe = small("base_gsm8k")
    assert taskset.drift(recipe, taskset.tasks_of(recipe, data_root)) == []


def test_a_share_asks_the_same_questions_every_time_and_is_marked(data_root):
    recipe = small("instruct_gsm8k")
    tasks = taskset.tasks_of(recipe, data_root)
    asked = Benchmark("instruct_gsm8k", recipe, tasks, BenchmarkSettings(share=0.01).over(recipe.settings))
    numbers = chosen(asked)["gsm8k_cot"]
    assert (len(numbers), numbers == list(range(13))) == (13, False)
    assert len(chosen(asked, 5)["gsm8k_cot"]) == 5
    result, records = run(asked, GoldLM(tiny_tokenizer(), recipe, tasks))
    assert [r["id"] for r in records] == [f"gsm8k_cot/{n}" for n in numbers]
    assert (result["score"], result["subset"]) == (1.0, "13 of 1319 questions")
    assert result["as_pinned"]


def test_the_mean_over_subtasks_weighs_them_alike():
    found = mean_of_means([[1.0] * 90, [0.0] * 10])
    assert found["score"] == 0.5
    assert 0.35 < found["low"] < 0.5 < found["high"] < 0.65
