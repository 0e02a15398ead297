"""Dream-7B and iLLaDA as rows of the table: their files, and predictions that stand one position before their own."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llada_core.diffusion import masked_nll
from llada_core.likelihood import log_likelihood
from llada_core.modeling import load_model, save_model
from llada_core.modeling.architecture import dream_architecture, illada_architecture
from llada_core.modeling.families import DREAM, FAMILIES, ILLADA, family_of, published_as, published_with, recommended
from llada_core.sampling import generate
from llada_core.sampling.params import RECOMMENDED, SamplingParams
from llada_core.settings import ConfigError
from llada_core.tokenizer import SpecialTokens, Tokenizer
from llada_core.training.params import SFTParams
from llada_core.training.train import objective_for
from tests.tiny import SPECIAL, tiny_model, tiny_tokenizer

TOKENS = torch.tensor([[5, 9, 126, 126, 17, 126], [3, 126, 8, 126, 4, 22]])
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def dream():
    return tiny_model("dream", n_kv_heads=2, seed=3)


@pytest.fixture
def reference(dream, tmp_path):
    """transformers' Qwen2 with the very files of a tiny Dream, its logits moved by hand to where they belong."""
    save_model(dream, tmp_path / "qwen")
    shape = dream.shape
    config = Qwen2Config(
        vocab_size=shape.vocab_rows,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=shape.max_length,
        rope_theta=shape.rope_theta,
        rms_norm_eps=shape.norm_eps,
    )
    network = Qwen2ForCausalLM(config).eval()
    weights = load_file(tmp_path / "qwen" / "model.safetensors")
    network.load_state_dict(weights, strict=True)

    @torch.no_grad()
    def logits(tokens):
        seen = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1])  # nobody is hidden from anybody
        raw = network(tokens, attention_mask=seen, use_cache=False).logits
        return torch.cat([raw[:, :1], raw[:, :-1]], 1)

    return logits


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("dream", {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"}),
        ("illada", {"model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"}),
    ],
)
def test_its_files_are_written_and_read_under_their_published_names(kind, names, tmp_path):
    model = tiny_model(kind)
    save_model(model, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    assert names <= weights.keys()
    template = json.loads((tmp_path / "m" / "config.json").read_text())
    assert template["architectures"] == FAMILIES[kind].published.config["architectures"]
    again = load_model(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    save_model(again, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == weights.keys()
    name, weight = weights.popitem()
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"missing: {name}"):
        load_model(tmp_path / "m")
    save_file(
        weights | {name: weight, "model.more": weight.clone()}, tmp_path / "m" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"unexpected: model\.more"):
        load_model(tmp_path / "m")


def test_dreams_names_and_shape_are_qwens():
    weights = {n for n, _ in tiny_model("dream").named_parameters()}
    family = FAMILIES["dream"]
    published = {family.published_name(name) for name in weights}
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in (f"model.layers.{number}" for number in range(2)):
        expected |= {f"{layer}.self_attn.{p}_proj.{what}" for p in "qkv" for what in ("weight", "bias")}
        expected |= {f"{layer}.self_attn.o_proj.weight", f"{layer}.input_layernorm.weight"}
        expected |= {f"{layer}.post_attention_layernorm.weight"}
        expected |= {f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert published == expected
    assert {family.own_name(name) for name in published} == weights
    shape = dream_architecture(DREAM.config)
    assert (shape.width, shape.n_kv_heads, shape.head_width, shape.qkv_bias, shape.shifted) == (
        3584,
        4,
        128,
        True,
        True,
    )
    for key, value in {"use_sliding_window": True, "hidden_act": "gelu", "attention_bias": False}.items():
        with pytest.raises(ValueError, match=rf"config\.json: {key} = "):
            dream_architecture({**DREAM.config, key: value})
    with pytest.raises(ValueError, match="'surprise' = 3 is not known"):
        dream_architecture({**DREAM.config, "surprise": 3})


def test_illada_is_llama_without_a_direction_and_token_5_for_the_mask(tmp_path):
    shape = illada_architecture(ILLADA.config)
    assert (shape.n_kv_heads, shape.mlp_width, shape.tied, shape.vocab_rows) == (8, 14336, True, 155136)
    assert family_of(ILLADA.config).kind == "illada"
    assert family_of(FAMILIES["llada"].published.config).kind == "llada"
    assert published_as("GSAI-ML/iLLaDA-8B-Instruct").kind == "illada"
    assert published_as("GSAI-ML/LLaDA-8B-Base").kind == "llada"
    assert published_with(ILLADA.config, 155136).special == {"mask_id": 5}
    assert recommended("GSAI-ML/iLLaDA-8B-Instruct") == recommended("mine", ILLADA.config) == "illada"
    assert RECOMMENDED["illada"].variable_length
    for key, value in {"layer_norm_eps": 1e-5, "attention_bias": True, "rope_scaling": {"factor": 4.0}}.items():
        with pytest.raises(ValueError, match=rf"config\.json: {key} = "):
            illada_architecture({**ILLADA.config, key: value})
    model = tiny_model("illada", special=SpecialTokens(mask_id=5, eos_id=2, pad_id=1, bos_id=0))
    assert (model.shape.n_kv_heads, model.shape.tied) == (1, True)
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.special_tokens.mask_id == 5
    prompts = [[7, 8, 9], [7, 8]]
    params = SamplingParams(max_new_tokens=8, block_length=4, steps=8, variable_length=True, cache="dual")
    answers = generate(again, prompts, params).answers
    assert all(5 not in answer.tolist() for answer in answers)

    config = LlamaConfig(  # transformers' LLaMA with the very files, every position seen by every other
        vocab_size=model.shape.vocab_rows,
        hidden_size=model.shape.width,
        intermediate_size=model.shape.mlp_width,
        num_hidden_layers=model.shape.n_layers,
        num_attention_heads=model.shape.n_heads,
        num_key_value_heads=model.shape.n_kv_heads,
        max_position_embeddings=model.shape.max_length,
        rope_theta=model.shape.rope_theta,
        rms_norm_eps=model.shape.norm_eps,
        tie_word_embeddings=True,
    )
    network = LlamaForCausalLM(config).eval()
    weights = load_file(tmp_path / "m" / "model.safetensors")
    network.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, strict=True)
    tokens = torch.tensor([[0, 9, 5, 5, 17, 5], [3, 5, 8, 5, 4, 22]])
    with torch.no_grad():
        expected = network(tokens, attention_mask=torch.zeros(2, 1, 6, 6), use_cache=False).logits
        assert torch.allclose(again(tokens).logits, expected, atol=1e-5)
        blocks = again.by_blocks(4)
        assert torch.allclose(blocks(tokens).logits, again(tokens).logits, atol=1e-6)
    assert (blocks.block_length, blocks.config.model_type) == (4, "llada_blocks")


def test_one_matrix_for_both_ends_may_be_stored_twice_if_both_are_the_same(tmp_path):
    model = tiny_model("illada")
    save_model(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, file, {"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m")(TOKENS).logits, model(TOKENS).logits)
    head[130, 3] += 1
    save_file(weights | {"lm_head.weight": head}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, and the two"):
        load_model(tmp_path / "m")
    save_file(weights | {"lm_head.weight": head[:9].clone()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="unexpected: lm_head"):
        load_model(tmp_path / "m")


def test_a_prediction_is_read_one_position_before_its_own(dream, reference):
    expected = reference(TOKENS)
    with torch.no_grad():
        assert torch.allclose(dream(TOKENS).logits, expected, atol=1e-5)
        index = torch.tensor([0, 2, 3, 6, 7, 9])  # both first positions too, which are read at themselves
        picked = dream(TOKENS, positions=index)
        assert torch.allclose(picked.logits, expected.flatten(0, 1)[index], atol=1e-5)
        kept = dream(TOKENS, positions=index, output_hidden_states=True)
        assert torch.allclose(kept.logits, picked.logits, atol=1e-5)
        targets = torch.arange(6)
        nll = dream(TOKENS, positions=index, targets=targets).nll
        assert torch.allclose(
            nll, torch.nn.functional.cross_entropy(picked.logits, targets, reduction="none"), atol=1e-5
        )
        clean = torch.where(TOKENS == 126, 50, TOKENS)
        loss = masked_nll(dream, TOKENS, clean, TOKENS == 126).nll
        rows = expected[TOKENS == 126].log_softmax(-1)
        assert torch.allclose(loss, -rows[:, 50], atol=1e-5)


def test_it_writes_what_the_reference_would_and_a_batch_equals_its_rows(dream, reference):
    prompts, n = [[5, 9, 11, 30], [3, 8]], 5
    params = SamplingParams(max_new_tokens=n, block_length=n, steps=n)
    together = generate(dream, prompts, params).answers
    for prompt, written in zip(prompts, together, strict=True):
        canvas = torch.tensor([prompt + [126] * n])
        for _ in range(n):
            probability = reference(canvas)[0].softmax(-1)
            best, token = probability.max(-1)
            best[canvas[0] != 126] = -1
            canvas[0, best.argmax()] = token[best.argmax()]
        assert written.tolist() == canvas[0, len(prompt) :].tolist()
        assert generate(dream, [prompt], params).answers[0].tolist() == written.tolist()


def test_its_likelihood_is_that_of_every_subset_by_the_reference(dream, reference):
    prompt, answer = [5, 9, 11], [30, 31, 32]
    total, n = 0.0, len(answer)
    for masks in itertools.product([False, True], repeat=n):
        if k := sum(masks):
            row = prompt + [126 if hidden else token for hidden, token in zip(masks, answer, strict=True)]
            log_p = reference(torch.tensor([row]))[0].log_softmax(-1)
            hidden = [log_p[len(prompt) + i, answer[i]].item() for i in range(n) if masks[i]]
            total += sum(hidden) / (k * math.comb(n, k))
    assert log_likelihood(dream, prompt, answer, estimator="exact") == pytest.approx(total, abs=1e-4)


def test_a_cache_and_a_second_shift_are_refused_in_one_line(dream):
    params = SamplingParams(max_new_tokens=4, block_length=4, steps=4, cache="dual")
    with pytest.raises(ValueError, match="DreamModel keeps no keys and values for cache 'dual'; set cache 'none'"):
        generate(dream, [[5]], params)
    twice = SamplingParams(max_new_tokens=4, block_length=4, steps=4, right_shift_logits=True)
    with pytest.raises(ValueError, match="right_shift_logits: this model moves its predictions to their own places"):
        generate(dream, [[5]], twice)
    with pytest.raises(ConfigError, match="right_shift: this model moves its predictions to their own places"):
        objective_for(SFTParams(max_steps=1, right_shift=True), dream, tiny_tokenizer(), Path("none"), seed=0)


def test_its_tokenizer_is_read_from_vocabulary_and_merges_with_its_template(tmp_path):
    letters = ["<|endoftext|>", *"abcdehimnorstuvy", "Ġ", "Ċ", "he", ".", "A", "Y"]
    (tmp_path / "vocab.json").write_text(json.dumps({text: n for n, text in enumerate(letters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    added = ["<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
    decoder = {str(len(letters) + n): {"content": text, "special": True} for n, text in enumerate(added)}
    decoder["0"] = {"content": "<|endoftext|>", "special": True}
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": decoder,
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
        "chat_template": QWEN_TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    first = len(letters)
    assert tokenizer.special == SpecialTokens(first + 3, 0, 0, bos_id=first + 2, eot_id=first + 1)
    asked = tokenizer.chat_ids([{"role": "user", "content": "the"}])
    text = tokenizer.fast.decode(asked)
    assert text.endswith("<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n")
    assert asked.count(first) == 3
    assert tokenizer.encode("the") == [letters.index("t"), letters.index("he")]
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert (again.special, again.chat_ids([{"role": "user", "content": "the"}])) == (tokenizer.special, asked)


def test_training_goes_down(dream):
    model = dream.train()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    clean = torch.randint(0, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    masked = torch.rand(4, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    losses = []
    for _ in range(30):
        loss = masked_nll(model, torch.where(masked, SPECIAL.mask_id, clean), clean, masked).nll.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
