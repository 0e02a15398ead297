"""The stage `prepare`: from sources and puzzles to `data/`: tokenizer, tokenised splits, evaluation files, a card.

What one stage's block asks for is built once and kept, under a name made of all that determines it, in a folder that
all workspaces share.
"""

import hashlib
import inspect
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

import llada_core.data
from llada_core.data.build import Chunk, Workers, build, chunks_of, generated, texts_in
from llada_core.data.contamination import QUESTIONS, saved_values, trained_on, value_of
from llada_core.data.formats import FORMATS
from llada_core.data.params import DataParams, TokenizerParams
from llada_core.data.puzzle_rows import benchmarks, keys_of, training_puzzles
from llada_core.data.rows import lines_of, require_usable
from llada_core.data.sources import ResolvedSource, find, shared_with_test
from llada_core.files import line_of, numbered
from llada_core.settings import ConfigError, function_at
from llada_core.tokenizer import Tokenizer, train_tokenizer
from tasks.folders import content_hash, hash_of, link_into, read_json, write_json, write_text
from tasks.project import data_root, source_roots
from tasks.record.runs import StageContext
from tasks.work.evaluate import quiet_lm_eval

_CODE = Path(llada_core.data.__file__).parent  # a change there makes everything anew


@dataclass(frozen=True)
class Measured:
    """What the same run measures: names of benchmarks, the folder with their files (None: the Hub), and by name the files
    of one's own, of questions or with a recipe."""

    benchmarks: tuple[str, ...]
    root: Path | None
    own: Mapping[str, Path] = field(default_factory=dict)


class Part:
    """One training stage's share of the data: where its rows come from, and what determines them."""

    def __init__(self, stage: str, params: DataParams, seed: int, roots: list[Path]) -> None:
        found = params.parts[stage]
        self.stage, self.block, self.format = stage, found, FORMATS[stage]
        self.origins = [(source, find(source, stage, roots)) for source in found.sources]
        self.train, self.validation = training_puzzles(stage, self.format.split, params.puzzles, seed)
        self.dialogues = params.puzzles.dialogues
        drawn = hashlib.sha256(repr([self.train, self.validation, self.dialogues]).encode()).hexdigest()
        sources = [[origin.digest, _code_of(origin)] for _, origin in self.origins]
        self.key = hash_of([stage, found.model_dump(mode="json"), drawn, sources, content_hash(_CODE)])

    def chunks(self) -> Iterator[Chunk]:
        """All rows: puzzles first, then source after source."""
        yield from generated(self.format.drawn(self.train, self.dialogues), "puzzles", "train")
        yield from generated(self.format.drawn(self.validation, self.dialogues), "puzzles", "validation")
        for source, origin in self.origins:
            yield from chunks_of(source, origin)

    def texts(self, documents: int) -> Iterator[str]:
        """Training text of each source for a tokenizer."""
        starts = [generated(self.format.drawn(self.train, self.dialogues), "puzzles", "train")]
        starts += [chunks_of(source, origin) for source, origin in self.origins]
        for chunks in starts:
            yield from islice(
                chain.from_iterable(texts_in(self.stage, self.block, chunk) for chunk in chunks), documents
            )


def prepare(
    params: DataParams, *, seed: int, out: Path, home: Path, measured: Measured | None = None
) -> dict[str, Any]:
    """Writes the folder `out` and returns its card; names of files are relative to `home` or to the data root.

    measured: the benchmarks of the run, whose questions are looked for in the training data.
    Raises `ConfigError`, `DataError` and FileNotFoundError for what a user can mend; `out` is then not there.
    """
    roots = source_roots(params.root, home)
    kept = home / ".cache" / "prepared"
    kept.mkdir(parents=True, exist_ok=True)
    _sweep(kept)
    parts = [Part(stage, params, seed, roots) for stage in params.parts]
    with tempfile.TemporaryDirectory(dir=kept, prefix=".new-") as scratch, Workers(params.workers) as workers:
        folder = Path(scratch) / "data"
        folder.mkdir()
        card: dict[str, Any] = {"seed": seed, "parts": {}}
        if parts:
            # The number of prompts may so change without another tokenizer, and with it another fine-tuning.
            read = [part for part in parts if part.format.new_text] or parts
            tokenizer = _tokenizer(params.tokenizer, read, kept, Path(scratch))
            link_into(tokenizer, folder / "tokenizer")
            digest = content_hash(tokenizer)
            card["tokenizer"] = {"hash": digest, "vocab_size": Tokenizer.load(tokenizer).vocab_size}
            for part in parts:
                built = _built(part, tokenizer, hash_of([part.key, digest]), kept, workers)
                link_into(built, folder / part.stage)
                card["parts"][part.stage] = made = read_json(built / "card.json")
                require_usable(part.stage, made.get("read", {}), params.max_unusable, strict=params.strict)
        card |= _evaluation(params, seed, roots, parts, folder)
        if measured is not None:
            card["overlap"] |= _with_recipes(measured, parts, folder)
        write_json(folder / "card.json", card)
        link_into(folder, out)
    return card


