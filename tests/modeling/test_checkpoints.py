"""Published layouts read and written: bit for bit, key for key, strictly; and every way in which a folder is wrong."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import llada_core
from llada_core import settings
from llada_core.modeling import (
    LLaDA2MoeModelLM,
    LLaDAModelLM,
    LLaDAMoEModelLM,
    add_lora,
    load_config,
    load_model,
    save_model,
)
from llada_core.modeling.adapters import save_adapter
from llada_core.modeling.families import LLADA, LLADA2, LLADA_MOE, LoraParams
from llada_core.tokenizer import SpecialTokens
from tests.reference import BLOCKS, GOLDEN, MOE, special_of
from tests.tiny import tiny_model, tiny_pair

ALL = [
    "llada_tiny",
    "llada_tiny_eos",
    "llada_tiny_gqa_qknorm_bias",
    "llada_moe_tiny",
    "llada_moe_tiny_shared_dense_bias",
    "llada2_tiny",
    "llada21_tiny",
]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_load_save_load_is_bit_identical_under_the_published_keys(tmp_path, name, shard):
    model = load_model(GOLDEN / name, special_tokens=special_of(name))
    save_model(model, tmp_path / "copy", max_shard_size=shard)
    files = sorted((tmp_path / "copy").glob("*.safetensors"))
    assert len(files) == 1 if shard == "5GB" else len(files) > 2
    saved = {k: v for file in files for k, v in load_file(file).items()}
    published = load_file(GOLDEN / name / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[k], published[k]) and saved[k].dtype == published[k].dtype for k in saved)
    again = load_model(tmp_path / "copy")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_config_json_comes_back_as_it_was_with_the_special_tokens_named(tmp_path, name):
    save_model(load_model(GOLDEN / name, special_tokens=special_of(name)), tmp_path / "copy")
    before, after = (json.loads((f / "config.json").read_text()) for f in (GOLDEN / name, tmp_path / "copy"))
    ids = {k.replace("_id", "_token_id"): v for k, v in vars(special_of(name)).items() if v is not None}
    before.pop("transformers_version")
    after.pop("transformers_version")
    assert after == {**before, **ids}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_auto_classes_open_the_published_folder_without_editing_it(name, auto):
    model = auto.from_pretrained(GOLDEN / name)
    kind = LLaDA2MoeModelLM if name.startswith("llada2") else LLaDAMoEModelLM if "moe" in name else LLaDAModelLM
    assert type(model) is kind


def python(tmp_path, *lines):
    """Runs a program in a process of its own, where this package may not have been imported."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(GOLDEN.parent.parent)}
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_export_opens_with_the_code_of_the_official_repository(tmp_path):
    """auto_map is kept, so the official files, once beside the weights, are what trust_remote_code runs elsewhere."""
    model, tokenizer = tiny_pair()
    save_model(model, tmp_path / "m", tokenizer)
    assert set(json.loads((tmp_path / "m" / "config.json").read_text())) >= set(LLADA.config)
    (tmp_path / "m" / "configuration_llada.py").write_text(
        "from transformers import PretrainedConfig\n"
        "class LLaDAConfig(PretrainedConfig):\n    model_type = 'llada'\n    official = True\n"
    )
    python(
        tmp_path,
        "from transformers import AutoConfig",
        f"config = AutoConfig.from_pretrained({str(tmp_path / 'm')!r}, trust_remote_code=True)",
        f"assert config.official and config.d_model == {model.shape.width}",
    )


def test_auto_classes_know_ours_once_the_config_is_imported_and_the_package_loads_nothing_heavy(tmp_path):
    python(
        tmp_path,
        "import sys, llada_core",
        "assert not {'torch', 'transformers'} & set(sys.modules)",
        "from transformers import AutoModel",
        "from llada_core.modeling import LLaDAConfig",
        f"model = AutoModel.from_pretrained({str(GOLDEN / 'llada_moe_tiny')!r})",
        "assert type(model).__name__ == 'LLaDAMoEModelLM'",
    )


def test_public_names_resolve():
    assert all(getattr(llada_core, name) is not None for name in llada_core.__all__)


