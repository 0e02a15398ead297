"""Every path and command that the Markdown files name exists."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llada_core.settings import _block_in
from tasks.launch.plan import refuse
from tasks.project import Params

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
# What a run makes is named in the docs but absent from a fresh clone.
MADE_BY_A_RUN = (
    "data",
    "models",
    "runs",
    "reports",
    "store",
    "workspaces",
    "mlruns",
    "mlflow.db",
    ".venv",
    "my-",
    "export",
)
ROOMS = "llada_core|tasks|flows|app|cli|tests|benchmarks|docs|profiles"


def _code(text: str) -> list[str]:
    """Inline code and the lines of fenced blocks."""
    fenced = re.findall(r"```[^\n]*\n(.*?)```", text, flags=re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return inline + [line.strip().removeprefix("$ ") for block in fenced for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", TEXT[page])
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"broken links: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_of_our_rooms_exist(page: Path) -> None:
    named = {
        match for code in _code(TEXT[page]) for match in re.findall(rf"(?<![\w/.-])((?:{ROOMS})/[\w./-]*\w)", code)
    }
    missing = sorted(name for name in named if not (ROOT / name).exists() and not name.startswith(MADE_BY_A_RUN))
    assert not missing, f"paths that do not exist: {missing}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        m
        for text in TEXT.values()
        for code in _code(text)
        for m in re.findall(r"(?:^|[;&] *)make ([a-z][a-z-]*)", code)
    }
    assert named <= targets, f"no such make targets: {named - targets}"


def test_llada_commands_exist() -> None:
    named = {
        m
        for text in TEXT.values()
        for code in _code(text)
        for m in re.findall(r"(?:^|[;&|] *)llada ([a-z][a-z-]+)", code)
    }
    result = subprocess.run(
        [sys.executable, "-m", "cli.main", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    missing = {name for name in named if not re.search(rf"\b{name}\b", result.stdout)}
    assert not missing, f"no such llada commands: {missing}"


def test_modules_named_with_dash_m_exist() -> None:
    named = {
        m
        for text in TEXT.values()
        for code in _code(text)
        for m in re.findall(r"-m ((?:tasks|flows|app|cli|benchmarks)[\w.]*)", code)
    }
    missing = [
        m for m in named if not any((ROOT / (m.replace(".", "/") + end)).exists() for end in (".py", "/__main__.py"))
    ]
    assert not missing, f"no such modules: {missing}"


# The fields of dllm@ca17675's dataclasses (ModelArguments, DataArguments, TrainingArguments and those of the LLaDA, BERT and
# GRPO examples, tools and samplers), of TRL 0.21's GRPOConfig and ModelConfig, and what d1 and the official scripts take.
FLAGS = """
model_name_or_path dtype load_in_4bit attn_implementation lora target_modules r lora_alpha lora_dropout bias
modules_to_save dataset_args num_proc disable_caching max_length truncation load_preprocessed_data mask_prompt_loss
text_field streaming drop_tail insert_eos random_length_ratio output_dir report_to overwrite_output_dir seed
num_train_epochs learning_rate lr_scheduler_type per_device_train_batch_size per_device_eval_batch_size
gradient_accumulation_steps warmup_ratio bf16 logging_steps eval_on_start eval_strategy eval_steps save_steps
save_only_model group_by_length max_steps run_name time_epsilon loss_weight_type loss_norm_type right_shift_logits
block_size steps cfg_scale remasking p_mask_prompt scale_rewards dataset verbose_reward sft_map_fn_path remove_columns
max_new_tokens temperature stochastic_transfer cfg_keep_tokens suppress_tokens begin_suppress_tokens return_dict
use_cache threshold factor visualize chat_template pretrained batch_size mc_num is_check_greedy device
model_init_kwargs disable_dropout remove_unused_columns max_prompt_length num_generations max_completion_length
ds3_gather_for_generation shuffle_dataset generation_batch_size steps_per_generation top_p top_k min_p
generation_kwargs repetition_penalty use_transformers_paged cache_implementation use_vllm vllm_mode beta num_iterations
epsilon delta epsilon_high importance_sampling_level reward_weights loss_type mask_truncated_completions sync_ref_model
ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile use_liger_loss log_completions num_completions_to_print
wandb_log_unique_prompts model_revision torch_dtype trust_remote_code use_peft lora_r lora_target_modules
lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit bnb_4bit_quant_type
use_bnb_nested_quant model_path diffusion_steps block_length mask_id random_masking max_grad_norm adam_beta1 adam_beta2
weight_decay gen_length cfg logits_eos_inf confidence_eos_eot_inf dual_cache SUDOKU_DATA_PATH BASE_MODELS_DIR
BASE_DATASETS_DIR --t_steps --n_tokens --sampling --instruct --num_gpu --type --eos_inf --accelerate_config --script_path
"""
TABLE = ROOT / "docs" / "from-other-projects.md"


def test_every_flag_of_other_projects_has_a_row() -> None:
    named = {word for code in _code(TEXT[TABLE]) for word in re.findall(r"[-\w]+", code)}
    missing = [flag for flag in FLAGS.split() if flag not in named]
    assert not missing, f"no row names {missing}"


def test_settings_that_the_tables_name_exist() -> None:
    blocks = "|".join(name for name in Params.__pydantic_fields__ if name not in ("name", "seed", "stages"))
    named = {m for text in TEXT.values() for code in _code(text) for m in re.findall(rf"^((?:{blocks})\.[\w.]+)", code)}
    missing = sorted(key for key in named if not key.endswith((".py", ".yaml")) and not _is_setting(key))
    assert not missing, f"no such settings: {missing}"


def _is_setting(key: str) -> bool:
    block: Any = Params
    for part in key.split("."):
        fields = getattr(block, "__pydantic_fields__", None)
        if fields is None or part not in fields:
            return fields is None  # below a mapping or a list, anything may be named
        block = _block_in(fields[part].annotation)
    return True


def test_the_tutorials_profiles_are_ones(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", TEXT[ROOT / "docs" / "tutorial.md"], flags=re.DOTALL)
    named = {Params.parse(yaml.safe_load(block), "tutorial").name: block for block in blocks}
    assert named["llada-sft-own"] == (ROOT / "profiles" / "llada-sft-own.yaml").read_text()
    assert set(named) == {"llada-sft-own", "my-run"}


def test_the_profile_of_the_tutorial_fits_one_gpu() -> None:
    params = Params.load(ROOT / "profiles" / "llada-sft-own.yaml")
    assert params.launch.of("sft").gpu == "H100"
    refuse(params, "sft", "A100")


def test_the_makefile_takes_the_first_suitable_python(tmp_path: Path) -> None:
    for name, python in (("python3.11", "/bin/false"), ("python3.12", sys.executable)):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {python} "$@"\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "Makefile").write_text(f'include {ROOT}/Makefile\nshow: ; @echo "$(PYTHON)"\n')
    make = [str(shutil.which("make")), "-f", str(tmp_path / "Makefile"), "show", "SHELL=/bin/sh"]
    for over, taken in ((), "python3.12"), (("PYTHON=mine",), "mine"):
        done = subprocess.run([*make, *over], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == taken


def test_what_the_dockerfile_copies_is_there() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert len(copied) > 5
    assert not [name for line in copied for name in line.split() if not (ROOT / name).exists()]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {name for line in copied for name in line.split()} & set(ignored)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_profiles_in_the_pages_are_ones(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", TEXT[page], flags=re.DOTALL):
        values = yaml.safe_load(block)
        if "stages" in values:
            Params.parse(values, page.name)


# What a reader looks for, where it is looked for.
HOLDS = {
    "README.md": (
        r"\A# lladaflow\n\nTrain, evaluate.*people who train.*researchers.*!\[.*\n## Two commands\n.*make run .*make test ",
        r"\| benchmark \| n \| chance .*\| puzzle \| question \| answer \|\n(\|[^\n]+\n){4}",
        r"## What was run where\n.* GPU .*ranks.*offload.*## Beside other projects\n.*ML-GSAI/LLaDA.*dllm.*d1.*lladaflow",
    ),
    "docs/concepts.md": (
        r"at first +\.{16}.*after 4 steps.*after 10 steps.*after 16 steps",
        r"## Preference tuning\n.*LLaDA 1\.5",
        r"Usual settings of the 8 B models.*`max_new_tokens`.*GSM8K",
    ),
    "docs/evaluation.md": (
        r"how to measure.*evaluation-proof\.md.*as a benchmark\n.*## Recipes and what is published",
    ),
    "docs/evaluation-proof.md": (r"\A[^\n]*how we know that it is right\n\nFor maintainers",),
    "docs/cluster.md": (
        r"\A[^#]*# From.*?## One machine of 8 GPUs, without Slurm\n.*driver.*?whl/cu.*?## 1\. On the login node",
    ),
    "AGENTS.md": (r"make setup.*make check.*make test.*## Where things are.*## Adding",),
}
STILTED = ("hasty seats", "caches cost its champion nothing", "errs by 3.00 nats")


@pytest.mark.parametrize("page", HOLDS)
def test_a_page_has_what_is_looked_for_there(page: str) -> None:
    text = TEXT[ROOT / page]
    assert not [pattern for pattern in HOLDS[page] if not re.search(pattern, text, flags=re.DOTALL)]
    assert not [words for words in STILTED if words in text]
