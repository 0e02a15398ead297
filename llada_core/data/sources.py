"""Where rows come from: files and folders below a data root, data sets of the Hub, and short names for well-known ones.

Yields rows as their authors wrote them, each with its number, so that an error can say which. Knows no tokens.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from llada_core import files
from llada_core.data.files import SUFFIXES, DataError, Numbered, Row, Unusable, rows_of
from llada_core.data.params import SourceParams
from llada_core.settings import nearest


@dataclass(frozen=True)
class Known:
    """A data set with a short name: where the Hub has it, and the function in maps.py that each stage uses."""

    hub: str | None = None
    config: str | None = None
    split: str = "train"
    maps: dict[str, str] = field(default_factory=dict)


KNOWN: dict[str, Known] = {
    "alpaca": Known("tatsu-lab/alpaca", maps={"sft": "alpaca"}),
    "dolly": Known("databricks/databricks-dolly-15k", maps={"sft": "dolly"}),
    "tulu-3-sft-mixture": Known("allenai/tulu-3-sft-mixture"),
    "ultrachat": Known("HuggingFaceH4/ultrachat_200k", split="train_sft"),
    "smoltalk": Known("HuggingFaceTB/smoltalk", config="all"),
    "opc-sft-stage1": Known("OpenCoder-LLM/opc-sft-stage1", "filtered_infinity_instruct", maps={"sft": "alpaca"}),
    "opc-sft-stage2": Known("OpenCoder-LLM/opc-sft-stage2", "educational_instruct", maps={"sft": "alpaca"}),
    "opc-annealing-corpus": Known("OpenCoder-LLM/opc-annealing-corpus", "algorithmic_corpus"),
    "dclm": Known("mlfoundations/dclm-baseline-1.0"),
    "gutenberg": Known(),
    "gsm8k": Known("openai/gsm8k", "main", maps={"sft": "gsm8k_dialogue", "grpo": "gsm8k"}),
    "math500": Known("ankner/math-500", maps={"grpo": "math"}),  # its training split: MATH without MATH-500
    "countdown": Known("Jiayi-Pan/Countdown-Tasks-3to4", maps={"grpo": "countdown"}),
    "sudoku4x4": Known(maps={"grpo": "sudoku"}),
    "kodcode": Known("KodCode/KodCode-Light-RL-10K", maps={"grpo": "code"}),
    "ultrafeedback": Known(
        "HuggingFaceH4/ultrafeedback_binarized", split="train_prefs", maps={"preference": "preference"}
    ),
}
# What is measured under another name than test: the last part of a data set's name, and that split.
_MEASURED = {
    **dict.fromkeys(("hellaswag", "piqa", "winogrande", "truthful_qa", "truthfulqa"), "validation"),
    **dict.fromkeys(("gpqa", "ifeval", "instruction-following-eval"), "train"),
    "ceval-exam": "val",
}
_TEST = re.compile(r"(?<![a-z])tests?(?![a-z])")
_PACKED = ("", *files.PACKED)


@dataclass(frozen=True)
class Origin:
    """A source that was found: a file, a folder written by `datasets`, or a name on the Hub; and its map function."""

    place: str
    kind: str  # file, saved, hub
    split: str
    config: str | None
    map: str | None
    digest: str  # of the content for files; of name, configuration and revision on the Hub

    @property
    def is_test_set(self) -> bool:
        """Whether its split, or its file's name, says that it is there to be measured on."""
        folder, _, name = self.place.rpartition("/")
        split = files.stem(name).lower() if self.kind == "file" else self.split.lower()
        measured = _MEASURED.get((folder.rpartition("/")[2] if self.kind == "file" else name).lower())
        return _TEST.search(split) is not None or split.partition("[")[0] == measured


def find(source: SourceParams, stage: str, roots: list[Path]) -> Origin:
    """Where a source's rows are; a short name is looked up below the roots before it is asked of the Hub.

    Raises FileNotFoundError that says where it was looked for, and `DataError` for a test set that a stage would train
    on without `train_on_test`.
    """
    origin = _found(source, stage, roots)
    if stage != "evaluate" and origin.is_test_set and not source.train_on_test:
        what = origin.place if origin.kind == "file" else f"split {origin.split!r} of {origin.place}"
        raise DataError(
            f"data source {source.name!r} of {stage}: {what} is a test set; what was trained on it is measured nowhere."
            " Name another split, or insist with train_on_test: true"
        )
    return origin


