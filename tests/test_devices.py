"""What a GPU would wait for: the host synchronisations of a training step and of a sampling step, counted and pinned.

And that no tensor is left on the wrong device: the pretended GPU raises on mixed ones as CUDA does.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from llada_core.modeling.block import Experts
from llada_core.modeling.predictor import device_of
from llada_core.sampling import generate, stream
from llada_core.sampling.engine import Engine
from llada_core.sampling.params import SamplingParams
from llada_core.sampling.requests import to_answer
from llada_core.settings import ConfigError
from llada_core.training.accelerator import Ranks
from llada_core.training.grpo import GRPO, Share
from llada_core.training.loop import Loop, TrainingState
from llada_core.training.params import GRPOParams, SFTParams
from llada_core.training.progress import Meter, MetricsFile
from llada_core.training.rollouts import Completions, Masks
from llada_core.training.train import RunPaths, objective_for, train
from tasks.work import training
from tests.pretend_gpu import GPU, OnGPU, PretendGPU, moved
from tests.tiny import tiny_model, tiny_pair
from tests.training.data import write_data
from tests.training.test_preference import batch as pairs
from tests.training.test_preference import objective as preference


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def a_loop(data, folder, kind):
    model, tokenizer = tiny_pair(kind)
    params = SFTParams(max_steps=9, batch_size=8, micro_batch_size=4, samples=0, activation_checkpointing=True)
    moved(model)
    objective = objective_for(params, model, tokenizer, data, seed=1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)  # the product's is the fused one: it never waits
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parts = TrainingState(Accelerator(cpu=True), model.train(), optimiser, objective, parameters=1)
    return Loop(parts, params, folder, seed=1, metrics=MetricsFile(folder / "metrics.jsonl", Ranks()))


@pytest.mark.parametrize("kind", ["llada", "llada_moe"])
def test_a_training_step_never_waits_and_a_log_line_waits_once(data, tmp_path, kind):
    with PretendGPU() as gpu:
        loop = a_loop(data, tmp_path, kind)
        loop._step()
        gpu.waits.clear()
        loop._step()
        assert gpu.waits == {}
        assert loop._log()
        assert gpu.waits == {"copied out": 1}
        assert loop.parts.model.get_parameter("model.transformer.ln_f.weight").device == GPU


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_an_update_of_a_policy_never_waits(ratio):
    params = GRPOParams(max_steps=1, likelihood="elbo", ratio=ratio, mask_samples=2, beta=0.0)
    model = tiny_model()
    tokens = torch.arange(48).view(4, 12) + 10
    scored = (torch.arange(12) > 5).expand(4, 12).clone()
    rows = Completions(tokens, torch.ones_like(tokens), scored, scored, torch.tensor([1.0, -1.0, 0.5, -0.5]))
    hidden = scored & (tokens % 2 == 0)
    share = Share(rows, Masks(hidden, hidden, torch.full((4,), 2.0), 2), torch.full((4, 12), -3.0))
    grpo = SimpleNamespace(predictor=model, params=params, reference=None, block_length=None)
    with PretendGPU() as gpu:
        GRPO.loss(grpo, moved(model), share).sum.backward()
    assert gpu.waits == {}


def test_a_preference_never_waits():
    model = tiny_model()
    loss = preference(model)
    loss.reference.active = lambda model: nullcontext(model)
    with PretendGPU() as gpu:
        loss.loss(moved(model), pairs(0)).sum.backward()
    assert gpu.waits == {}


# Each mode waits once a step, also where rows enter blocks at different steps: for what the host has to know of them.
REMASK = {"rule": "tests.sampling.test_own_rules.remask"}
EACH = [{}, {"cache": "prefix"}, {"cache": "dual"}, {"threshold": 0.9}, REMASK, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 9, "top_p": 0.9}, {"cfg_scale": 0.5},
        {"schedule": "cosine", "stochastic_transfer": True}, {"stop_at_eos": True}, {"cache": "dual", "factor": 0.02}]  # fmt: skip


@pytest.mark.parametrize("settings", EACH, ids=str)
@pytest.mark.parametrize("kind", ["llada", "llada_moe"])
def test_a_sampling_step_waits_once(kind, settings):
    extra, prompts = [], [[7, 8, 9], [3, 4, 5]]
    for new in (8, 24):
        params = SamplingParams(max_new_tokens=new, block_length=4, seed=0, **({"steps": new} | settings))
        model = moved(tiny_model(kind))
        with PretendGPU() as gpu:
            steps = [step.tokens for step in stream(model, prompts, params)]
        extra.append(gpu.waits.total() - len(steps))
        assert torch.equal(torch.as_tensor(steps[-1]).cpu(), generate(tiny_model(kind), prompts, params).tokens)
    assert extra[0] == extra[1], "what is waited for beside one transfer a step does not grow with the answer"


@pytest.mark.parametrize(
    "settings", [{"sampler": "llada2.0", "threshold": 0.9}, {"sampler": "llada2.1", "threshold": 0.9}], ids=str
)
def test_a_step_of_a_model_that_attends_by_blocks_waits_once(settings):
    """Also where it edits, and where another block begins."""
    extra = []
    for new in (8, 24):
        params = SamplingParams(max_new_tokens=new, block_length=4, steps=4, cache="prefix", **settings)
        model = moved(tiny_model("llada2"))
        with PretendGPU() as gpu:
            steps = sum(1 for _ in stream(model, [[7, 8, 9], [3, 4, 5]], params))
        extra.append(gpu.waits.total() - steps)
    assert extra[0] == extra[1]


def test_rows_that_join_and_rows_that_are_watched_cost_no_transfer_more():
    params = SamplingParams(max_new_tokens=8, block_length=4, steps=8)
    model = moved(tiny_model())
    with PretendGPU() as gpu:
        engine = Engine(model)
        first = engine.submit(to_answer(model, [[7, 8, 9]], params)[0])
        engine.step()
        engine.step()
        waited = gpu.waits.total()
        second = engine.submit(to_answer(model, [[3, 4]], params)[0], watched=True)
        asking = gpu.waits.total() - waited
        engine.step()
        assert (asking, gpu.waits.total() - waited) == (0, 1)
        engine.finish([*first, *second])


@pytest.fixture
def offloaded(monkeypatch):
    """A shard as FSDP with offload keeps it: on the CPU, of a mesh of GPUs."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    shard = DTensor.from_local(torch.zeros(2, 3), DeviceMesh("cpu", torch.arange(2), _init_backend=False), [Shard(0)])
    monkeypatch.setattr(DeviceMesh, "device_type", property(lambda _mesh: "cuda"))
    yield shard
    dist.destroy_process_group()


