"""A model that answers batches of requests; finished answers kept on disk, shared by the ranks."""

import fcntl
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download
from tqdm import tqdm

from llada_core.evaluation.params import SAMPLER_FIELDS, BenchmarkSettings
from llada_core.evaluation.requests import TOKEN_LISTS, GenerationRequest, renamed, token_list
from llada_core.files import content_hash, hash_of, line_of, parsed
from llada_core.likelihood import greedy_matches, log_likelihoods
from llada_core.modeling import MaskPredictor, load_model, load_to_answer
from llada_core.modeling.folder import base_of, is_adapter
from llada_core.modeling.place import checked_bits, processes_for
from llada_core.modeling.pretrained import need_of
from llada_core.sampling.engine import Engine
from llada_core.sampling.graph import Compiled
from llada_core.sampling.requests import Request, to_answer, to_fill
from llada_core.sampling.row_group import Answer
from llada_core.settings import ConfigError, nearest
from llada_core.tokenizer import Tokenizer

# Every rank forms the same batches, does its share and appends to its own file; rank 0 then takes up the files of
# all, and does what a dead rank left. There is no collective.

log = logging.getLogger(__name__)
Response = dict[str, Any]
Respond = Callable[[Sequence[int]], list[Response]]


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
    _answers: dict[str, Response] = field(default_factory=dict)
    _read: dict[Path, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._drop_torn_line()
            self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def get(self, key: str, otherwise: Response) -> Response:
        """The answer with this key, else `otherwise`."""
        return self._answers.get(key, otherwise)

    def add(self, keys: Sequence[str], answers: Sequence[Response], seconds: float) -> None:
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

    def _keep(self, keys: Sequence[str], answers: Sequence[Response], seconds: float) -> None:
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


def answer_all(
    batches: Sequence[Sequence[int]], keys: Sequence[str], work: Respond, store: AnswerStore, *, patience: float = 600.0
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


def _do(batch: Sequence[int], keys: Sequence[str], work: Respond, store: AnswerStore) -> None:
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


# An answer is found again only by a model and code that would give it again; prompts are told apart by each request's
# own key.

ROOT = Path(__file__).resolve().parents[2]


def whole_model(name: str) -> list[Path]:
    """The folders that a model on this machine is made of: its own, for an adapter its base's too, and so on."""
    found = [_folder(name)]
    while is_adapter(found[-1]):
        found.append(_folder(base_of(found[-1])))
    return found


def _folder(name: str) -> Path:
    """A folder, or the Hub's cached copy of a repository, which loading has fetched."""
    if Path(name).is_dir():
        return Path(name)
    repository, _, revision = name.partition("@")
    return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))


def code_of_evaluation() -> list[Path]:
    """The files and folders of code that dvc.yaml lists for `evaluate`; without that file all of llada_core."""
    listed = ROOT / "dvc.yaml"
    if not listed.is_file():
        return [ROOT / "llada_core"]
    deps = yaml.safe_load(listed.read_text(encoding="utf-8"))["stages"]["evaluate"]["do"]["deps"]
    return [ROOT / path for path in deps if path.partition("/")[0] in ("llada_core", "tasks")]


def key_of_answers(name: str, settings: dict[str, Any]) -> str:
    """16 hex digits for all that determines what a model answers, beside the prompt."""
    weights = [content_hash(folder) for folder in whole_model(name)]
    code = {str(path.relative_to(ROOT)): content_hash(path) for path in code_of_evaluation()}
    told = json.loads(json.dumps(settings, default=str))
    return hash_of([weights, code, told])[:16]


SAMPLES = 128
Ids = list[int]


@dataclass(frozen=True)
class ResponderOptions:
    """How requests are answered; `max_length` None: as long as the model takes."""

    settings: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    batch_size: int = 32
    max_length: int | None = None
    check_greedy: bool = False  # also whether greedy decoding would give the continuation (no metric of ours needs it)
    seed: int = 0
    patience: float = 600.0  # seconds of silence after which rank 0 does the work of other ranks
    compiled: Compiled = "off"


