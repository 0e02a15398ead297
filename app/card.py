"""A model for people: what it is, can do and was trained on, how well it does, how to use it, where it comes from."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.guide import PUZZLES, kinds, offered, seldom
from app.models import ModelIndex
from app.render import escape, table
from llada_core.evaluation import recipes
from llada_core.evaluation.statistics import estimate
from llada_core.files import document
from llada_core.modeling.folder import weight_shapes
from llada_core.sampling.params import exactness
from llada_core.settings import ConfigError
from llada_core.usage import Usage
from tasks.record.registry import Version

Rows = list[tuple[str, str]]
IDS = "Identifiers"
HASH = re.compile(r"\b[0-9a-f]{40,}\b")
STAGES = {
    "pretrain": "pretraining",
    "sft": "fine-tuning",
    "sft_control": "further fine-tuning (the control of GRPO)",
    "preference": "preference tuning",
    "grpo": "reinforcement learning (GRPO)",
}


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    rows: Rows


def describe(index: ModelIndex, name: str) -> list[Section]:
    """All that is known of a model without loading it; sections with nothing to say are left out, identifiers come last."""
    try:
        version, folder = index.version(name), index.folder(name)
    except ConfigError as error:
        return [Section("What it is", [("registry", str(error))])]
    usage, receipt = index.usage(name), folder / "training.json"
    trained = document(receipt) if receipt.is_file() else {}
    tags = dict(version.tags) if version else {}
    sections = [
        Section("What it is", _what(name, version, folder)),
        Section("What it was trained on", _training(trained, tags, usage)),
        Section("How well it does", score_rows(index.scores(name))),
        Section("How to use it", _use(name, usage, index.scores(name))),
        Section("Where it comes from", _origin(tags)),
        Section(IDS, _ids(trained, tags)),
    ]
    return [section for section in sections if section.rows]


def _what(name: str, version: Version | None, folder: Path) -> Rows:
    rows = [("name", name)]
    if version is not None:
        aliases = f", also called {', '.join(version.aliases)}" if version.aliases else ""
        rows.append(("version", f"{version.number} of {version.name}{aliases}"))
    file = folder / "config.json"
    config = document(file) if file.is_file() else {}
    found = {key: next((config[n] for n in names if n in config), None) for key, names in _KEYS.items()}
    try:
        count = sum(math.prod(shape) for shape in weight_shapes(folder).values())
    except (OSError, ValueError):
        count = 0
    size = [f"{_amount(count)} weights"] if count else []
    size += [f"{found['layers']} layers of width {found['width']}"] if found["layers"] and found["width"] else []
    size += [f"reads {found['context']:,} tokens at most"] if found["context"] else []
    return [*rows, ("kind", f"masked-diffusion language model{': ' if size else ''}{', '.join(size)}")]


_KEYS = {
    "layers": ("n_layers", "num_hidden_layers"),
    "width": ("d_model", "hidden_size"),
    "context": ("max_sequence_length", "max_position_embeddings"),
}


def _training(trained: Mapping[str, Any], tags: Mapping[str, str], usage: Usage) -> Rows:
    rows: Rows = []
    if stages := [stage for stage in STAGES if stage in {*_pairs(tags.get("stage_runs")), trained.get("stage")}]:
        rows.append(("stages", ", then ".join(STAGES[stage] for stage in stages)))
    if "steps" in trained:
        over = f" over {_amount(trained['tokens'])} tokens" if "tokens" in trained else ""
        rows.append((STAGES.get(str(trained.get("stage")), "the last stage"), f"{trained['steps']:,} steps{over}"))
    if (trained or tags) and (known := kinds(usage)):
        rows += [(PUZZLES[kind].title, PUZZLES[kind].says) for kind in known]
        rows.append(("nothing else", "its answers to any other question mean nothing"))
    return rows


def score_rows(scores: Mapping[str, Mapping[str, float]]) -> Rows:
    """Benchmark -> share of right answers with its 95 % interval, and what is published for it."""
    rows = []
    for benchmark, each in sorted(scores.items()):
        if each:
            found = estimate(list(each.values()))
            interval = f"[{100 * found.low:.1f}, {100 * found.high:.1f}]"
            own = f"{100 * found.value:.1f} % {interval} of {found.n} questions"
            rows.append((benchmark, own + _published(benchmark)))
    return rows


def _published(benchmark: str) -> str:
    found = recipes.figures(benchmark) if recipes.exists(benchmark) else []
    return "".join(f" · published by {each.source}: {100 * each.value:.1f} % ({each.model})" for each in found)


def _use(name: str, usage: Usage, scores: Mapping[str, Mapping[str, float]]) -> Rows:
    single = "one question at a time: the turns before are not shown to it"
    rows = [
        ("in a terminal", f"llada chat --model {name}"),
        ("as a folder", f"llada export my-model --model {name}"),
        ("conversations", "several turns" if usage.turns == "multi" else single),
        ("settings", f"{_settings(usage)} {exactness(usage.sampling)}"),
    ]
    rows += [("system prompt", usage.system)] if usage.system else []
    return rows + [("for example", question) for question in offered(usage, scores)[:3]]


def _settings(usage: Usage) -> str:
    asked = usage.sampling
    blocks = "all at once" if asked.blocks == 1 else f"in blocks of {asked.block_length}"
    rule = f"whatever is {asked.threshold:g} sure or more at once" if asked.threshold else f"{asked.steps} steps"
    if asked.sampler is not None:
        edits = f", edits above {asked.editing_threshold:g}" if asked.sampler == "llada2.1" else ""
        rule = f"by the sampler {asked.sampler}: threshold {asked.threshold:g}{edits}"
    return f"Room for {asked.max_new_tokens} tokens, {blocks}, {rule}."


def _origin(tags: Mapping[str, str]) -> Rows:
    rows = []
    for alias in ("candidate", "champion"):
        if record := _pairs(tags.get(f"{alias}.record")):
            rows.append((alias, f"{record['when'][:16].replace('T', ' ')} by {record['who']}: {record['why']}"))
    if "gate" in tags:
        rows.append(("gate", tags["gate"]))
    return rows + ([("made with", tags["environment"])] if "environment" in tags else [])


_TOLD = (
    "folder",
    "gate",
    "environment",
    "candidate.record",
    "champion.record",
)  # elsewhere, or (folder) a path of ours


def _ids(trained: Mapping[str, Any], tags: Mapping[str, str]) -> Rows:
    rows = [(key.replace("_", " "), _short(value)) for key, value in sorted(tags.items()) if key not in _TOLD]
    if "run" in trained:
        rows.append(("run", str(trained["run"])))
    return rows + ([("training FLOPs", f"{trained['flops']:.3g}")] if "flops" in trained else [])


def _short(value: str) -> str:
    """A tag for people: mappings as a list, long hashes cut."""
    text = "; ".join(f"{key} {each}" for key, each in _pairs(value).items()) if value.startswith("{") else value
    return HASH.sub(lambda found: found[0][:12] + "…", text)


def _pairs(text: str | None) -> dict[str, Any]:
    values = json.loads(text) if text else {}
    return values if isinstance(values, dict) else {}


def _amount(count: float) -> str:
    """A large number for people."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.1f} {name}"
    return f"{count:,.0f}"


