"""The one training loop: steps, division by the global count, logging, checkpoints, resume, roll-back, stop requests.

Built on accelerate; knows an `Objective` only by its sums and counts. It knows no tokens, no noise and no rewards.
"""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from llada_core.training.accelerator import Ranks, learning_rate
from llada_core.training.balance import RouterBalance
from llada_core.training.checkpoint import Checkpoints, Snapshot
from llada_core.training.objectives import Objective, StepWork, sum_and_count
from llada_core.training.params import TrainingParams
from llada_core.training.progress import Meter, MetricsFile, Progress, Recovery, peak_flops, training_flops

_log = logging.getLogger(__name__)
WriteSamples = Callable[[nn.Module], list[dict[str, Any]]]


class DivergedError(RuntimeError):
    """The loss became NaN, infinite or exploded more often than the run may recover from."""


@dataclass(frozen=True)
class TrainingState:
    """What a loop is made of."""

    engine: Accelerator
    model: nn.Module  # prepared
    optimiser: torch.optim.Optimizer  # prepared
    objective: Objective
    parameters: int  # active, for the FLOP count
    fingerprint: dict[str, str] = field(default_factory=dict)
    balance: RouterBalance | None = None


class Loop:
    """One run in one folder: construct, then `run()`; a second process on the same folder goes on where the first ended."""

    def __init__(
        self,
        parts: TrainingState,
        params: TrainingParams,
        folder: Path,
        *,
        seed: int,
        metrics: MetricsFile,
        sampler: WriteSamples | None = None,
    ) -> None:
        self.parts, self.params, self.folder, self.seed = parts, params, folder, seed
        self.ranks, self.metrics, self.sampler = Ranks(), metrics, sampler
        self.progress, self.meter = Progress(), Meter()
        self.recovery = Recovery(folder / "recovery.json", params.recovery, self.ranks)
        checkpoints = Checkpoints(
            folder / "checkpoints", self.ranks, keep=params.keep, milestone_every=params.milestone_every
        )
        self.snapshot = Snapshot(
            checkpoints, parts.model, parts.optimiser, parts.objective, parts.fingerprint,
            extend=params.extend, buffers=None if parts.balance is None else parts.balance.state,
        )  # fmt: skip
        self.stopped = self._stop_asked = False
        self._notes: dict[str, float] = {}
        self._logged = (0, 0.0, 0.0, 0.0)  # step, tokens, flops, clock at the last log line

    def run(self) -> Progress:
        """Train to the end, or until asked to stop; raises `DivergedError` when recovery has run out of tries.

        A run that ends leaves the model with the weights of its best validation, where its objective names one; the
        weights it began with take part if there were validations in between, and of equals the earliest win.
        """
        if self.ranks.first:
            (self.folder / "STOP").unlink(missing_ok=True)
        self._resume()
        self.parts.model.train()
        with self._signals():
            while not self._finished():
                if self._step():
                    self.stopped = True
                    self._save()
                    self.metrics.write(self.progress.step, {"event": "stopped"})
                    return self.progress
                self._housekeeping()
        self._take_the_best()
        return self.progress

    def _take_the_best(self) -> None:
        """Weights that were never trained are no result that anybody should get without being told."""
        best, step, name = self.progress.best_step, self.progress.step, self.parts.objective.best_by
        if best is None or best == step:
            return
        if best == 0 and self.progress.since_best <= 1:
            told = f"the last weights are kept although {name} was higher before training: there was no validation in "
            self.metrics.write(step, {"event": told + "between to choose from; set validate_every"})
            return
        if best == 0:
            told = f"no step was better by {name} than the weights that training began with: these are the result"
            self.metrics.write(step, {"event": f"{told}; keep_best: false keeps the last ones"})
        self.snapshot.restore_weights(best)

    def _resume(self) -> None:
        state = self.snapshot.restore()
        if state is None:
            self.metrics.write(0, {"event": "started", "back_to": 0})
            if self.parts.objective.best_by is not None:
                self._validate()
            self._save()
            self._logged = (0, 0.0, 0.0, time.monotonic())
        else:
            self._go_on_from(state, {"event": "resumed"})

    def _go_on_from(self, state: dict[str, Any], event: dict[str, Any]) -> None:
        """Take over a checkpoint's counters, and make up for the validation that it was still waiting for."""
        self.progress, self._notes = Progress(**state["progress"]), state["notes"]
        self.meter.load_state(state["meter"], self.ranks)
        step, due = self.progress.step, bool(state.get("validation_due"))
        self.metrics.write(step, event | {"back_to": step} | ({"validates_again": True} if due else {}))
        if due:
            self._validate()
            self._note()
        self._logged = (step, self.progress.tokens, self.progress.flops, time.monotonic())

    def _finished(self) -> bool:
        return self.progress.done or self._share() >= 1.0

    def _share(self) -> float:
        return self.progress.share(self.params, self.parts.objective.steps_per_epoch())

    def _step(self) -> bool:
        """One update; True (and nothing done) when a stop was asked for."""
        started, step = time.monotonic(), self.progress.step
        # Whatever draws from the global generator (dropout, a person's objective) draws by step and rank: resumed is uninterrupted.
        # A hash of integers is the same in every process (of texts it is not); torch takes seeds below 2^64.
        torch.manual_seed(hash((self.seed, step, self.ranks.index)) % 2**63)
        # One rank alone looks for the file, and all agree on what it saw: ranks that stop at different steps wait for each other for ever.
        stop = self._stop_asked or (self.ranks.first and (self.folder / "STOP").exists())
        if self.ranks.any(stop):
            return True
        work = self.parts.objective.work(
            self.parts.model, self.recovery.data_step(step), self.ranks.index, self.ranks.count
        )
        # Before the update: the loss is divided by what all ranks saw, not by the mean of their own divisions.
        count, tokens, inference = self.ranks.sum([sum(work.counts), work.tokens, work.inference_tokens])
        rate = learning_rate(self.params, step, self._share()) * self.recovery.factor(step)
        # A step of which nothing counts (every completion right) is one that was made, so that step numbers tell the data.
        if count > 0:
            self._update(work, count, rate)
        self._notes.update(work.notes)
        progress = self.progress
        progress.step, progress.tokens = step + 1, progress.tokens + tokens
        progress.flops += training_flops(self.parts.parameters, tokens, inference)
        progress.seconds += time.monotonic() - started
        self._notes["learning_rate"] = rate
        return False

    def _update(self, work: StepWork, count: float, rate: float) -> None:
        parts, last = self.parts, len(work.batches) - 1
        # Set here and by no scheduler: the rate follows from the step, and there is no state that could disagree.
        for group in parts.optimiser.param_groups:
            group["lr"] = rate
        for i, batch in enumerate(work.batches):
            # Ranks average their gradients, so the factor undoes that: what is left is the sum over the global count.
            with self._held_back(i < last):
                loss = parts.objective.loss(parts.model, batch)
                scaled = loss.sum * (self.ranks.count / count)
                parts.engine.backward(scaled if loss.extra is None else scaled + loss.extra * self.ranks.count)
            self.meter.add(loss.parts)
        norm = parts.engine.clip_grad_norm_(parts.model.parameters(), self.params.clip)
        if norm is not None:
            # Sharded parameters give a norm whose parts lie on all ranks; others a tensor or a number.
            whole = torch.as_tensor(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            self.meter.add({"grad_norm": sum_and_count(whole.detach().to(torch.float32), 1.0)})
        parts.optimiser.step()
        parts.optimiser.zero_grad(set_to_none=True)
        if parts.balance is not None:
            self.meter.add({"router_imbalance": sum_and_count(parts.balance.step(self.ranks), 1.0)})

    def _held_back(self, more: bool) -> AbstractContextManager[Any]:
        """Gradients of all but the last micro-batch wait, except where waiting would keep whole ones on every rank."""
        engine = self.parts.engine
        engine.sync_gradients = not more  # DeepSpeed takes its step in the backward pass that may synchronise
        sharded = engine.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        return engine.no_sync(self.parts.model) if more and not sharded else nullcontext()

    def _housekeeping(self) -> None:
        step, params = self.progress.step, self.params
        over = self._finished()
        due = over or (params.validate_every > 0 and step % params.validate_every == 0)
        saving = over or step % params.save_every == 0
        if (due or saving or step % params.log_every == 0) and not self._log():
            self._roll_back()
            return
        # A validation may run out of memory, every time anew: what was trained is safe before it begins.
        saved = saving and self._save(validation_due=due)
        if not due:
            return
        self._validate()
        if saved:
            self._note()
        elif self.progress.done or self.progress.best_step == step:
            self._save()

    def _log(self) -> bool:
        """Write what was measured since the last line; False when the run has diverged."""
        values = self.meter.take(self.ranks)
        step, tokens, flops, clock = self._logged
        now, progress = time.monotonic(), self.progress
        seconds = max(now - clock, 1e-9)
        rate = (progress.flops - flops) / seconds
        values |= {
            "tokens": progress.tokens,
            "flops": progress.flops,
            "tokens_per_second": (progress.tokens - tokens) / seconds,
            "steps_per_second": (progress.step - step) / seconds,
            "flops_per_second": rate,
            "share": min(self._share(), 1.0),
            "seconds": progress.seconds,
            **_memory(),
            **self._notes,
        }
        peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        if peak is not None:
            values["mfu"] = rate / (peak * self.ranks.count)
        self._logged = (progress.step, progress.tokens, progress.flops, now)
        self._notes = {}
        loss, norm = values.get("loss"), values.get("grad_norm")
        bad = [x for x in (loss, norm) if isinstance(x, float) and not math.isfinite(x)]
        mean = progress.mean_loss
        # The constant keeps small losses (and negative ones, as of GRPO) from being called an explosion by their noise.
        limit = math.inf if mean is None else self.params.recovery.spike * abs(mean) + 1.0
        exploding = isinstance(loss, float) and loss > limit
        if bad or exploding:
            self.metrics.write(progress.step, {"event": "diverged", "loss": str(loss), "grad_norm": str(norm)})
            return False
        if isinstance(loss, float):
            # About the last ten log lines: slow enough to know a spike, quick enough for the fall of the first steps.
            progress.mean_loss = loss if mean is None else 0.9 * mean + 0.1 * loss
        self.metrics.write(progress.step, values)
        return True

    def _roll_back(self) -> None:
        # The step that shows the damage need not be the one that did it: all since the last checkpoint is passed over.
        bad = self.progress.step
        state = self.snapshot.restore()
        # There is one from step 0 on, so that also a run whose first steps explode can go back.
        if state is None or not self.recovery.record(int(state["step"]), bad):
            raise DivergedError(
                f"the loss diverged at step {bad} and {self.params.recovery.tries} recoveries did not help; "
                f"see {self.folder / 'metrics.jsonl'}; lower learning_rate or look at the data of that step"
            )
        factor = self.recovery.factor(int(state["step"]))
        _log.warning("diverged at step %d: back to step %d, learning rate x %g", bad, int(state["step"]), factor)
        self._go_on_from(state, {"event": "rolled back", "from": bad, "learning_rate_factor": factor})

    def _validate(self) -> None:
        self.parts.model.eval()
        objective, meter = self.parts.objective, Meter()
        meter.add(objective.validate(self.parts.model, self.ranks.index, self.ranks.count))
        values: dict[str, Any] = meter.take(self.ranks)
        if objective.best_by in values:
            shares = {name: values[name] for name in objective.held if name in values}
            self.progress.compare(values[objective.best_by], objective.patience, shares, objective.held)
            values["best_step"] = self.progress.best_step
        if values:
            self.metrics.write(self.progress.step, values)
        if self.sampler is not None and self.params.samples:
            for line in self.sampler(self.parts.engine.unwrap_model(self.parts.model)):
                self.metrics.write(self.progress.step, line, "samples.jsonl")
        self.parts.model.train()

    def _save(self, *, validation_due: bool = False) -> bool:
        """Write a checkpoint; False when it could not be written and the run can do without this one."""
        progress = self.progress
        state = {
            "progress": asdict(progress),
            "meter": self.meter.state(self.ranks),
            "notes": self._notes,
            "validation_due": validation_due,
        }
        saved = self.snapshot.save(progress.step, state, also_keep=progress.best_step)
        if not saved:
            self.metrics.write(progress.step, {"event": "checkpoint failed"})
            # A missing checkpoint in the middle costs time if the job dies; here it would cost the result.
            if self._finished() or self.stopped or progress.step in (0, progress.best_step):
                raise OSError(
                    f"{self.folder}: the checkpoint of step {progress.step} could not be written (disk full?); "
                    "the one before it is intact, free some space and run again"
                )
        return saved

    def _note(self) -> None:
        """Tell this step's checkpoint, which was written before its validation, what that has found."""
        self.snapshot.note(self.progress.step, {"progress": asdict(self.progress), "validation_due": False})

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask for a stop at the next step."""

        def ask(_signal: int, _frame: FrameType | None) -> None:
            self._stop_asked = True

        try:
            before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: the STOP file remains
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _memory() -> dict[str, float]:
    if torch.cuda.is_available():
        return {"memory_gb": torch.cuda.max_memory_allocated() / 2**30}
    import resource

    return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
