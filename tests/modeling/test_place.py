"""Where models lie: one function decides it, everything that loads one asks it; devices are never mixed.

No GPU is needed: what a process sees is told, and tensors on a second device are fake ones (`lazy` stands for it, whose
fakes can be indexed in a CPU build, and `meta` for a first one where a CPU is treated apart).
"""

import dataclasses
from contextlib import ExitStack
from importlib.util import find_spec

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llada_core.modeling import LLaDAModelLM, load_model, save_model
from llada_core.modeling import pretrained as loading
from llada_core.modeling.configuration import LLaDAConfig, published_shapes
from llada_core.modeling.families import FAMILIES, LLADA
from llada_core.modeling.place import (
    GB,
    ROOM,
    Machine,
    Place,
    WeightBytes,
    checked_bits,
    kind_of,
    place_for,
    positions_that_fit,
    processes_for,
)
from llada_core.modeling.predictor import feed_from_cpu
from llada_core.modeling.pretrained import empty_model
from llada_core.sampling.params import SamplingParams
from tests.tiny import SPECIAL, tiny_model, tiny_params

FIRST, OTHER = torch.device("meta"), torch.device("lazy")


def machine(*gigabytes: float, memory: float = 64, mps: bool = False, rank: int | None = None) -> Machine:
    """One with GPUs of so much free memory each."""
    free = {f"cuda:{index}": int(each * GB) for index, each in enumerate(gigabytes)}
    free |= {"cpu": int(memory * GB), "mps": int(memory * GB)}
    return Machine(len(gigabytes), mps, rank, free.__getitem__)


@pytest.fixture(scope="module")
def eight_billion() -> dict[str, tuple[tuple[int, ...], int]]:
    """LLaDA-8B's weights as they are stored: bf16."""
    with torch.device("meta"):
        weights = LLaDAModelLM(LLaDAConfig.from_dict(LLADA.config)).state_dict()
    return {name: (tuple(shape), 2) for name, shape in published_shapes(weights, FAMILIES["llada"]).items()}


def small(gigabytes: float = 1) -> WeightBytes:
    return WeightBytes(int(gigabytes * GB), int(gigabytes * GB / 4))


@pytest.mark.parametrize(
    ("wanted", "seen", "kind"),
    [
        ("auto", machine(), ("cpu", None)),
        ("auto", machine(80), ("cuda", None)),
        ("auto", machine(mps=True), ("mps", None)),
        ("cpu", machine(80), ("cpu", None)),
        ("cuda:1", machine(80, 80), ("cuda", 1)),
        ("mps", machine(mps=True), ("mps", None)),
    ],
)
def test_the_best_device_unless_another_is_named(wanted, seen, kind, monkeypatch):
    monkeypatch.delenv("LLADAFLOW_DEVICE")
    assert kind_of(wanted, machine=seen) == kind


def test_the_environment_says_what_auto_means(monkeypatch):
    monkeypatch.setenv("LLADAFLOW_DEVICE", "cpu")
    assert kind_of("auto", machine=machine(80)) == ("cpu", None)
    assert kind_of("cuda", machine=machine(80)) == ("cuda", None)


@pytest.mark.parametrize(
    ("wanted", "bits", "seen", "said"),
    [
        ("gpu", None, machine(80), "device 'gpu' is none of auto, cuda, cuda:N, mps, cpu"),
        ("cuda", None, machine(), "no CUDA GPU is visible"),
        ("cuda:2", None, machine(80, 80), "sees 2 GPUs, cuda:0 to cuda:1"),
        ("mps", None, machine(), "no Apple GPU"),
        ("auto", 5, machine(80), "bits is 5; 4 and 8 are supported"),
        ("cpu", 4, machine(80), "bits=4 needs a CUDA GPU"),
        ("cuda", 8, machine(80), r"pip install 'lladaflow\[4bit\]'"),
    ],
)
def test_a_device_or_bits_that_cannot_be_is_one_line(wanted, bits, seen, said, monkeypatch):
    monkeypatch.setattr("llada_core.settings.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=said) as error:
        kind_of(wanted, bits, seen)
    assert "\n" not in str(error.value)


def test_the_first_gpu_with_room_and_a_ranks_own():
    assert place_for(small(10), "cuda", machine=machine(20, 20)).device == "cuda:0"
    assert place_for(small(10), "cuda", machine=machine(5, 20)).device == "cuda:1"
    assert place_for(small(10), "cuda:1", machine=machine(20, 20)).device == "cuda:1"
    assert place_for(small(10), "cuda", machine=machine(20, 20, rank=1)).device == "cuda:1"
    assert place_for(small(10), "cuda", machine=machine(20, 20, rank=9)).device == "cuda:1"  # of a second node


def test_a_gpu_is_asked_for_its_memory_only_when_it_matters():
    """The first question takes half a GB of it."""
    asked: list[str] = []
    seen = machine(20, 20, 20)
    watched = dataclasses.replace(seen, free=lambda device: (asked.append(device), seen.free(device))[1])
    place_for(small(10), "cuda", machine=watched)
    assert asked == ["cuda:0"]


def test_an_8b_model_lies_on_one_24_gb_card_or_two_smaller_ones(eight_billion):
    need = WeightBytes.of(eight_billion)
    assert need.weights == pytest.approx(16.03e9, rel=1e-3)
    assert place_for(need, "cuda", machine=machine(23.5)).spread is None
    two = place_for(need, "cuda", machine=machine(12, 12))
    assert (two.device, sorted(two.spread)) == ("cuda:0", [0, 1])
    with pytest.raises(ValueError, match=r"needs about 19\.4 GB of GPU memory; 12\.0 GB are free on cuda:0; bits=4"):
        place_for(need, "cuda", machine=machine(12))
    with pytest.raises(ValueError, match=r"launch\.processes: 1"):
        place_for(need, "cuda", machine=machine(12, 12, rank=0))


def test_whole_blocks_find_room_on_gpus_that_are_only_just_enough(eight_billion):
    from transformers.integrations.accelerate import _get_device_map

    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig.from_dict(LLADA.config)).to(torch.bfloat16)
    need = WeightBytes.of(eight_billion)
    for count in (2, 3, 4):
        each = ROOM * need.weights / GB / count + 0.01
        spread = place_for(need, "cuda", machine=machine(*[each] * count)).spread
        where = _get_device_map(model, "balanced", dict(spread), None)
        assert set(where.values()) == set(range(count)), where


