"""Group-relative policy optimisation as an objective of the loop: rollouts, then updates on them, each with its own masks.

diffu-GRPO of d1 (arXiv:2504.12216), with a choice of likelihood estimators; for models that attend by blocks too.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llada_core.data.batches import BatchSampler
from llada_core.diffusion import Noise, fed_copies
from llada_core.modeling import MaskPredictor
from llada_core.tokenizer import Tokenizer
from llada_core.training.accelerator import Ranks
from llada_core.training.objectives import Loss, StepWork, filled, stored_rows
from llada_core.training.params import GRPOParams
from llada_core.training.reference import Reference
from llada_core.training.rewards import reward_named
from llada_core.training.rollouts import (
    Completions,
    Masks,
    Prompt,
    PromptTable,
    Reward,
    RolloutSample,
    group_advantages,
    judge,
    masks_for,
    policy_loss,
    prompts_of,
    rewarded,
    sample,
    sample_traced,
    token_log_probabilities,
    trace_masks,
    verified,
)
from llada_core.training.trajectory import local_steps
from llada_core.verifiers.answers import verifiable


@dataclass(frozen=True)
class PolicyData:
    """What a policy is trained and judged on."""

    train: PromptTable
    validation: PromptTable
    tokenizer: Tokenizer
    reward: Reward


@dataclass(frozen=True)
class Share:
    """Completions of one micro-batch, their masks and their log-probabilities at rollout time (None: they are the present
    ones), in some of the rollout's columns.
    """

    rows: Completions
    masks: Masks
    columns: slice
    old: Tensor | None = None


class GRPO:
    """One rollout every `iterations` steps; the steps in between go on with it."""

    def __init__(self, model: MaskPredictor, problems: PolicyData, params: GRPOParams, *, seed: int) -> None:
        self.predictor, self.problems, self.params, self.seed = model, problems, params, seed
        self.ranks = Ranks()
        # Rows of a model that attends by blocks begin at column 0, from which its blocks are counted.
        self.block_length = model.block_length
        self.on_trajectory = params.likelihood == "trajectory"  # of such a model alone
        self.reference = Reference(model, params)
        self.order = BatchSampler(len(problems.train), params.prompts, seed=seed)
        held_out = range(min(len(problems.validation), params.validation_rows))
        tasks = Counter(prompt.task for prompt in self._prompts(problems.validation, held_out))
        self.held: Mapping[str, int] = {
            f"validation_correct_{task}": rows for task, rows in sorted(tasks.items()) if verifiable(task)
        }
        judged_by = "validation_correct" if self.held or not tasks else "validation_reward"
        self.best_by, self.patience = judged_by if params.keep_best else None, params.patience
        self._rollout: Completions | None = None
        self._old: Tensor | None = None
        self._number = -1

    def steps_per_epoch(self) -> int:
        return self.order.batches_per_epoch * self.params.iterations

    def work(self, model: nn.Module, step: int, rank: int, ranks: int) -> StepWork:
        # Which rollout a step belongs to follows from the step alone, so a resumed run samples when an undisturbed one would.
        number, update = divmod(step, self.params.iterations)
        notes: dict[str, float] = {}
        inference = 0
        if number != self._number or self._rollout is None:
            notes, inference = self._collect(model, number)
        assert self._rollout is not None
        # A reference that moves takes the weights of the steps it is told, before anything of this step is scored by it.
        self.reference.sync(self.predictor, step)
        kept = self._kept()
        parts = self._micro_batches(rank, ranks)
        batches = [self._share(index, step, update) for index in parts]
        tokens = sum(self._fed(batch) for batch, index in zip(batches, parts, strict=True) if len(index))
        inference += tokens if self.params.beta > 0 else 0
        scored = self._rollout.scored
        # By token every scored position of every mask sample counts once; by sequence every completion with any of them.
        # On the trajectory a token is asked for in one of the samples alone.
        samples = 1 if self.on_trajectory else self.params.mask_copies
        whole = scored.sum().item() * samples if self.params.ratio == "token" else scored.any(1).sum().item()
        # Every rank tells its part of the whole, so that rows which were left out still count.
        return StepWork(batches, [whole / ranks if len(kept) else 0.0], tokens, inference, notes)

    def loss(self, model: nn.Module, batch: Share) -> Loss:
        mask_id = self.predictor.special_tokens.mask_id
        reference = None
        if self.params.beta > 0:  # before the policy's activations are there
            with torch.no_grad(), self.reference.active(model) as frozen:
                reference = token_log_probabilities(frozen, batch.rows, batch.masks, mask_id, self.block_length)
        now = token_log_probabilities(model, batch.rows, batch.masks, mask_id, self.block_length)
        # The first update after a rollout is made by the policy that sampled: its ratio is 1 and only the gradient matters.
        old = now.detach() if batch.old is None else batch.old.to(now.device, non_blocking=True)
        result = policy_loss(self.params, now, old, reference, batch.rows, batch.masks)
        counted = result.counted
        # Minus log p of the sampled tokens is an estimate of the entropy under the masks; a fall to zero tells of collapse.
        chosen = (batch.rows.scored & batch.masks.asked).sum().to(now.device, non_blocking=True)
        parts = {
            "loss": torch.stack([result.sum.detach(), counted]),
            "clipped": torch.stack([result.clipped, counted]),
            "entropy_estimate": torch.stack([-now.detach().sum(), chosen]),
        }
        if reference is not None:
            parts["kl"] = torch.stack([result.kl, counted])
        return Loss(result.sum, parts)

    def validate(self, model: nn.Module, rank: int, ranks: int) -> dict[str, Tensor]:
        """Verified correctness on held-out prompts, over all and per task; the mean reward of tasks that none verifies."""
        table, params = self.problems.validation, self.params
        settings = params.validation or replace(params.sampling, temperature=0.0)
        parts = {name: torch.zeros(2) for name in ("validation_correct", *self.held, "validation_reward")}
        total = min(len(table), params.validation_rows)
        # No more at once than a rollout has: what was sampled in training must not run out of memory here.
        size = min(params.rollout_batch, params.share(ranks) * params.generations)
        for start in range(0, -(-total // ranks), size):
            # Sharded ranks must run in step: each answers as many prompts, those past the end without being counted.
            numbers = [n * ranks + rank for n in range(start, min(start + size, -(-total // ranks)))]
            prompts = self._prompts(table, [n % total for n in numbers])
            texts = sample(self.predictor, self.problems.tokenizer, prompts, settings).texts
            counted = [(p, t) for n, p, t in zip(numbers, prompts, texts, strict=True) if n < total]
            for name, value in self._judged(counted):
                parts[name] += torch.tensor([value, 1.0])
        return parts

    def _judged(self, answers: list[tuple[Prompt, str]]) -> Iterator[tuple[str, float]]:
        """Which figure each answer adds to, and what: correctness, or where nothing verifies it, the reward."""
        right = verified([prompt for prompt, _ in answers], [text for _, text in answers]).tolist()
        for (prompt, text), value in zip(answers, right, strict=True):
            if not math.isnan(value):
                yield "validation_correct", value
                yield f"validation_correct_{prompt.task}", value
            elif not math.isnan(reward := rewarded(self.problems.reward, prompt, text)):
                yield "validation_reward", reward

    def state(self) -> dict[str, Tensor]:
        tensors = self.reference.state()
        if self._rollout is not None:
            tensors |= {f"rollout.{name}": tensor for name, tensor in self._rollout.tensors().items()}
            tensors["number"] = torch.tensor([self._number])
            if self._old is not None:
                tensors["old"] = self._old
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self._rollout, self._old, self._number = None, tensors.get("old"), -1
        self.reference.load_state(tensors)
        if "number" in tensors:
            # Older checkpoints know no steps (`when`), and are of likelihoods that need none.
            named = {field.name: f"rollout.{field.name}" for field in fields(Completions)}
            self._rollout = Completions(**{name: tensors[key] for name, key in named.items() if key in tensors})
            self._number = int(tensors["number"])

    def _collect(self, model: nn.Module, number: int) -> tuple[dict[str, float], int]:
        """Sample and judge this rollout's completions; every rank does its share and gets the whole."""
        params, ranks = self.params, self.ranks
        everyone = self._prompts(self.problems.train, list(self.order.rows(number)))
        width = max(len(prompt.ids) for prompt in everyone)
        own = params.share(ranks.count)
        # A rank asks its prompts, each with its whole group; rewards are joined before any group's mean is taken.
        mine = [p for p in everyone[ranks.index * own : (ranks.index + 1) * own] for _ in range(params.generations)]
        sampled = self._sample(mine, width, seed=hash((self.seed, number)) % 2**31)
        verdicts = judge(self.problems.reward, mine, sampled.texts)
        start, total = ranks.index * len(mine), len(everyone) * params.generations
        tokens, attention, scored, written, when, ended, rewards, right = (
            ranks.join(x, start, total) for x in (*sampled.tensors(), *vars(verdicts).values())
        )
        # A reward that failed says nothing about its completion: the group's mean is taken over the others.
        valid = ~rewards.isnan()
        shape = (-1, params.generations)
        advantages = group_advantages(rewards.view(shape), valid.view(shape), params).flatten().float()
        lengths = scored.sum(1).double()
        if params.mask_truncated_completions:  # judged with its group, as TRL does, but nothing is learnt from it
            scored, advantages = scored & ended[:, None], torch.where(ended, advantages, 0.0)
        self._rollout, self._number = Completions(tokens, attention, scored, written, advantages, when), number
        inference = sampled.fed + self._remember_old(model, number * params.iterations)
        groups = torch.where(valid, rewards, 0.0).view(shape)
        notes = {
            "reward": float(rewards[valid].mean()) if valid.any() else 0.0,
            "groups_differ": float((groups.amax(1) > groups.amin(1)).double().mean()),
            "rewards_dropped": float((~valid).sum()),
            "completion_tokens": float(lengths.mean()),
            # Per answer, to its end: what a batch of rollouts wrote is divided by its forwards, which all its rows share.
            "tokens_per_forward": float(lengths.mean()) / sampled.forwards * -(-len(mine) // params.rollout_batch),
        }
        if not right.isnan().all():
            notes["rollout_correct"] = float(right.nanmean())
        if params.mask_truncated_completions:
            notes["truncated"] = float((~ended).double().mean())
        return notes, inference

    def _prompts(self, table: PromptTable, rows: Sequence[int]) -> list[Prompt]:
        return prompts_of(table, rows, self.params.max_prompt_length)

    def _sample(self, prompts: list[Prompt], width: int, *, seed: int) -> RolloutSample:
        settings, size = replace(self.params.sampling, seed=seed), self.params.rollout_batch
        size = max(size // self.params.generations, 1) * self.params.generations  # no fewer than a group
        asked = self.predictor, self.problems.tokenizer, prompts, settings
        if self.block_length is not None:
            return sample_traced(*asked, width=width, at_once=size, as_chosen=self.on_trajectory)
        return sample(*asked, width=width, at_once=size)

    def _remember_old(self, model: nn.Module, first: int) -> int:
        """Log-probabilities of the rollout's policy under the masks of the later updates; the first needs none.

        Each rank scores the rows that it will train on, in the micro-batches of the updates; then all are told all,
        which lets a run go on with another number of ranks. Returns the positions that this rank fed.
        """
        self._old = None
        kept, ranks, samples = self._kept(), self.ranks, self._samples()
        # On the trajectory all updates have the same masks.
        updates = min(self.params.iterations - 1, 1) if self.on_trajectory else self.params.iterations - 1
        if updates == 0 or not len(kept):
            return 0
        assert self._rollout is not None
        shares = [self._own(rank, ranks.count) for rank in range(ranks.count)]
        mine, width = len(shares[ranks.index]), self._rollout.tokens.shape[1]
        own, fed = torch.zeros(mine, updates, samples, width), 0
        for update in range(updates):
            done = 0
            for index in self._micro_batches(ranks.index, ranks.count):
                share = self._share(index, first + update + 1, 0)
                with torch.no_grad():
                    mask_id = self.predictor.special_tokens.mask_id
                    values = token_log_probabilities(model, share.rows, share.masks, mask_id, self.block_length)
                fed += self._fed(share)
                # An empty micro-batch was one row that counts nothing.
                values = _by_row(values.cpu(), samples)[: len(index)]
                own[done : done + len(index), update, :, share.columns] = values
                done += len(index)
        start = sum(len(share) for share in shares[: ranks.index])
        joined = ranks.join(own, start, len(kept)).transpose(0, 1)
        self._old = torch.zeros(updates, len(self._rollout.tokens), samples, width)
        self._old[:, torch.cat(shares)] = joined
        return fed

    def _kept(self) -> Tensor:
        """Rows that can change anything: all, or without a KL term those whose advantage is not zero."""
        assert self._rollout is not None
        everything = torch.arange(len(self._rollout.tokens))
        return everything if self.params.beta > 0 else everything[self._rollout.advantages != 0]

    def _own(self, rank: int, ranks: int) -> Tensor:
        """A rank's kept rows, the longest last: rows of one micro-batch share its width, so little of it is padding."""
        assert self._rollout is not None
        # Every ranks-th row, not a run of them: rows lie in groups of one prompt, and lengths go by prompt.
        own = self._kept()[rank::ranks]
        return own[self._rollout.attention[own].sum(1).argsort(stable=True)]

    def _micro_batches(self, rank: int, ranks: int) -> list[Tensor]:
        """A rank's rows, in parts of at most `micro_batch_size`: equally many on every rank, so some may be empty."""
        kept = self._kept()
        most = -(-len(kept) // ranks)  # rows of the rank that has most
        parts = -(-most // (self.params.micro_batch_size or max(1, most)))
        return list(torch.tensor_split(self._own(rank, ranks), parts)) if parts else []

    def _share(self, index: Tensor, step: int, update: int) -> Share:
        if not len(index):
            return self._nothing(step)
        share = self._masked(index, step)
        if update == 0 or self._old is None:
            return share
        old = self._old[min(update, len(self._old)) - 1, index][..., share.columns]  # (R, samples, T)
        return replace(share, old=old.transpose(0, 1).flatten(0, 1))

    def _nothing(self, step: int) -> Share:
        """In place of an empty micro-batch: one row that counts nothing.

        Ranks that share their gradients run equally many forwards, and a GPU's attention takes no empty batch.
        """
        share = self._masked(torch.tensor([0]), step)
        rows = share.rows
        nothing = {name: torch.zeros_like(getattr(rows, name)) for name in ("scored", "advantages")}
        return replace(share, rows=replace(rows, **nothing))

    def _masked(self, index: Tensor, step: int) -> Share:
        """Rows repeated once per mask sample, and the masks of one update; numbers depend on row and step alone.

        Without the columns that are padding in all of these rows, and blocks behind all that is scored.
        """
        assert self._rollout is not None
        samples = self._samples()
        rows = self._rollout.rows(index.repeat(samples))
        sample_number = torch.arange(samples).repeat_interleave(len(index))
        columns = self._columns(rows)
        if self.on_trajectory and self.block_length is not None:
            masks = trace_masks(self.params, rows, self.block_length, sample_number, samples)
            return _cut(rows, masks, columns)
        keys = index.repeat(samples) * samples + sample_number
        # Rank and micro-batch are not part of the key: any division of the rows draws the same masks.
        noise = Noise(self.seed, step, keys, 1)
        offset = Noise(self.seed, step, index.repeat(samples), 1).uniforms(1, stream=3)[:, 0]
        low, high = self.params.mask_ratios
        # As for preferences: one offset a completion, its samples spread evenly, each of them uniform by itself.
        ratio = low + (high - low) * ((offset + sample_number / samples) % 1.0)
        masks = masks_for(self.params, rows, noise.uniforms(rows.tokens.shape[1], stream=2), ratio)
        return _cut(rows, masks, columns)

    def _columns(self, rows: Completions) -> slice:
        """What some of these rows have: prompts are padded to the longest of the rollout.

        By blocks nothing that is scored sees the blocks behind it, which are left out.
        """
        seen = rows.attention.any(0).nonzero()[:, 0]
        first, last = int(seen[0]), int(seen[-1]) + 1
        if self.block_length is not None:
            scored = rows.scored.any(0).nonzero()[:, 0]
            needed = int(scored[-1]) + 1 if len(scored) else 1
            last = min(last, -(-needed // self.block_length) * self.block_length)
        return slice(first, last)

    def _samples(self) -> int:
        """Masks per completion and update; on the trajectory the most steps that any block of this rollout took."""
        if not self.on_trajectory or self.block_length is None:
            return self.params.mask_copies
        assert self._rollout is not None
        assert self._rollout.when is not None
        steps = local_steps(self._rollout.when, self.block_length)[self._rollout.scored]
        return int(steps.max()) // self.params.merge_steps + 1 if len(steps) else 1

    def _fed(self, share: Share) -> int:
        """Positions that go through a forward."""
        return share.rows.tokens.numel() * fed_copies(self.block_length, share.rows.tokens.shape[1])


def _cut(rows: Completions, masks: Masks, columns: slice) -> Share:
    hidden = {name: getattr(masks, name)[:, columns] for name in ("masked", "asked")}
    return Share(rows.columns(columns), replace(masks, **hidden), columns)


def _by_row(values: Tensor, samples: int) -> Tensor:
    """(samples * R, T) to (R, samples, T)."""
    return values.view(samples, -1, values.shape[1]).transpose(0, 1)


def _require_its_blocks(params: GRPOParams, model: MaskPredictor) -> None:
    """A model that attends by blocks is sampled in its own, and by ranks that need not run equally many forwards."""
    if model.block_length is None:
        if params.likelihood == "trajectory":
            raise ValueError(
                f"likelihood trajectory is for models that attend by blocks; {model.kind} sees every position and would take "
                "a forward for each step of the answer: set likelihood: elbo or one_forward"
            )
        return
    if params.sampling.block_length != model.block_length:
        raise ValueError(
            f"sampling.block_length {params.sampling.block_length}: this model attends by blocks of {model.block_length}, "
            "in which its log-probabilities are taken; set that"
        )
    if params.distribution.kind in ("fsdp", "zero3"):
        raise ValueError(
            f"sharded ranks must run equally many forwards, and prompts that end inside of a block take a block more: use ddp "
            f"or zero2, not distribution {params.distribution.kind}"
        )


def objective(params: GRPOParams, model: MaskPredictor, tokenizer: Tokenizer, data: Path, *, seed: int) -> GRPO:
    """That of a stage on the prompts in `data`/train and validation; raises ValueError without any."""
    _require_its_blocks(params, model)
    train, validation = filled(stored_rows(data / "train")), stored_rows(data / "validation")
    reward = reward_named(params.reward, params.reward_weights)
    return GRPO(model, PolicyData(train, validation, tokenizer, reward), params, seed=seed)