@dataclass(frozen=True)
class Responder:
    """A model, its tokenizer, and how they answer."""

    model: MaskPredictor
    tokenizer: Tokenizer
    options: ResponderOptions

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return min(self.options.max_length or self.model.max_length, self.model.max_length)

    @property
    def samples(self) -> int:
        """Monte-Carlo samples of one likelihood."""
        return self.options.settings.samples or SAMPLES

    @cached_property
    def engine(self) -> Engine:
        """What writes the answers: one for all calls, since graphs that it has captured stay with it."""
        options = self.options
        return Engine(self.model, rows=options.batch_size, waiting=sys.maxsize, compiled=options.compiled)

    def generate(self, asked: list[GenerationRequest]) -> list[Response]:
        """Answers to requests of any settings, `batch_size` at once, in their order: the next ones as places get free."""
        answers = self.engine.submit([self._request(each) for each in asked])
        try:
            self.engine.finish(answers)
        except BaseException:  # of a call that failed nothing stays in the queue of the next one
            for answer in answers:
                self.engine.cancel(answer)
            raise
        return [
            self._answer(self._written(answer, w), answer.forwards) for answer, w in zip(answers, asked, strict=True)
        ]

    def _request(self, asked: GenerationRequest) -> Request:
        if not asked.blanks:
            return to_answer(self.model, [asked.prompt], asked.params, copy=asked.copy)[0][0]
        template = [*asked.prompt, *[self.tokenizer.special.mask_id] * asked.blanks, *asked.suffix]
        block = self.model.block_length or asked.length  # one that attends by blocks keeps to those it learnt
        own = asked.params.filling()
        params = replace(own, max_new_tokens=asked.length, block_length=block, schedule="linear")
        return to_fill(self.model, [template], params, copy=asked.copy)[0]

    @staticmethod
    def _written(answer: Answer, asked: GenerationRequest) -> Ids:
        assert answer.tokens is not None
        first = len(asked.prompt) if asked.blanks else answer.request.start
        return answer.tokens[first : first + (asked.blanks or asked.params.max_new_tokens)].tolist()

    def _answer(self, ids: Ids, forwards: int) -> Response:
        ends = [i for i, token in enumerate(ids) if token in self.tokenizer.end_ids]
        return {"text": self.tokenizer.answer_text(ids), "tokens": ends[0] if ends else len(ids), "forwards": forwards}

    def score(self, pairs: list[tuple[Ids, Ids]]) -> list[Response]:
        """Log-likelihoods of continuations given contexts, one batch."""
        settings, seed = self.options.settings, self.options.seed
        guidance, estimator = settings.cfg_scale or 0.0, settings.estimator or "auto"
        values = log_likelihoods(
            self.model,
            pairs,
            samples=self.samples,
            cfg_scale=guidance,
            seed=seed,
            estimator=estimator,
            framed=bool(settings.framed),
        )
        check = self.options.check_greedy
        greedy = greedy_matches(self.model, pairs, cfg_scale=guidance) if check else [False] * len(pairs)
        return [{"ll": float(value), "greedy": each} for value, each in zip(values, greedy, strict=True)]

    def fit(self, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
        """A pair that the model can take: the context loses its beginning, a longer continuation too."""
        longest = self.longest - 2 * bool(self.options.settings.framed)
        continuation = continuation[-longest:]
        room = longest - len(continuation)
        return context[max(0, len(context) - room) :], continuation

    @torch.inference_mode()
    def tokens_per_second(self, rows: int, length: int) -> float:
        """The rate of one measured forward of `rows` sequences, heads at few positions."""
        ids = torch.full((rows, length), self.tokenizer.special.eos_id, device=self.model.device)
        for part in (ids[:1, :8], ids):  # the first warms up
            start = time.monotonic()
            self.model(part, positions=torch.arange(min(8, length), device=ids.device)).logits.sum().item()
        return rows * length / max(time.monotonic() - start, 1e-6)


AUTO_BATCH = 32
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What the reference evaluators also take and what means nothing here.
_SILENT = ("max_batch_size", "mask_id", "save_dir", "trust_remote_code", "parallelize", "show_speed")


def from_arguments(given: Mapping[str, Any]) -> tuple[Responder, AnswerStore]:
    """What `--model_args` (and lm-eval's batch size and device) name; raises `ConfigError`."""
    values = renamed({k: v for k, v in given.items() if k not in _SILENT})
    name = values.pop("pretrained", None) or values.pop("model_path", None)
    if not name:
        raise ConfigError("model_args lacks pretrained=FOLDER_OR_NAME")
    samples = values.pop("mc_num", None) or values.pop("samples", None)
    answers, estimator, framed = (values.pop(name, None) for name in ("answers", "estimator", "framed"))
    dtype, device, bits = str(values.pop("dtype", "auto")), values.pop("device", None), values.pop("bits", None)
    model = load(str(name), dtype, str(device or "auto"), bits)
    options = {k: values.pop(k) for k in ("max_length", "seed", "patience") if k in values}
    batch, greedy = str(values.pop("batch_size", 1)), bool(values.pop("is_check_greedy", False))
    allowed = [
        *SAMPLER_FIELDS,
        "eos",
        "pretrained",
        "dtype",
        "device",
        "bits",
        "mc_num",
        "estimator",
        "framed",
        "is_check_greedy",
        "answers",
        *options,
    ]
    for key in values:
        if key not in [*SAMPLER_FIELDS, "eos"]:
            raise ConfigError(f"model_args: unknown setting {key!r}{nearest(key, allowed)}")
    values |= {k: token_list(values[k]) for k in TOKEN_LISTS if k in values}
    settings = BenchmarkSettings.parse(
        {
            "sampling": values,
            "samples": samples,
            "cfg_scale": values.get("cfg_scale"),
            "estimator": estimator,
            "framed": framed,
        },
        "model_args",
    )
    size = AUTO_BATCH if batch.startswith("auto") else int(batch)
    answerer = Responder(
        model, Tokenizer.load(str(name)), ResponderOptions(settings, size, check_greedy=greedy, **options)
    )
    if not answers:
        return answerer, AnswerStore()
    determining = {"dtype": dtype, "bits": bits, "settings": settings.model_dump(), "greedy": greedy}
    determining |= {key: value for key, value in options.items() if key != "patience"}
    return answerer, AnswerStore(Path(answers) / key_of_answers(str(name), determining), Shard.of_process())


def processes(folders: Sequence[Path], dtype: str, device: str = "auto", bits: int | None = None) -> int:
    """How many processes of this machine answer best with these models, one after the other."""
    return processes_for([need_of(folder, DTYPES[dtype], bits) for folder in folders], device, bits)


def load(name: str, dtype: str = "auto", device: str = "auto", bits: int | None = None) -> MaskPredictor:
    """The model, ready to answer, on this process's own GPU if there is one; raises `ConfigError` for another dtype.

    Of the device "meta" only its shapes.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}{nearest(dtype, list(DTYPES))}")
    if device == "meta":
        return load_model(name, device="meta")
    return load_to_answer(name, dtype=DTYPES[dtype], device=device, bits=checked_bits(device, bits))