def test_four_bits_fit_an_8b_model_on_an_8_gb_card(eight_billion, monkeypatch):
    monkeypatch.setattr("llada_core.settings.find_spec", lambda _: True)
    four, eight = (WeightBytes.of(eight_billion, bits=bits) for bits in (4, 8))
    # embedding and head, 2 x 126,464 x 4,096 numbers, stay bf16; the rest takes 0.5625 bytes or one
    assert four.weights == pytest.approx(2 * 2 * 126464 * 4096 + 0.5625 * 6.98e9, rel=2e-3)
    assert eight.weights == pytest.approx(2 * 2 * 126464 * 4096 + 6.98e9, rel=2e-3)
    assert place_for(four, "cuda", 4, machine(7.6)).device == "cuda:0"


def test_experts_lie_in_one_table_that_is_not_quantised():
    stored = {"model.layers.0.mlp.experts.3.up_proj.weight": ((8, 8), 2), "model.layers.0.q.weight": ((8, 8), 2)}
    assert WeightBytes.of(stored, bits=8).weights == 64 * 2 + 64


def test_main_memory_that_is_too_small_is_told_before_weights_are_read(eight_billion):
    need = WeightBytes.of(eight_billion)
    place_for(need, "cpu", machine=machine(memory=24)).require_room()
    with pytest.raises(ValueError, match=r"needs about 19\.4 GB of memory; 12\.0 GB are free"):
        place_for(need, "cpu", machine=machine(memory=12)).require_room()


def test_as_many_processes_as_gpus_where_a_model_fits_on_one():
    assert processes_for([small(10)], "cuda", machine=machine(20, 20, 20)) == 3
    assert processes_for([small(10), small(30)], "cuda", machine=machine(20, 20, 20)) == 1
    assert processes_for([small(10)], "cuda:1", machine=machine(20, 20, 20)) == 1
    assert processes_for([small(10)], "cuda", machine=machine(20, 20, 20, rank=0)) == 1
    assert processes_for([small(10)], "cpu", machine=machine(20, 20, 20)) == 1


