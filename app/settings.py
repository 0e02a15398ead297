"""The sampler panel as data: every value of SamplingParams with its range and its sentence.

Read from SamplingParams itself, so that a new knob appears by itself. Knows no Gradio and no model.
"""

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter

from app.models import Refused, refusing
from llada_core.sampling.params import SENTENCES, SamplingParams

Kind = Literal["choice", "integer", "number", "switch", "tokens"]
MOST_TOKENS = 1024
LONGEST = 2000  # characters of a value, which an error repeats


@dataclass(frozen=True)
class Knob:
    """One setting: `low` and `high` are None where there is no limit; `optional` ones may be left empty."""

    name: str
    kind: Kind
    default: Any
    sentence: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False


def knobs() -> list[Knob]:
    """Every field of SamplingParams, in its order."""
    fields = TypeAdapter(SamplingParams).json_schema()["properties"]
    return [_knob(field, fields[field.name]) for field in dataclasses.fields(SamplingParams)]


def _knob(field: dataclasses.Field[Any], schema: dict[str, Any]) -> Knob:
    annotation = field.type
    optional = get_origin(annotation) in (Union, types.UnionType)
    inner = next(a for a in get_args(annotation) if a is not type(None)) if optional else annotation
    limits = next((part for part in schema.get("anyOf", []) if part.get("type") != "null"), schema)
    low = limits.get("minimum", limits.get("exclusiveMinimum"))
    high = limits.get("maximum", limits.get("exclusiveMaximum"))
    if get_origin(inner) is Literal:
        kind: Kind = "choice"
    elif inner is bool:
        kind = "switch"
    else:
        kind = "integer" if inner is int else "number" if inner is float else "tokens"
    choices = tuple(str(c) for c in get_args(inner)) if kind == "choice" else ()
    default = schema.get("default")
    return Knob(field.name, kind, default, SENTENCES[field.name], low, high, choices, optional)


def params(values: Mapping[str, Any]) -> SamplingParams:
    """The settings as the person left them; raises Refused with one sentence for a value out of range."""
    given: dict[str, Any] = {}
    for knob in knobs():
        value = values.get(knob.name, knob.default)
        if isinstance(value, str) and len(value) > LONGEST:
            raise Refused(f"{knob.name}: {len(value):,} characters are no setting.")
        if value is None or value == "":
            value = knob.default
        given[knob.name] = _tokens(knob.name, value) if knob.kind == "tokens" else value
    with refusing():
        made = SamplingParams(**given)
    if made.max_new_tokens > MOST_TOKENS:
        raise Refused(f"max_new_tokens is {made.max_new_tokens}; this page writes at most {MOST_TOKENS} at a time.")
    return made


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    parts = [str(part) for part in value] if isinstance(value, list | tuple) else str(value).replace(",", " ").split()
    if not all(part.isdecimal() for part in parts):
        raise Refused(f"{name}: write token numbers with commas between them (got {value!r})")
    return tuple(int(part) for part in parts)