def test_input_belongs_where_an_offloaded_model_computes(offloaded):
    assert offloaded.device.type == "cpu"
    model = tiny_model()
    assert (device_of(model), model.device) == (torch.device("cpu"), torch.device("cpu"))
    model.model.transformer.wte.weight = torch.nn.Parameter(offloaded)
    assert (device_of(model), model.device) == (torch.device("cuda"), torch.device("cuda"))


def test_a_log_line_brings_sums_of_the_gpu_and_of_the_cpu_in_one_transfer():
    with PretendGPU() as gpu:
        meter = Meter()
        meter.add({"grad_norm": torch.tensor([3.0, 1.0]), "loss": OnGPU(torch.tensor([4.0, 2.0]))})
        assert meter.take(Ranks()) == {"grad_norm": 3.0, "loss": 2.0}
        assert gpu.waits == {"copied out": 1}


@pytest.mark.parametrize(
    ("settings", "device"),
    [
        ({}, "cuda:3"),
        ({"distribution": {"kind": "ddp"}}, "cuda:3"),
        ({"distribution": {"kind": "fsdp"}}, "cpu"),  # cut up block by block from there
        ({"distribution": {"kind": "fsdp"}, "lora": {"four_bit": True, "merge": False}}, "cuda:3"),
    ],
)
def test_weights_are_loaded_to_the_ranks_own_device(monkeypatch, settings, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "3")
    seen = {}
    monkeypatch.setattr("llada_core.modeling.load_model", lambda _folder, **how: seen.update(how))
    params = SFTParams.model_validate({"max_steps": 1, "init_from": "somewhere", **settings}, strict=False)
    training._model(SimpleNamespace(stage="sft"), params, None)
    assert (seen["device"], seen["bits"]) == (torch.device(device), 4 if "lora" in settings else None)


