"""Finished answers on disk and who does what: a killed evaluation resumes, ranks share one, nobody waits for ever.

Every rank forms the same batches, does its share and appends to its own file; rank 0 then takes up the files of all,
and does what a dead rank left. There is no collective. Knows neither models nor lm-eval.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llada_core.files import line_of, parsed

log = logging.getLogger(__name__)
Answer = dict[str, Any]
Work = Callable[[Sequence[int]], list[Answer]]


@dataclass(frozen=True)
class Shard:
    """Which part of the batches this process does: those whose number is `rank` modulo `world`."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_process(cls) -> "Shard":
        """As the launcher (accelerate, torchrun, srun with our script) numbered this process in this job, and as
        `LLADAFLOW_SHARD` (3/8: the fourth of eight) numbers this job."""
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        job, _, jobs = os.environ.get("LLADAFLOW_SHARD", "0/1").partition("/")
        return cls(int(job) * world + rank, int(jobs) * world)


def key_of(kind: str, arguments: Sequence[Any], repeat: int) -> str:
    """What identifies a request within one model and its settings; `repeat` tells equal requests apart."""
    return hashlib.sha256(json.dumps([kind, list(arguments), repeat], sort_keys=True).encode()).hexdigest()


def keys_of(kind: str, requests: Sequence[Sequence[Any]]) -> list[str]:
    """A key for each request."""
    seen: dict[str, int] = {}
    keys = []
    for arguments in requests:
        plain = key_of(kind, arguments, 0)
        repeat = seen.get(plain, 0)
        seen[plain] = repeat + 1
        keys.append(plain if not repeat else key_of(kind, arguments, repeat))
    return keys


@dataclass
class AnswerStore:
    """Answers by key, in memory and (with a folder) in one append-only file per rank; a torn last line is dropped."""

    folder: Path | None = None
    shard: Shard = Shard()
    seconds: float = 0.0  # spent on everything in the store, by all ranks and all earlier attempts
    _answers: dict[str, Answer] = field(default_factory=dict)
    _read: dict[Path, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._drop_torn_line()
            self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def get(self, key: str, otherwise: Answer) -> Answer:
        """The answer with this key, else `otherwise`."""
        return self._answers.get(key, otherwise)

    def add(self, keys: Sequence[str], answers: Sequence[Answer], seconds: float) -> None:
        """Keeps the answers of one batch: all of them or, if killed meanwhile, none."""
        self._keep(keys, answers, seconds)
        if self.folder is None:
            return
        line = line_of({"keys": list(keys), "answers": list(answers), "seconds": round(seconds, 6)})
        with self._own.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another evaluation of the same model may write here as well
            file.write(line.encode())
        self._read[self._own] = self._own.stat().st_size

    def refresh(self) -> bool:
        """Takes up what all ranks have written since; whether that was anything."""
        grown = False
        for path in sorted(self.folder.glob("answers-*.jsonl")) if self.folder else ():
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    record = parsed(line, str(path))
                    self._keep(record["keys"], record["answers"], record["seconds"])
                    self._read[path] = self._read.get(path, 0) + len(line)
                    grown = True
        return grown

    def _keep(self, keys: Sequence[str], answers: Sequence[Answer], seconds: float) -> None:
        self._answers.update(zip(keys, answers, strict=True))
        self.seconds += seconds

    @property
    def _own(self) -> Path:
        assert self.folder is not None
        return self.folder / f"answers-{self.shard.rank:05d}-of-{self.shard.world:05d}.jsonl"

    def _drop_torn_line(self) -> None:
        with self._own.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if (content := file.read()) and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)


def work_off(
    batches: Sequence[Sequence[int]], keys: Sequence[str], work: Work, store: AnswerStore, *, patience: float = 600.0
) -> None:
    """Puts an answer to every request into `store` (rank 0), or to those of this rank (the others).

    `batches` hold numbers into `keys`; `work` answers the numbers it is given. A batch that runs out of GPU memory is
    halved. Rank 0 does the batches of others itself once none of them has written for `patience` seconds.
    """
    rank, world = store.shard.rank, store.shard.world
    mine = [batch for number, batch in enumerate(batches) if number % world == rank]
    total = sum(map(len, mine))
    with tqdm(total=total, unit=" answers", desc=f"rank {rank}" if world > 1 else "answers", mininterval=2.0) as bar:
        for batch in mine:
            if _open(batch, keys, store):
                _do(batch, keys, work, store)
            bar.update(len(batch))
    if rank == 0:
        for batch in _left_by_others(batches, keys, store, patience):
            _do(batch, keys, work, store)


def _left_by_others(
    batches: Sequence[Sequence[int]], keys: Sequence[str], store: AnswerStore, patience: float
) -> Iterator[Sequence[int]]:
    """Waits for the other ranks' files; yields a batch whenever they have been silent for too long."""
    last = time.monotonic()
    while left := [batch for batch in batches if _open(batch, keys, store)]:
        if store.refresh():
            last = time.monotonic()
        elif store.shard.world == 1 or time.monotonic() - last > patience:
            log.warning("%d batches of other ranks were left undone; rank 0 does them", len(left))
            yield left[0]
        else:
            time.sleep(0.2)


def _open(batch: Sequence[int], keys: Sequence[str], store: AnswerStore) -> bool:
    return any(keys[i] not in store for i in batch)


def _do(batch: Sequence[int], keys: Sequence[str], work: Work, store: AnswerStore) -> None:
    start = time.monotonic()
    try:
        answers = work(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
        torch.cuda.empty_cache()
        log.warning("a batch of %d does not fit the GPU; halving it", len(batch))
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            _do(half, keys, work, store)
        return
    store.add([keys[i] for i in batch], answers, time.monotonic() - start)
