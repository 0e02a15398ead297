"""Every number a training stage depends on: one block per stage, all built on `TrainingParams`.

Knows limits and what excludes what, and which settings are free to change while a run lasts; does not know torch, files,
or where a stage's data comes from.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llada_core.modeling.families import LoraParams
from llada_core.sampling.params import SamplingParams
from llada_core.settings import NOT_IN_FINGERPRINT, NoiseParams, SettingsBlock


class Phase(SettingsBlock):
    """One straight piece of a learning-rate curve."""

    steps: int = Field(ge=1)
    start: float = Field(ge=0)
    end: float = Field(ge=0)


class BlockPhase(SettingsBlock):
    """So many steps with blocks of so many tokens."""

    steps: int = Field(ge=1)
    length: int = Field(ge=1)


class BlockParams(SettingsBlock):
    """Attention by blocks (BD3-LM, arXiv:2503.09573; LLaDA2.0, arXiv:2512.15745): a noisy block sees clean ones before it.

    Rows are fed twice, noisy and clean, but where a block is as long as its row: that is plain masked diffusion.
    """

    length: int | None = Field(default=None, ge=1)  # of the trained model; None: as it is
    # What comes before, in order: lengths that grow from 1 and shrink again are warm-up, stable, decay (LLaDA2.0).
    phases: tuple[BlockPhase, ...] = ()

    def at(self, step: int, last: int) -> int:
        """The block length of a step, from 0; `last` once the phases are over."""
        for phase in self.phases:
            if step < phase.steps:
                return phase.length
            step -= phase.steps
        return last

    def shortest(self, last: int | None) -> int | None:
        """The shortest block of all steps, `last` being the last one: which costs most, since rows have a clean copy."""
        return None if last is None else min([last, *(phase.length for phase in self.phases)])


class DistributionParams(SettingsBlock):
    """How ranks share the work; what is asked for here is asserted at start."""

    kind: Literal["auto", "none", "ddp", "fsdp", "zero2", "zero3"] = "auto"  # auto: ddp when several processes run
    processes: int | None = Field(default=None, ge=1)  # None: whatever was launched
    timeout_minutes: float = Field(default=30.0, gt=0)  # a hung rank ends the job
    offload: bool = False


class RecoveryParams(SettingsBlock):
    """What happens on a NaN, infinite or exploding loss (the paper's own recovery: 4e-4 to 1e-4)."""

    tries: int = Field(default=3, ge=0)
    learning_rate_factor: float = Field(default=0.25, gt=0, le=1)
    spike: float = Field(default=10.0, gt=1)  # a logged loss this many times the running mean counts as exploding


PUBLISHED_LEARNING_RATE = 2e-5  # at which trained weights are trained on; LLaDA's guideline and dllm: 1e-5 to 2.5e-5


class TrainingParams(SettingsBlock):
    """What all training stages share. Rows are sequences; a step is one optimiser update."""

    # What says how long a run is: the same run of another length goes on from its checkpoints (`extend`).
    LENGTH: ClassVar[tuple[str, ...]] = ("max_steps", "epochs", "max_flops", "flops_of")
    # The part of the data that is trained on (a name of `llada_core.data.formats.FORMATS`), and the dotted path of a
    # function (params, model, tokenizer, folder of that part, *, seed) -> Objective. By path, for objectives need torch.
    ROWS: ClassVar[str]
    OBJECTIVE: ClassVar[str] = "llada_core.training.objectives.objective"
    FROM_SCRATCH: ClassVar[bool] = True  # the default of learning_rate is made for weights that this run makes

    # Nothing, a stage's name, a folder, a registry alias, a Hub name. The content of what it names determines the
    # result, and where that lies does not.
    init_from: Annotated[str | None, NOT_IN_FINGERPRINT] = None
    max_steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    max_flops: float | None = Field(default=None, gt=0)
    flops_of: str | None = None  # another stage: its receipt's FLOPs are the limit
    extend: bool = False  # go on with a run that was made for another length
    batch_size: int = Field(default=64, ge=1)  # rows per step, over all ranks
    # Rows per forward and rank; None: as many as fit the step.
    micro_batch_size: Annotated[int | None, NOT_IN_FINGERPRINT] = Field(default=None, ge=1)
    optimiser: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices inside the blocks, AdamW for the rest
    # What is not given follows the start (`Params`): weights that were trained elsewhere take PUBLISHED_LEARNING_RATE.
    learning_rate: float = Field(default=4e-4, gt=0)
    schedule: Literal["constant", "cosine", "linear", "wsd", "phases"] = "wsd"
    warmup: float = Field(default=0.02, ge=0)  # below 1: share of the run; else steps
    decay: float = Field(default=0.1, ge=0, le=1)  # wsd: the last share of the run
    final_ratio: float = Field(default=0.1, ge=0, le=1)  # last learning rate over the highest
    phases: tuple[Phase, ...] = ()
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = Field(default=1.0, gt=0)
    # bf16: products under autocast; residuals, losses and the weights that are updated stay fp32. auto: bf16 for weights
    # that were trained elsewhere and are trained on on a GPU, else fp32.
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    noise: NoiseParams = NoiseParams()
    normalise: Literal["token", "sequence", "batch", "masked"] = "token"  # masked: by the tokens that are hidden
    blocks: BlockParams | None = Field(default=None, exclude_if=lambda value: value is None)
    right_shift: bool = False  # logits at i-1 predict token i (models converted from autoregressive ones)
    router_balance: float = Field(default=0.01, ge=0)  # mixture of experts: load balance, router z-loss
    router_z: float = Field(default=0.001, ge=0)
    # By how much the bias of a router that has one moves after each update, towards even loads; 0: it stays as it is.
    router_bias_rate: float = Field(default=0.0, ge=0, exclude_if=lambda value: value == 0.0)
    # Of a masked-LM from transformers; None: its own choice. LLaDA's networks know sdpa alone, which takes
    # FlashAttention where it can.
    attn_implementation: Annotated[
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None, NOT_IN_FINGERPRINT
    ] = None
    compile: Annotated[bool, NOT_IN_FINGERPRINT] = False
    activation_checkpointing: Annotated[bool, NOT_IN_FINGERPRINT] = False
    log_every: Annotated[int, NOT_IN_FINGERPRINT] = Field(default=10, ge=1)
    validate_every: int = Field(default=0, ge=0)  # 0: only at the end
    validation_rows: int = Field(default=128, ge=1)
    samples: Annotated[int, NOT_IN_FINGERPRINT] = Field(default=2, ge=0)  # texts written at every validation
    save_every: Annotated[int, NOT_IN_FINGERPRINT] = Field(default=200, ge=1)
    keep: Annotated[int, NOT_IN_FINGERPRINT] = Field(default=2, ge=1)
    milestone_every: Annotated[int, NOT_IN_FINGERPRINT] = Field(
        default=0, ge=0
    )  # checkpoints at these steps are never removed
    recovery: Annotated[RecoveryParams, NOT_IN_FINGERPRINT] = RecoveryParams()
    lora: LoraParams | None = None
    distribution: Annotated[DistributionParams, NOT_IN_FINGERPRINT] = DistributionParams()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not (self.max_steps or self.epochs or self.max_flops or self.flops_of):
            raise ValueError("one of max_steps, epochs, max_flops, flops_of must say when training ends")
        if (self.schedule == "phases") != bool(self.phases):
            raise ValueError("schedule phases and a non-empty list of phases go together")
        if self.optimiser == "muon" and self.distribution.kind in ("fsdp", "zero2", "zero3"):
            raise ValueError(
                f"optimiser muon needs whole matrices on every rank, which {self.distribution.kind} splits; use adamw or ddp"
            )
        if self.optimiser == "muon" and self.lora is not None:
            raise ValueError(
                "optimiser muon makes steps of whole weight matrices, and an adapter (lora) trains their low-rank "
                "factors: use optimiser: adamw, or leave out lora"
            )
        if self.router_bias_rate and self.lora is not None:
            raise ValueError(
                f"router_bias_rate {self.router_bias_rate} moves biases of the frozen model, which an adapter does not store: "
                "leave out one of router_bias_rate and lora"
            )
        if self.distribution.kind == "zero3" and self.lora is not None:
            raise ValueError("adapters are not put together from the pieces of zero3; use zero2, ddp or fsdp with lora")
        if self.distribution.kind == "fsdp" and self.lora is not None and self.lora.merge:
            raise ValueError("adapters of a sharded model are not merged; set lora.merge to false and merge afterwards")
        by_groups = isinstance(self, GRPOParams)  # its rows come in groups of `generations`
        if self.micro_batch_size and not by_groups and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} must divide batch_size {self.batch_size}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        return self

    @model_validator(mode="after")
    def _blocks_are_learnt_from_text(self) -> Self:
        if self.blocks is not None and not isinstance(self, PretrainParams | SFTParams):
            raise ValueError("blocks are a setting of pretraining and fine-tuning; here they are those of init_from")
        return self

    def settled(self, *, gpu: bool, published: bool) -> Self:
        """With the precision that `auto` stands for on this machine and for weights that were `published` elsewhere."""
        if self.precision != "auto":
            return self
        return self.model_copy(update={"precision": "bf16" if gpu and published else "fp32"})

    def share(self, ranks: int) -> int:
        """Micro-batches of one rank in a step; raises ValueError when the rows do not divide."""
        micro = self.micro_batch_size or max(self.batch_size // ranks, 1)
        if self.batch_size % (micro * ranks):
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {ranks} ranks x micro batches of {micro}; "
                f"use a multiple of {micro * ranks}"
            )
        return self.batch_size // (micro * ranks)