def _built(part: Part, tokenizer: Path, key: str, kept: Path, workers: Workers) -> Path:
    """The folder of a part's rows, built unless a run before has."""
    place = kept / f"{part.stage}-{key[:16]}"
    if not (place / "card.json").is_file():
        with tempfile.TemporaryDirectory(dir=kept, prefix=".new-") as scratch:
            folder = Path(scratch) / part.stage
            card = build(part.stage, part.block, tokenizer, part.chunks(), workers, folder)
            sources = [
                {"name": source.name, "kind": origin.kind, "split": origin.split, "hash": origin.digest}
                | ({"test_set": True} if origin.is_test_set else {})
                for source, origin in part.origins
            ]
            puzzles = {"train": len(part.train), "validation": len(part.validation)}
            write_text(folder / "puzzle_values.txt", "".join(f"{key}\n" for key in sorted(keys_of(part.train))))
            write_json(folder / "card.json", card | {"sources": sources, "puzzles": puzzles})
            _put(folder, place)
    return place


def _tokenizer(params: TokenizerParams, parts: list[Part], kept: Path, scratch: Path) -> Path:
    """The folder of the tokenizer that was named, or of one trained on the parts' text."""
    if params.name is not None:
        Tokenizer.load(params.name).save(scratch / "tokenizer")
        return scratch / "tokenizer"
    place = kept / f"tokenizer-{hash_of([params.model_dump(mode='json'), [part.key for part in parts]])[:16]}"
    if not (place / "tokenizer.json").is_file():
        texts = chain.from_iterable(part.texts(params.documents) for part in parts)
        train_tokenizer(texts, params.vocab_size, scratch / "tokenizer")
        _put(scratch / "tokenizer", place)
    return place


def _sweep(kept: Path) -> None:
    """Removes what a killed run left half-made a day ago or earlier."""
    for folder in kept.glob(".new-*"):
        if time.time() - folder.stat().st_mtime > 86_400:
            shutil.rmtree(folder, ignore_errors=True)