@pytest.mark.parametrize("name", ["sampling", "validation"])
@pytest.mark.parametrize("apart", [{"stop_at_eos": True}, {"threshold": 0.9}])
@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_settings_that_let_sharded_ranks_run_apart_are_refused_by_name(name, apart, kind):
    values = {
        "max_steps": 1,
        "beta": 0.0,
        "distribution": {"kind": kind},
        name: {"max_new_tokens": 8, "block_length": 8, "steps": 8, **apart},
    }
    with pytest.raises(ConfigError, match=f"{name} with stop_at_eos.*{kind}"):
        GRPOParams.parse(values, "grpo")


def test_a_pretended_gpu_computes_what_the_cpu_does_and_refuses_mixed_devices():
    model, ids = tiny_model(), torch.arange(10)[None]
    expected = model(ids).logits
    with PretendGPU() as gpu:
        moved(model)
        logits = model(OnGPU(ids)).logits
        assert gpu.waits == {}
        torch.testing.assert_close(logits.cpu(), expected)
        with pytest.raises(RuntimeError, match="together"):
            model(ids)
        with pytest.raises(RuntimeError, match="together"):
            logits + torch.zeros(136)
        assert gpu.waits.total() == 1


def test_experts_of_a_gpu_count_their_tokens_without_being_asked_for_them():
    model = tiny_model("llada_moe")
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    x = torch.randn(7, 32)
    chosen, weight = torch.tensor([[0, 1], [3, 1], [3, 0], [0, 3], [1, 0], [0, 1], [1, 3]]), torch.rand(7, 2)
    torch.testing.assert_close(experts(x, chosen, weight), experts.loop(x, chosen, weight))  # expert 2 gets no token


@pytest.mark.parametrize("kind", ["llada", "llada_moe"])
def test_a_block_compiles_whole_and_for_few_kinds_of_call(kind):
    graphs = []

    def counted(graph, _inputs):
        graphs.append(graph)
        return graph

    model = tiny_model(kind, n_layers=3).train()
    torch.compiler.reset()
    for layer in model.model.transformer.blocks:
        layer.compile(backend=counted, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for length in (16, 24, 32, 20):
            ids, wanted = torch.arange(2 * length).view(2, length), torch.arange(0, 2 * length, 3)
            mask = (ids % 7 > 0).long()
            nll = model(ids, mask, positions=wanted, targets=wanted, router_losses=kind == "llada_moe").nll
            nll.sum().backward()
    assert len(graphs) <= 4  # with all positions or those asked for, each of one length and of any
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llada", "llada_moe"])
def test_on_a_gpu_one_plain_process_trains_and_no_update_waits(data, tmp_path, monkeypatch, kind, precision):
    """CUDA itself raises at a wait, in every update after the first two, which set up libraries and moments."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    update = Loop._update

    def watched(loop, *work):
        torch.cuda.set_sync_debug_mode("error" if loop.progress.step > 1 else "default")
        try:
            update(loop, *work)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Loop, "_update", watched)
    model, tokenizer = tiny_pair(kind)
    params = SFTParams(max_steps=6, batch_size=8, micro_batch_size=4, samples=0, log_every=1, precision=precision)
    receipt = train(params, model, tokenizer, RunPaths(data, tmp_path, tmp_path / "model"), seed=1)
    assert receipt.finished
    assert model.device.type == "cuda"