@pytest.mark.parametrize("kind", ["llada", "llada_moe", "llada2"])
def test_loading_initialises_nothing(tmp_path, monkeypatch, kind):
    save_model(tiny_model(kind), tmp_path / "m")

    def forbidden(tensor, *args, **kwargs):
        assert tensor.is_meta, "a weight that is overwritten was initialised"
        return tensor

    for name in ("trunc_normal_", "normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, forbidden)
    load_model(tmp_path / "m")


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN / "llada_tiny", tmp_path / "m")
    return tmp_path / "m"


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


WEIGHTS, BIAS = GOLDEN / "llada2_tiny" / "model.safetensors", "model.layers.1.mlp.gate.expert_bias"
FIRST = "model.transformer.blocks.0.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop(FIRST), f"missing: {FIRST}"),
        (lambda w: w.update({"model.transformer.blocks.7.q_proj.weight": torch.ones(2)}), "unexpected: model.transf"),
        (lambda w: w.update({FIRST: torch.ones(3, 3)}), r"of another shape: .*q_proj.weight \(3, 3\), not \(64, 64\)"),
    ],
)
@pytest.mark.parametrize("way", ["load_model", "AutoModel"])
def test_strict(folder, change, told, way):
    change_weights(folder, change)
    with pytest.raises(ValueError, match=told):
        load_model(folder) if way == "load_model" else AutoModel.from_pretrained(folder)


def test_strict_for_experts_where_a_stack_could_hide_a_renumbered_one(tmp_path):
    shutil.copytree(GOLDEN / "llada_moe_tiny", tmp_path / "m")
    third, ninth = (f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in (3, 8))
    change_weights(tmp_path / "m", lambda w: w.update({ninth: w.pop(third)}))
    with pytest.raises(ValueError, match=rf"missing: {third}; unexpected: {ninth}"):
        load_model(tmp_path / "m", special_tokens=MOE)


def test_truncated_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_model(folder)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        load_model(folder)


def test_missing_shard(tmp_path):
    save_model(tiny_model(), tmp_path / "m", max_shard_size="20KB")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nowhere", "."])
def test_no_such_model(name):
    with pytest.raises(FileNotFoundError, match=r"no such folder|no config.json"):
        load_model(name)


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update({k: v for k, v in changes.items() if v is not Ellipsis})
    for key, value in changes.items():
        if value is Ellipsis:
            del config[key]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        {"alibi": True}, {"block_group_size": 2}, {"block_type": "sequential"}, {"activation_type": "gelu"},
        {"layer_norm_type": "default"}, {"rope": False}, {"include_bias": True}, {"scale_logits": True},
        {"input_emb_norm": True}, {"attention_dropout": 0.1}, {"bias_for_layer_norm": True}, {"rope_theta": ...},
        {"n_kv_heads": 3}, {"rope_full_precision": False}, {"sliding_window": 128}, {"d_model": 65},
    ],
)  # fmt: skip
def test_an_unsupported_config_value_is_refused_by_name(folder, change):
    rewrite(folder, **change)
    key = next(iter(change))
    word = {"n_kv_heads": "key/value heads", "d_model": "width 65"}.get(key, key)
    with pytest.raises(ValueError, match=word):
        load_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"}, {"clip_qkv": 8.0}, {"attention_bias": True}, {"norm_topk_prob": True},
        {"routed_scaling_factor": 2.5}, {"moe_router_score_function": "sigmoid"}, {"partial_rotary_factor": 0.5},
        {"router_num_group": 4}, {"moe_layer_freq": [1]}, {"num_experts_per_tok": 9}, {"n_group": 2},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)  # fmt: skip