def test_shapes_alone(tmp_path):
    save_model(tiny_model(), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    model = load_model(tmp_path / "m", device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert (model.vocab_rows, model.max_length, model.special_tokens) == (136, 128, SPECIAL)


def test_bits_are_checked_before_anything_is_read():
    assert checked_bits("cpu", None) is None
    with pytest.raises(ValueError, match="bits=4 needs a CUDA GPU"):
        checked_bits("cpu", 4)


# -- one model on two devices, and an input that comes from another one -----------------------------------------------


def on_devices(model: LLaDAModelLM, place: dict[str, torch.device]) -> None:
    """Gives every parameter a fake on the device of the longest name in `place` that it is under."""
    for name, module in model.named_modules():
        for key, weight in module._parameters.items():
            if weight is not None:
                under = max((n for n in place if f"{name}.{key}".startswith(n)), key=len)
                module._parameters[key] = nn.Parameter(torch.empty(weight.shape, device=place[under]))


def spread(model: LLaDAModelLM, place: dict[str, torch.device]) -> None:
    """What accelerate's dispatch does, whose own checks want the devices to be there."""
    on_devices(model, place)
    for name, device in place.items():
        add_hook_to_module(model.get_submodule(name), AlignDevicesHook(device))
    add_hook_to_module(model, AlignDevicesHook(place["model.transformer.wte"], io_same_device=True))


def spread_map(layers: int, *, tied: bool) -> dict[str, torch.device]:
    parts = ["wte", *[f"blocks.{i}" for i in range(layers)], "ln_f", *["ff_out"] * (not tied)]
    devices = [FIRST] * 2 + [OTHER] * (len(parts) - 2)
    return {f"model.transformer.{part}": device for part, device in zip(parts, devices, strict=True)}


@pytest.fixture
def fakes():
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        yield lambda: stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("entrance", ["spread", "cpu"])
def test_a_forward_never_mixes_devices(tied, entrance, fakes):
    model = empty_model(tiny_params(n_layers=3, weight_tying=tied), 136, SPECIAL).eval()
    fakes()
    if entrance == "spread":
        spread(model, spread_map(3, tied=tied))
    else:
        on_devices(model, {"": OTHER})
        feed_from_cpu(model, OTHER)
    here = FIRST if entrance == "spread" else torch.device("cpu")
    assert model.device == here
    ids, asked = torch.zeros(2, 8, dtype=torch.long, device=here), torch.arange(5, device=here)
    seen = torch.ones(2, 8, dtype=torch.bool, device=here)
    found = [
        model(ids, seen).logits,
        model(ids, seen, positions=asked).logits,
        model(ids, seen, positions=asked, targets=asked).nll,
        model(ids, None, positions=asked, output_hidden_states=True).logits,
    ]
    cache = model.new_cache(2, 8)
    found.append(model(ids, seen, positions=asked, cache=cache).logits)
    slots = torch.arange(4, device=here)[None].expand(2, 4)
    found.append(model(ids[:, :4], seen, positions=asked, cache=cache, slots=slots).logits)
    found.append(
        model(ids[:1, :4], seen[:1, :6], cache=cache.rows(torch.tensor([1], device=here), 6), slots=slots[:1]).logits
    )
    assert {x.device for x in found} == {here}
    cache.replace(torch.tensor([0], device=here), model.new_cache(1, 8))
    layers = [FIRST, OTHER, OTHER] if entrance == "spread" else [OTHER] * 3
    assert [keys.device for keys in cache.keys] == layers


def test_what_enters_from_the_cpu_leaves_there_with_the_same_numbers():
    model, ids = tiny_model(), torch.arange(24).view(2, 12)
    before = model(ids, output_hidden_states=True)
    feed_from_cpu(model, torch.device("cpu"))
    after = model(ids, output_hidden_states=True)
    assert torch.equal(before.logits, after.logits)
    assert all(map(torch.equal, before.hidden_states, after.hidden_states))
    from llada_core import generate

    answers = generate(model, [[1, 2, 3]], SamplingParams(max_new_tokens=4, block_length=4, steps=4)).tokens
    assert answers.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llada", "llada_moe"])
@pytest.mark.parametrize("way", ["cuda", "spread", "entrance", 4, 8])
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_on_a_gpu_the_same_is_written_and_scored(kind, way, cache, tmp_path):
    """In one piece, over all GPUs (needs two), fed from the CPU; quantised weights only have to write and score."""
    from llada_core import generate
    from llada_core.likelihood import log_likelihoods

    gpus = torch.cuda.device_count()
    if gpus < (2 if way == "spread" else 1) or (way in (4, 8) and find_spec("bitsandbytes") is None):
        pytest.skip("needs a GPU, two for a spread model, bitsandbytes for few bits")
    save_model(tiny_model(kind, n_layers=4), tmp_path / "m")
    place, bits = "cuda", way if way in (4, 8) else None
    if way == "spread":
        need = loading.need_of(tmp_path / "m")
        place = Place("cuda:0", need, 0, dict.fromkeys(range(gpus), 2 * need.weights // gpus))
    there = load_model(tmp_path / "m", device=place, bits=bits)
    if way == "entrance":
        feed_from_cpu(there, torch.device("cuda"))
    here = load_model(tmp_path / "m", device="cpu")
    params = SamplingParams(max_new_tokens=16, block_length=8, steps=16, cache=cache)
    prompts, pairs = [[1, 2, 3], [4, 5, 6, 7, 8]], [([1, 2, 3], [4, 5, 6]), ([7], [8, 9])]
    told = [(generate(m, prompts, params).tokens.cpu(), log_likelihoods(m, pairs, samples=4)) for m in (here, there)]
    if bits is None:
        assert torch.equal(told[0][0], told[1][0])
        assert told[0][1] == pytest.approx(told[1][1], abs=1e-3)


def test_as_many_positions_are_written_at_once_as_have_room_for_keys_and_values():
    """Of LLaDA-8B in bf16: half a MB a position, so that 80 GB with 16 of weights hold 16 contexts of 4,096 and not 32."""
    mode = FakeTensorMode()
    with mode:
        one = [torch.empty(1, 1, 32, 128, dtype=torch.bfloat16, device="cuda:0") for _ in range(64)]
        halves = one[:32] + [torch.empty(1, 1, 32, 128, dtype=torch.bfloat16, device="cuda:1") for _ in range(32)]
    assert positions_that_fit(one, machine=machine(64)) == 32 * GB // (64 * 32 * 128 * 2) == 16 * 4096
    assert positions_that_fit(halves, machine=machine(64, 32)) == 16 * 4096  # the fuller of two decides
    assert positions_that_fit(one, machine=machine(0)) == 0
