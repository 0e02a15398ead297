"""Recipes: one YAML file pins everything behind one published number.

Task and its version, shots, chat template, sampler settings, metric and filter; variants where two sources measured one
column differently. This file finds and reads them; it knows neither lm-eval nor models.
"""

from functools import cache
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, model_validator

from llada_core.evaluation.params import Settings
from llada_core.settings import Block, ConfigError, nearest, read_yaml

FOLDER = Path(__file__).parent
OFFICIAL = "official"
Fields = dict[str, str | int | bool | list[str] | dict[str, str | bool | list[str]] | None]


class Variant(Block):
    """Where another source's setting departs from the official one."""

    settings: Settings = Settings()
    shots: int | None = Field(default=None, ge=0)
    note: str = ""


class LocalFiles(Block):
    """The folder below the data root with this benchmark's files, and the task fields that they need changed."""

    folder: str
    change: Fields = Field(default_factory=dict)
    subset: str = ""  # said beside every score when these files are not the whole benchmark


class Recipe(Block):
    """One benchmark column. `metric` is lm-eval's key `name,filter`; `chance` None: the mean of 1 / choices."""

    name: str
    task: str
    definition: str  # folder below lm_eval/tasks, or `ours`
    version: float
    kind: Literal["generate", "likelihood", "rolling"]
    metric: str
    also: tuple[str, ...] = ()
    shots: int = Field(ge=0)
    chat: bool = False
    chance: float | None = None
    runs_code: bool = False
    settings: Settings = Settings()
    change: Fields = Field(default_factory=dict)  # task fields that are ours and not lm-eval's
    variant: str = OFFICIAL
    variants: dict[str, Variant] = Field(default_factory=dict)
    local: LocalFiles | None = None
    hub: bool = True  # whether the files can come from the Hub
    gold: str = ""  # Jinja over a question: what a model that knows the answer would write
    note: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "," not in self.metric:
            raise ValueError(f"metric {self.metric!r} lacks its filter; write it as lm-eval does, for example acc,none")
        if self.kind == "generate" and not self.settings.sampling:
            raise ValueError("a recipe that generates pins its sampler settings")
        if self.kind == "generate" and self.chance is None:
            raise ValueError("a recipe that generates says what guessing scores (chance)")
        return self

    def of(self, variant: str) -> "Recipe":
        """This recipe as `variant` measured it; raises `ConfigError` naming the variants there are."""
        if variant == OFFICIAL:
            return self
        if variant not in self.variants:
            raise ConfigError(
                f"recipe {self.name!r} has no variant {variant!r}{nearest(variant, [OFFICIAL, *self.variants])}"
            )
        chosen = self.variants[variant]
        update = {
            "variant": variant,
            "settings": chosen.settings.over(self.settings),
            "shots": self.shots if chosen.shots is None else chosen.shots,
            "note": chosen.note or self.note,
        }
        return self.model_copy(update=update)


@cache
def names() -> tuple[str, ...]:
    """Every recipe there is."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def find(name: str) -> Recipe:
    """The recipe called `name`, `name.variant`, or `base_name`; raises `ConfigError` with the nearest name."""
    stem, _, variant = name.partition(".")
    if stem not in names():
        stem = f"base_{stem}"
    if stem not in names():
        raise ConfigError(f"there is no recipe {name!r}{nearest(name.partition('.')[0], list(names()))}")
    path = FOLDER / f"{stem}.yaml"
    return Recipe.parse({"name": stem, **read_yaml(path)}, path.name).of(variant or OFFICIAL)


def exists(name: str) -> bool:
    """Whether `find` would find a recipe."""
    stem = name.partition(".")[0]
    return stem in names() or f"base_{stem}" in names()


class Column(Block):
    """One column of a published table and the figures given for it, in percent."""

    column: str
    recipe: str
    figures: dict[str, float]  # variant -> figure


class Table(Block):
    """One published table: for which model, from which sources."""

    title: str
    model: str
    sources: dict[str, str]  # variant -> where its figures stand
    columns: tuple[Column, ...]


@cache
def tables() -> dict[str, Table]:
    """The published tables by short name (figures.yaml is the only place with their numbers)."""
    path = FOLDER.parent / "figures.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: Table.parse(value, f"{path.name}: {name}") for name, value in values.items()}


def table(name: str) -> Table:
    """The published table called `name`; raises `ConfigError` with the nearest name."""
    if name not in tables():
        raise ConfigError(f"there is no table {name!r}{nearest(name, list(tables()))}")
    return tables()[name]


class Figure(Block):
    """A published figure, as a fraction: of which model, where it stands."""

    source: str
    value: float
    model: str
    where: str


def figures(recipe: str) -> list[Figure]:
    """Published figures for a recipe; empty where nothing is published."""
    return [
        Figure(source=source, value=value / 100, model=each.title, where=each.sources[source])
        for each in tables().values()
        for column in each.columns
        if column.recipe == recipe
        for source, value in column.figures.items()
    ]