def _found(source: SourceParams, stage: str, roots: list[Path]) -> Origin:
    known = KNOWN.get(source.name) or next((k for k in KNOWN.values() if k.hub == source.name), Known())
    own_map = f"llada_core.data.maps.{known.maps[stage]}" if stage in known.maps else None
    split, config = source.split or known.split, source.config or known.config
    for root in roots:
        place = root / Path(source.name).expanduser()
        if place.is_dir() and any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return Origin(str(place), "saved", split, config, source.map or own_map, _digest_folder(place))
        path = place if place.is_file() else split_file(place, source.split or "train")
        if path is not None:
            return Origin(str(path), "file", split, config, source.map or own_map, _digest_file(path))
    hub = known.hub if source.name in KNOWN else source.name if _looks_like_hub(source.name) else None
    if hub is None:
        looked = ", ".join(map(str, roots))
        raise FileNotFoundError(
            f"data source {source.name!r}: no file, and no folder with {split}{'|'.join(SUFFIXES)}, below {looked}"
            f"{'' if source.name in KNOWN else nearest(source.name, list(KNOWN))}"
        )
    asked = json.dumps([hub, config, split, source.revision])
    return Origin(hub, "hub", split, config, source.map or own_map, hashlib.sha256(asked.encode()).hexdigest())


def read(source: SourceParams, origin: Origin) -> Iterator[Numbered]:
    """The rows of a source with their numbers (of lines, from 1), those that cannot be read as `Unusable`.

    Raises `DataError` for a file that cannot be read as a whole, or holds nothing.
    """
    rows = rows_of(Path(origin.place), source.unit) if origin.kind == "file" else _read_datasets(source, origin)
    if source.contains:
        wanted = source.contains.items()
        rows = (
            (n, row)
            for n, row in rows
            if isinstance(row, Unusable) or all(text in str(row.get(name, "")) for name, text in wanted)
        )
    rows = islice(rows, source.limit)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{origin.place}: no rows; expected at least one")
    yield first
    yield from rows


def shared_with_test(source: SourceParams, origin: Origin) -> int | None:
    """How many rows of a training file occur in the test file beside it as well; None when there is none beside it."""
    beside = split_file(Path(origin.place).parent, "test") if origin.kind == "file" else None
    if beside is None or str(beside) == origin.place:
        return None
    tested = {_value(row) for _, row in rows_of(beside, source.unit) if isinstance(row, dict)}
    return sum(_value(row) in tested for _, row in read(source, origin) if isinstance(row, dict))


def _value(row: Row) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _read_datasets(source: SourceParams, origin: Origin) -> Iterator[Numbered]:
    import datasets

    if origin.kind == "saved":
        table = datasets.load_from_disk(origin.place)
        if isinstance(table, datasets.DatasetDict):
            if origin.split not in table:
                raise DataError(f"{origin.place}: no split {origin.split!r}; it has {', '.join(table)}")
            table = table[origin.split]
    else:
        try:
            table = datasets.load_dataset(
                origin.place, origin.config, split=origin.split, revision=source.revision, streaming=source.streaming
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"data set {origin.place!r} cannot be had from the Hub: {reason}") from None
    yield from enumerate(table, 1)


def split_file(folder: Path, split: str) -> Path | None:
    """The file of a split in a folder, whichever of the known formats it has; None where there is none."""
    names = (f"{split}{suffix}{packed}" for packed in _PACKED for suffix in SUFFIXES)
    return next((path for name in names if (path := folder / name).is_file()), None)


def _looks_like_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and files.suffix(name) not in SUFFIXES


def _digest_file(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _digest_folder(folder: Path) -> str:
    digests = [
        f"{path.relative_to(folder)} {_digest_file(path)}" for path in sorted(folder.rglob("*")) if path.is_file()
    ]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