def as_html(sections: Sequence[Section]) -> str:
    """The sections one below the other, identifiers behind a fold."""
    parts = []
    for section in sections:
        rows = table(section.rows)
        fold = f"<details><summary>{section.title}</summary>{rows}</details>"
        parts.append(fold if section.title == IDS else f"<h3>{section.title}</h3>{rows}")
    return f'<div class="lf card">{"".join(parts)}</div>'


def as_markdown(sections: Sequence[Section]) -> str:
    """The same for a model card."""
    parts = []
    for section in sections:
        rows = "\n".join(f"- **{name}**: {value}" for name, value in section.rows)
        fold = f"<details><summary>{section.title}</summary>\n\n{rows}\n\n</details>"
        parts.append(fold if section.title == IDS else f"## {section.title}\n\n{rows}")
    return "\n\n".join(parts)


DIGITS, WORDS = ("1", "2", "3", "4", "3", "4", "1", "2"), ("The", "sea", "is", "wide", "and", "blue", ".", "∎")
PICTURE = (
    ("at first: nothing but masks", ""),
    ("step 1: what it is surest of", "04"),
    ("step 2: more, seeing all of it", "0246"),
    ("done", "01234567"),
)


def welcome(usage: Usage, scores: Mapping[str, Mapping[str, float]]) -> str:
    """What stands where nothing was asked yet: what happens, what this model can do, and what it cannot."""
    known, texts = kinds(usage), DIGITS if kinds(usage) else WORDS
    frames, before = [], ""
    for caption, written in PICTURE:
        tiles = "".join(_small(text, str(at), written, before) for at, text in enumerate(texts))
        frames.append(f"<div class=frame><div class=strip>{tiles}</div><span>{caption}</span></div>")
        before = written
    alone = (
        "It learnt single questions: each is asked alone, without the turns before. " if usage.turns == "single" else ""
    )
    return (
        '<div class="welcome"><p>This model does not write from left to right: all is masked at first, and each step '
        "writes what it is surest of, anywhere in the answer.</p>"
        f'<div class=picture role=img aria-label="an answer in four steps">{"".join(frames)}</div>'
        f"{_able(known, scores)}<p class=limits>{alone}{_unable(known, scores)}</p></div>"
    )


def _small(text: str, at: str, written: str, before: str) -> str:
    kind = "m" if at not in written else "d c4" if at in before or len(written) == len(DIGITS) else "d f c4"
    return f'<i class="{kind}">{escape(text) if at in written else ""}</i>'


def _able(known: Sequence[str], scores: Mapping[str, Mapping[str, float]]) -> str:
    if not known:
        return "<p>Ask anything; how well it does on what it was measured on stands under Model.</p>"
    rows = []
    for kind in known:
        puzzle, often = PUZZLES[kind], ""
        if each := scores.get(kind):
            found = estimate(list(each.values()))
            often = f" Right {100 * found.value:.0f} % of the time [{100 * found.low:.0f}, {100 * found.high:.0f}]."
        solved = f"<code>{escape(puzzle.question)}</code> → <code>{escape(puzzle.answer)}</code>"
        rows.append(f"<li><b>{escape(puzzle.title)}</b>: {escape(puzzle.says)}{escape(often)}<br>{solved}</li>")
    return f"<ul>{''.join(rows)}</ul>"


def _unable(known: Sequence[str], scores: Mapping[str, Mapping[str, float]]) -> str:
    if not known:
        return ""
    several = {1: "this one kind", 2: "these two kinds", 3: "these three kinds"}[len(known)]
    rare = [PUZZLES[kind].title for kind in seldom(scores)]
    missing = f" It seldom gets {' and '.join(rare)} right, so no example of it is offered." if rare else ""
    return escape(
        f"It was trained on {several} of puzzle and on nothing else: other questions get digits without meaning.{missing}"
    )