class PretrainParams(TrainingParams):
    """Pretraining on packed rows."""

    ROWS = "pretrain"
    random_length_ratio: float = Field(default=0.01, ge=0, le=1)  # share of steps cut to a uniform random length
    document_mask: bool = False  # attention stays inside a document of a packed row


class SFTParams(TrainingParams):
    """Supervised fine-tuning: prompts are never noised; the loss is per answer length, as in LLaDA's guideline."""

    ROWS = "sft"
    normalise: Literal["token", "sequence", "batch", "masked"] = "sequence"
    # Each row also with what was hidden shown and what was shown hidden: every scored token is trained on once
    # (LLaDA2.0). A forward then has twice as many rows.
    complementary: bool = Field(default=False, exclude_if=lambda value: not value)
    # Weight of the mean entropy where a hidden token is predicted right, which trains a model to be sure of several at once
    # (dParallel, arXiv:2509.26488; LLaDA2.0-CAP). Published: 2.
    confidence: float = Field(default=0.0, ge=0, exclude_if=lambda value: value == 0)
    # EOS behind the answer that is a visible target, up to the longest row of the batch; n: that many. micro_batch: to
    # the longest row of a micro-batch, as dllm, so that the loss depends on ranks and on micro_batch_size. block: to the
    # end of the row's last block, as LLaDA2.0: a sampler writes whole blocks.
    eos_padding: Literal["longest", "micro_batch", "none", "block"] | int = "longest"
    group_by_length: bool = True  # batches of rows of similar length, which wastes less on padding

    @model_validator(mode="after")
    def _complementary_in_time(self) -> Self:
        if self.complementary and self.noise.schedule != "linear":
            raise ValueError(
                "complementary hides at time 1 - t what t left, which is linear: set noise.schedule: linear"
            )
        return self

    @model_validator(mode="after")
    def _padded_by_what_is_said(self) -> Self:
        if self.eos_padding == "micro_batch" and self.micro_batch_size is None:
            raise ValueError(
                "eos_padding micro_batch trains on what a micro-batch is padded with: set micro_batch_size"
            )
        return self