def _put(folder: Path, place: Path) -> None:
    """Moves a finished folder to its place; if another process was faster, its folder is as good."""
    try:
        os.replace(folder, place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(folder)


def _evaluation(params: DataParams, seed: int, roots: list[Path], parts: list[Part], data: Path) -> dict[str, Any]:
    """Writes the evaluation files; counts, per training stage, the puzzles of each that occur there by value."""
    folder = data / "eval"
    shown: dict[str, set[str]] = {part.stage: keys_of(part.train) for part in parts}
    asked = {part.stage: saved_values(data / part.stage) for part in parts}
    card: dict[str, Any] = {"evaluate": {}, "overlap": {}}
    for benchmark in benchmarks(params.puzzles, seed, roots):
        text = ""
        # A source may hold puzzles as well, in words of its own.
        seen = {
            stage: [key in keys or value_of(key) in asked[stage] for key in benchmark.keys]
            for stage, keys in shown.items()
        }
        for row, *by_stage in zip(benchmark.rows, *seen.values(), strict=True):
            text += line_of(row | {"in_training": any(by_stage)})
        write_text(folder / f"{benchmark.name}.jsonl", text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        card["evaluate"][benchmark.name] = {"rows": len(benchmark.rows), "hash": digest}
        card["overlap"][benchmark.name] = {stage: sum(flags) for stage, flags in seen.items()}
    for part in parts:
        for source, origin in part.origins:
            if (count := shared_with_test(source, origin)) is not None:
                card["overlap"].setdefault(f"{source.name} test", {})[part.stage] = count
    write_json(folder / "benchmarks.json", card["evaluate"])  # also without puzzles, for DVC takes no empty folder
    if values := sorted(frozenset[int]().union(*asked.values())):
        np.save(folder / QUESTIONS, np.array(values, np.uint64))
    return card


def _with_recipes(measured: Measured, parts: list[Part], data: Path) -> dict[str, dict[str, int | str]]:
    """Per recipe or file of one's own that the run measures and training stage, how many of the questions are trained on,
    by value."""
    from llada_core.evaluation import recipes

    asked = {part.stage: values for part in parts if (values := saved_values(data / part.stage))}
    shown = {part.stage: {value_of(key) for key in keys_of(part.train)} for part in parts}
    found: dict[str, dict[str, int | str]] = {}
    for name in measured.benchmarks:
        own = measured.own.get(name)
        if own is not None and own.suffix == ".jsonl":
            rows = [row for _, row in numbered(own)]
            trained = {stage: asked.get(stage, frozenset()) | puzzles for stage, puzzles in shown.items()}
            found[name] = {stage: sum(trained_on(row, values) for row in rows) for stage, values in trained.items()}
            continue
        if not asked or (data / "eval" / f"{name}.jsonl").exists() or (own is None and not recipes.exists(name)):
            continue
        from llada_core.evaluation import taskset

        quiet_lm_eval()
        try:
            recipe = recipes.find(name) if own is None else recipes.read(own)
            questions = taskset.question_values(taskset.tasks_of(recipe, measured.root))
        except ConfigError as error:  # the run trains without its benchmarks; the evaluation will say this again
            found[name] = {"not counted": str(error)}
        else:
            found[name] = {stage: sum(q in values for q in questions) for stage, values in asked.items()}
    return found


def _code_of(origin: ResolvedSource) -> str | None:
    """The file of the map function, whose other functions it may call."""
    if origin.map is None:
        return None
    file = inspect.getsourcefile(function_at(origin.map, "map function"))
    return None if file is None else Path(file).read_text(encoding="utf-8")


def run(work: StageContext) -> None:
    """The stage's work: `data/` in the run's own tree."""
    params = work.params.data
    assert params is not None
    home = work.run.path.parents[1]
    evaluate = work.params.evaluate
    measured = None
    if evaluate is not None:
        own = {name: Path(block.questions) for name, block in evaluate.overrides.items() if block.questions}
        measured = Measured(evaluate.benchmarks, data_root(work.params, home), own)
    card = prepare(params, seed=work.params.seed, out=Path("data"), home=home, measured=measured)
    print(*summary(card), sep="\n", file=sys.stderr)


def summary(card: dict[str, Any]) -> Iterator[str]:
    """What a card says, in a line each."""
    for stage, part in card["parts"].items():
        train, held_out = part["train"], part["validation"]
        none = f"nothing held out, so nothing is validated (data.{stage}.validation is the share)"
        kept = f"{held_out['rows']} held out" if held_out["rows"] else none
        yield f"{stage}: {train['rows']} rows of {train['tokens']} tokens, {kept}"
        yield from (f"{stage}: {line}" for line in lines_of(part.get("read", {})))
        if part["dropped"]:
            yield f"{stage}: dropped or cut: {', '.join(f'{n:,} {why}' for why, n in part['dropped'].items())}"
        for source in part["sources"]:
            if source.get("test_set"):
                yield f"{stage}: {source['name']} is a test set and is trained on all the same (train_on_test)"
    for name, counts in card["overlap"].items():
        rows = f", {card['evaluate'][name]['rows']} puzzles" if name in card["evaluate"] else ""
        told = f"not counted ({counts['not counted']})" if "not counted" in counts else counts
        yield f"{name}{rows}: in training by value: {told}"