def test_an_unsupported_moe_value_is_refused_by_name(tmp_path, change):
    shutil.copytree(GOLDEN / "llada_moe_tiny", tmp_path / "m")
    rewrite(tmp_path / "m", **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        load_config(tmp_path / "m")


@pytest.mark.parametrize(
    "change",
    [
        {"score_function": "softmax"}, {"norm_topk_prob": False}, {"use_qkv_bias": True}, {"use_bias": True},
        {"use_bias": ...}, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, {"use_qk_norm": False}, {"n_group": 3},
        {"topk_group": 5}, {"rotary_dim": 4}, {"partial_rotary_factor": ...}, {"norm_head": True}, {"router_dtype": "bf16"},
        {"use_sliding_window": True}, {"num_key_value_heads": ...}, {"window": 7}, {"moe_router_enable_expert_bias": False},
        {"num_experts_per_tok": 9}, {"first_k_dense_replace": ...}, {"head_dim": 6},
    ],
)  # fmt: skip
def test_an_unsupported_llada2_value_is_refused_by_name(tmp_path, change):
    shutil.copytree(GOLDEN / "llada2_tiny", tmp_path / "m")
    rewrite(tmp_path / "m", **change)
    word = {"num_experts_per_tok": "topk_group", "head_dim": "rotary_dim"}
    with pytest.raises(ValueError, match=word.get(next(iter(change)), next(iter(change)))) as error:
        load_config(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_what_llada2_may_leave_out(tmp_path):
    """Flash's file names fewer keys; the head's width is then the heads' share, and queries and keys are normed."""
    shutil.copytree(GOLDEN / "llada2_tiny", tmp_path / "m")
    before = load_config(tmp_path / "m").architecture()
    rewrite(
        tmp_path / "m", use_qk_norm=..., head_dim=..., rotary_dim=..., sliding_window=..., dtype=..., norm_head=None
    )
    rewrite(tmp_path / "m", torch_dtype="float32", num_shared_experts=None)
    after = load_config(tmp_path / "m").architecture()
    assert dataclasses.replace(after, moe=before.moe) == before
    assert (before.moe.shared_width, after.moe.shared_width) == (16, 0)


def test_dfactorys_merged_layout_is_named(tmp_path):
    shutil.copytree(GOLDEN / "llada2_tiny", tmp_path / "m")
    rewrite(tmp_path / "m", model_type="llada2_moe_veomni")
    with pytest.raises(ValueError, match=r"dFactory's merged layout.*moe_convertor"):
        load_model(tmp_path / "m", special_tokens=BLOCKS)
    rewrite(tmp_path / "m", model_type="llada2_moe")
    merged = [f"model.layers.1.mlp.experts.{part}_proj" for part in ("gate", "up", "down")]
    change_weights(tmp_path / "m", lambda w: w.update({name: torch.ones(2) for name in merged}))
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.1\.mlp\.experts\.down_proj.*merged layout"):
        load_model(tmp_path / "m", special_tokens=BLOCKS)


def test_the_expert_bias_stays_in_float32_as_2_1_stores_it(tmp_path):
    """2.0 stores it in bfloat16, 2.1 in float32 beside weights in bfloat16: both are loaded without loss."""
    model = load_model(GOLDEN / "llada2_tiny", dtype=torch.bfloat16, special_tokens=BLOCKS)
    kinds = {name.endswith("expert_bias"): weight.dtype for name, weight in model.state_dict().items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert torch.equal(model.blocks[1].mlp.expert_bias, golden_bias := load_file(WEIGHTS)[BIAS])
    save_model(model, tmp_path / "m")
    assert torch.equal(load_file(tmp_path / "m" / "model.safetensors")[BIAS], golden_bias)


def test_keys_that_switch_nothing_on_are_accepted(folder):
    rewrite(folder, n_kv_heads=None, alibi_bias_max=4.0, some_new_switch=False, init_std=0.5)
    assert load_model(folder).shape.n_kv_heads == 4


def test_multi_query_attention_means_one_head(folder):
    rewrite(folder, n_kv_heads=None, multi_query_attention=True)
    assert load_config(folder).architecture().n_kv_heads == 1


def test_special_tokens_that_nobody_names():
    with pytest.raises(ValueError, match="pass special_tokens=SpecialTokens"):
        load_model(GOLDEN / "llada_moe_tiny")


def test_special_tokens_from_config_tokenizer_family_and_caller(tmp_path):
    model, tokenizer = tiny_pair()
    save_model(model, tmp_path / "m", tokenizer)
    assert load_model(tmp_path / "m").special_tokens == tokenizer.special
    rewrite(tmp_path / "m", mask_token_id=..., bos_token_id=..., eot_token_id=...)
    assert load_model(tmp_path / "m").special_tokens == tokenizer.special
    other = SpecialTokens(7, 8, 9)
    assert load_model(tmp_path / "m", special_tokens=other).special_tokens == other
    rewrite(tmp_path / "m", mask_token_id=9)
    with pytest.raises(ValueError, match="mask_token_id 9, its tokenizer 2"):
        load_model(tmp_path / "m")
    from llada_core.modeling.pretrained import special_tokens_of

    for family in (LLADA, LLADA_MOE, LLADA2):
        bare = {k: v for k, v in family.config.items() if not k.endswith("token_id")}
        (tmp_path / "config.json").write_text(json.dumps(bare))
        assert special_tokens_of(tmp_path, {}, family.vocab_size) == SpecialTokens(**family.special)


def test_special_tokens_outside_the_vocabulary(folder):
    with pytest.raises(ValueError, match="mask_id 136 is outside the vocabulary"):
        load_model(folder, special_tokens=SpecialTokens(136, 1, 1))
    with pytest.raises(ValueError, match="also mask_id"):
        load_model(folder, special_tokens=SpecialTokens(1, 1, 2))


def test_saving_replaces_a_folder_whole_and_leaves_nothing_behind(tmp_path):
    save_model(tiny_model(), tmp_path / "m", max_shard_size="20KB")
    (tmp_path / "m" / "stray").write_text("")
    save_model(tiny_model(seed=1), tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_failed_save_leaves_the_old_folder(tmp_path):
    save_model(tiny_model(), tmp_path / "m")

    class Full:
        def save(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_model(tiny_model(seed=1), tmp_path / "m", Full())
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert torch.equal(load_model(tmp_path / "m").state_dict()[FIRST], tiny_model().state_dict()[FIRST])


def test_low_bits_need_a_gpu_and_their_package(monkeypatch):
    with pytest.raises(ValueError, match="bits=4 needs a CUDA GPU"):
        load_model(GOLDEN / "llada_tiny", device="cpu", bits=4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^bits=4 needs the package bitsandbytes: pip install 'lladaflow\[4bit\]'$"):
        load_model(GOLDEN / "llada_tiny", device="cuda", bits=4)


@pytest.mark.parametrize("double_quant", [True, False])
def test_four_bits_are_nf4_with_the_scales_that_were_asked_for(monkeypatch, tmp_path, double_quant):
    """What transformers is told; the kernels themselves need a GPU."""
    told = []

    def from_pretrained(folder, **how):
        told.append(how["quantization_config"])
        raise ValueError("no GPU here")

    save_model(tiny_model(), tmp_path / "base")
    save_adapter(lightly_adapted(), tmp_path / "adapter", "../base")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(settings, "find_spec", lambda name: object())
    monkeypatch.setattr(LLaDAModelLM, "from_pretrained", from_pretrained)
    for name in ("base", "adapter"):
        with pytest.raises(ValueError, match="no GPU here"):
            load_model(tmp_path / name, device={"": "cuda:0"}, bits=4, double_quant=double_quant)
    assert [(q.bnb_4bit_quant_type, q.bnb_4bit_use_double_quant) for q in told] == [("nf4", double_quant)] * 2


def lightly_adapted():
    model = tiny_model()
    add_lora(model, LoraParams(r=2))
    return model


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("it is")
    with pytest.raises(ValueError, match="no CUDA GPU is visible"):
        load_model(GOLDEN / "llada_tiny", device="cuda")


def test_memory_while_loading_is_the_model_and_a_shard(tmp_path):
    """Anonymous memory, in a process of its own; mapped file pages are the system's to drop."""
    save_model(tiny_model(d_model=256, n_layers=16, mlp_hidden_size=1024), tmp_path / "m", max_shard_size="8MB")
    size = sum(f.stat().st_size for f in (tmp_path / "m").glob("*.safetensors"))
    assert size > 60e6
    python(
        tmp_path,
        "import re, resource, threading, torch",
        "import llada_core.modeling.network",
        "from llada_core.modeling import load_model",
        "def used():",
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024",
        "before, peak, done = used(), [0], threading.Event()",
        "def watch():",
        "    while not done.wait(0.001):",
        "        peak[0] = max(peak[0], used())",
        "watcher = threading.Thread(target=watch)",
        "watcher.start()",
        f"model = load_model({str(tmp_path / 'm')!r}, dtype=torch.float64)",
        "done.set()",
        "watcher.join()",
        f"assert {size} < peak[0] - before < 2 * {size} + 2 * 8e6 + 15e6, (peak[0] - before)",
    )


def test_dtype_and_device():
    model = load_model(GOLDEN / "llada_tiny", dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.device.type == "cpu"
    assert load_model(GOLDEN / "llada_tiny", device={"": "cpu"}).dtype == torch.float32