class GRPOParams(TrainingParams):
    """Group-relative policy optimisation for diffusion models (d1, arXiv:2504.12216). `batch_size` is set by the groups."""

    ROWS, OBJECTIVE, FROM_SCRATCH = "grpo", "llada_core.training.grpo.objective", False
    learning_rate: float = Field(default=3e-6, gt=0)
    schedule: Literal["constant", "cosine", "linear", "wsd", "phases"] = "constant"
    warmup: float = Field(default=1e-4, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = Field(default=0.2, gt=0)
    prompts: int = Field(default=8, ge=1)  # prompts per rollout
    generations: int = Field(default=6, ge=2)  # completions per prompt
    iterations: int = Field(default=1, ge=1)  # updates per rollout, each with masks of its own
    sampling: SamplingParams = SamplingParams(max_new_tokens=256, block_length=32, steps=128, temperature=0.9)
    # trajectory: each token on the canvas on which it was chosen (TraceRL, arXiv:2509.06949), for models that attend by
    # blocks: one forward for the n-th steps of all of them.
    likelihood: Literal["one_forward", "elbo", "trajectory"] = "one_forward"
    merge_steps: int = Field(
        default=1, ge=1, exclude_if=lambda value: value == 1
    )  # trajectory: neighbours taken as one
    mask_prompt: float = Field(default=0.15, ge=0, lt=1)  # one_forward: share of prompt tokens hidden
    mask_samples: int = Field(default=1, ge=1)  # elbo: masks per completion and update, at evenly spread ratios
    mask_ratios: tuple[float, float] = (0.1, 1.0)  # elbo: between which ratios; low ones add variance
    ratio: Literal["token", "sequence"] = "token"
    epsilon: float = Field(default=0.5, gt=0)
    beta: float = Field(default=0.04, ge=0)  # weight of the KL to the reference; 0: no reference is kept
    scale_rewards: bool = False  # divide advantages by the group's standard deviation
    negative_weight: float = Field(default=1.0, ge=0)  # factor on negative advantages
    rollout_batch: Annotated[int, NOT_IN_FINGERPRINT] = Field(
        default=256, ge=1
    )  # completions in one call of the sampler
    sync_every: int = Field(default=0, ge=0)  # mix the policy into the reference every so many steps
    sync_mix: float = Field(default=0.6, gt=0, le=1)
    reward: str = "default"  # a name in llada_core.training.rewards, ./my_reward.py:f or a dotted path to f(task, text, answer) -> float
    reward_weights: dict[str, float] = Field(default_factory=dict)  # of the published reward's parts; others count once
    max_prompt_length: int | None = Field(default=None, ge=1)  # tokens; longer prompts lose their beginning
    mask_truncated_completions: bool = False  # one without an end token is judged with its group, and moves nothing
    validation: SamplingParams | None = None  # None: as `sampling`, greedy
    # The result is the best-validated step at which no task is worse than at the start, the start included; else the last.
    keep_best: bool = True
    patience: int = Field(default=0, ge=0)  # validations without a new best before stopping; 0: never

    @model_validator(mode="after")
    def _weighs_what_has_parts(self) -> Self:
        if self.reward_weights and self.reward != "published":
            raise ValueError(
                f"reward_weights weigh the parts of reward: published, not {self.reward!r}; set that, or let a function "
                "of your own do the weighing"
            )
        return self

    @model_validator(mode="after")
    def _written_once(self) -> Self:
        asked = self.sampling
        if self.likelihood == "trajectory" and (asked.rule is not None or asked.sampler == "llada2.1"):
            what = f"rule {asked.rule}" if asked.rule is not None else "sampler llada2.1"
            raise ValueError(
                f"likelihood trajectory knows one step for each token, and sampling.{what} may replace what is written: "
                "set likelihood: elbo, or another sampler"
            )
        if self.merge_steps > 1 and self.likelihood != "trajectory":
            raise ValueError(f"merge_steps is of likelihood trajectory, not of {self.likelihood}")
        return self

    @model_validator(mode="after")
    def _waits_for_the_best(self) -> Self:
        if self.patience and not self.keep_best:
            raise ValueError("patience waits for a better step and would then drop the best: set keep_best: true")
        return self

    @model_validator(mode="after")
    def _ratios(self) -> Self:
        low, high = self.mask_ratios
        if not 0 < low <= high <= 1:
            raise ValueError(f"mask_ratios {list(self.mask_ratios)}: give a lower and an upper ratio in (0, 1]")
        return self

    @model_validator(mode="after")
    def _shardable(self) -> Self:
        if self.lora is not None and self.sync_every and self.beta > 0:
            raise ValueError(
                "sync_every mixes the policy into a copy; with LoRA the reference is the adapter switched off"
            )
        for name, settings in (("sampling", self.sampling), ("validation", self.validation)):
            apart = settings is not None and (settings.stop_at_eos or settings.parallel)
            if apart and self.distribution.kind in ("fsdp", "zero3"):
                raise ValueError(
                    f"sharded ranks must run equally many forwards: {name} with stop_at_eos, threshold, factor or "
                    f"entropy_bound does not go with distribution {self.distribution.kind}; use ddp or fixed steps"
                )
        _no_sharded_copy(self, self.beta)
        return self

    @property
    def mask_copies(self) -> int:
        """Masks per completion and update; on the trajectory at most so many."""
        if self.likelihood == "trajectory":
            asked = self.sampling
            longest = min(asked.block_length, asked.max_new_tokens)  # each step writes something
            return -(-min(longest, asked.most_steps) // self.merge_steps)
        return self.mask_samples if self.likelihood == "elbo" else 1

    def share(self, ranks: int) -> int:
        """Prompts of one rank in a rollout; raises ValueError when they do not divide."""
        if self.prompts % ranks:
            raise ValueError(f"grpo.prompts {self.prompts} does not divide over {ranks} ranks; use a multiple")
        return self.prompts // ranks


class PreferenceParams(TrainingParams):
    """Preference tuning (VRPO, LLaDA 1.5, arXiv:2505.19223): DPO on ELBO differences."""

    ROWS, OBJECTIVE, FROM_SCRATCH = "preference", "llada_core.training.preference.objective", False
    learning_rate: float = Field(default=5e-7, gt=0)
    beta: float = Field(default=0.1, gt=0)
    mask_samples: int = Field(default=8, ge=1)  # times t per answer, one mask each
    shared_masks: bool = True  # the same masks for policy and reference; false is the naive estimator

    @model_validator(mode="after")
    def _shardable(self) -> Self:
        _no_sharded_copy(self, self.beta)
        return self


def _no_sharded_copy(params: TrainingParams, beta: float) -> None:
    if beta > 0 and params.lora is not None and params.lora.bias != "none":
        raise ValueError(
            f"lora.bias {params.lora.bias} trains biases in place, so the reference (the adapter switched off) would train "
            "as well; use bias: none or beta: 0"
        )
    if beta > 0 and params.lora is None and params.distribution.kind in ("fsdp", "zero3"):
        raise ValueError("a reference copy is not sharded; use LoRA (the adapter is switched off) or beta 0")


# The training stages, in the order in which a list of them is told. A new one needs its line here, its objective, and its
# place in dvc.yaml.
TRAINING_STAGES: dict[str, type[TrainingParams]] = {
    "pretrain": PretrainParams,
    "sft": SFTParams,
    "sft_blocks": SFTParams,  # on a model that the same run fine-tuned: as one that attends by blocks
    "grpo": GRPOParams,
    "sft_control": SFTParams,
    "preference": PreferenceParams,
}
