"""Recipes: one YAML file pins everything behind one published number.

Task and its version, shots, chat template, sampler settings, metric and filter; variants where two sources measured one
column differently. This file finds and reads them; it knows neither lm-eval nor models.
"""

from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from llada_core.evaluation.params import BenchmarkSettings
from llada_core.settings import ConfigError, SettingsBlock, nearest, read_yaml

FOLDER = Path(__file__).parent
OFFICIAL = "official"
Fields = dict[str, Any]  # of an lm-eval task, as its YAML has them
Part = Literal["prompt", "shots", "filter", "metric", "settings", "questions"]
Departures = dict[Part, str]  # what of a measurement is not a figure's -> how


class LocalFiles(SettingsBlock):
    """The folder below the data root with this benchmark's files, and the task fields that they need changed."""

    folder: str
    change: Fields = Field(default_factory=dict)
    subset: str = ""  # said beside every score when these files are not the whole benchmark


class Measured(SettingsBlock):
    """The version of a task that figures were measured with, and what the installed one does otherwise."""

    by: str  # package and version
    versions: dict[str, float] = Field(default_factory=dict)  # pattern of (sub)task names -> version
    target_delimiter: str | None = None  # between question and answer; None: as installed
    differs: Departures = Field(default_factory=dict)
    same: str = ""  # why another version scores alike nevertheless


class Variant(SettingsBlock):
    """Where another source departs from a recipe: every field that is given goes over the recipe's.

    `like` takes what is asked and how it is scored from another recipe (`name.variant`), and leaves the sampler alone.
    """

    like: str = ""
    settings: BenchmarkSettings = BenchmarkSettings()
    task: str | None = None
    definition: str | None = None
    version: float | None = None
    metric: str | None = None
    also: tuple[str, ...] | None = None
    shots: int | None = Field(default=None, ge=0)
    chat: bool | None = None
    multiturn: bool | None = None
    average: Literal["questions", "tasks"] | None = None
    change: Fields | None = None
    local: LocalFiles | None = None
    gold: str | None = None
    differs: Departures | None = None
    measured_with: Measured | None = None
    note: str | None = None


# What is asked and how it is scored: all of a recipe but its name, its sampler and its other variants.
ASKED = tuple(name for name in Variant.model_fields if name not in ("like", "settings", "note"))


class Recipe(SettingsBlock):
    """One benchmark column. `metric` is lm-eval's key `name,filter`; `chance` None: the mean of 1 / choices.

    `multiturn`: worked examples are turns of their own in a chat, not one message with the question. `average` "tasks":
    the mean over subtasks of their means. `differs`: how this is known to depart from what `variant` measured.
    """

    name: str
    task: str
    definition: str  # folder below lm_eval/tasks, or `ours`
    version: float
    kind: Literal["generate", "likelihood", "rolling"]
    metric: str
    also: tuple[str, ...] = ()
    shots: int = Field(ge=0)
    chat: bool = False
    multiturn: bool | None = None  # None: as `chat`
    average: Literal["questions", "tasks"] = "questions"
    chance: float | None = None
    runs_code: bool = False
    settings: BenchmarkSettings = BenchmarkSettings()
    change: Fields = Field(default_factory=dict)  # task fields that are ours and not lm-eval's
    variant: str = OFFICIAL  # whose figure these fields measure
    differs: Departures = Field(default_factory=dict)
    measured_with: Measured | None = None
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

    @property
    def turns(self) -> bool:
        """Whether worked examples are turns of their own."""
        return self.chat if self.multiturn is None else self.multiturn

    def of(self, variant: str) -> "Recipe":
        """This recipe as `variant` measured it; raises `ConfigError` naming the variants there are."""
        if variant == self.variant:
            return self
        if variant not in self.variants:
            raise ConfigError(
                f"recipe {self.name!r} has no variant {variant!r}{nearest(variant, [self.variant, *self.variants])}"
            )
        chosen = self.variants[variant]
        # A departure holds for the figure that it was said of; a variant says its own.
        update: dict[str, Any] = {"variant": variant, "differs": {}}
        if chosen.like:
            other = find(chosen.like)
            update |= {name: getattr(other, name) for name in ASKED}
        update |= {name: getattr(chosen, name) for name in ASKED if getattr(chosen, name) is not None}
        update |= {"settings": chosen.settings.over(self.settings)}
        update |= {"note": self.note if chosen.note is None else chosen.note}
        return self.model_copy(update=update)

    @property
    def _prompt(self) -> tuple[Any, ...]:
        words = {key: value for key, value in self.change.items() if key not in ("filter_list", "metric_list")}
        return self.task, self.definition, words, self.chat, self.turns if self.shots else None

    def departures(self, published: "Recipe") -> Departures:
        """What of this recipe is not what `published`, another variant of it, measured."""
        (own, own_filter), (other, other_filter) = (r.metric.split(",", 1) for r in (self, published))
        found: Departures = {}
        if self._prompt != published._prompt:
            found["prompt"] = f"that of {self.variant}"
        if self.shots != published.shots:
            found["shots"] = f"{self.shots} for {published.shots}"
        lists = {key: self.change.get(key) == published.change.get(key) for key in ("filter_list", "metric_list")}
        if own_filter != other_filter or not lists["filter_list"]:
            found["filter"] = f"that of {self.variant}"
        if (own, self.average) != (other, published.average) or not lists["metric_list"]:
            found["metric"] = f"{own} over {self.average} for {other} over {published.average}"
        if self.settings.that_matter(self.kind) != published.settings.that_matter(self.kind):
            found["settings"] = f"those of {self.variant}"
        lasting = published.measured_with.differs if published.measured_with else {}
        return {**found, **lasting, **published.differs}


@cache
def names() -> tuple[str, ...]:
    """Every recipe there is."""
    return tuple(sorted(path.stem for path in FOLDER.glob("[!_]*.yaml")))


def find(name: str) -> Recipe:
    """The recipe called `name`, `name.variant`, or `base_name`; raises `ConfigError` with the nearest name."""
    stem, _, variant = name.partition(".")
    if stem not in names():
        stem = f"base_{stem}"
    if stem not in names():
        raise ConfigError(f"there is no recipe {name!r}{nearest(name.partition('.')[0], list(names()))}")
    recipe = read(FOLDER / f"{stem}.yaml")
    return recipe.of(variant or recipe.variant)


def read(path: Path) -> Recipe:
    """The recipe in a file, over what it shares with others (`include`, a file of this folder); raises `ConfigError` for
    one that is none.
    """
    values = read_yaml(path)
    if "include" in values:
        shared = read_yaml(FOLDER / str(values.pop("include")))
        variants = {**shared.get("variants", {}), **values.get("variants", {})}
        values = {**shared, **values, "variants": variants}
    return Recipe.parse({"name": path.stem, **values}, path.name)


def exists(name: str) -> bool:
    """Whether `find` would find a recipe."""
    stem = name.partition(".")[0]
    return stem in names() or f"base_{stem}" in names()


class Column(SettingsBlock):
    """One column of a published table and the figures given for it, in percent."""

    column: str
    recipe: str
    figures: dict[str, float]  # variant -> figure
    tokens_per_forward: dict[str, float] = Field(default_factory=dict)  # variant -> as published beside it


class Table(SettingsBlock):
    """One published table: for which model, from which sources."""

    title: str
    model: str
    sources: dict[str, str]  # variant -> where its figures stand
    variant: str = ""  # that is measured where nobody says which; else each recipe's own
    columns: tuple[Column, ...]


@cache
def tables() -> dict[str, Table]:
    """The published tables by short name (figures.yaml is the only place with their numbers)."""
    path = FOLDER.parent / "figures.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: Table.parse(value, f"{path.name}: {name}") for name, value in values.items()}


def table(name: str) -> Table:
    """The published table called `name`, or `name.source`: the columns that a variant repeats as that source measured
    them. Raises `ConfigError` with the nearest name."""
    stem, _, source = name.partition(".")
    if stem not in tables():
        raise ConfigError(f"there is no table {stem!r}{nearest(stem, list(tables()))}")
    whole = tables()[stem]
    source = source or whole.variant
    if not source:
        return whole
    recipes = {column.recipe: find(column.recipe) for column in whole.columns}
    repeated = [c for c in whole.columns if source in (recipes[c.recipe].variant, *recipes[c.recipe].variants)]
    if not repeated:
        known = {variant for recipe in recipes.values() for variant in (recipe.variant, *recipe.variants)}
        raise ConfigError(f"no column of {stem} has a variant {source!r}{nearest(source, sorted(known))}")
    columns = tuple(c.model_copy(update={"recipe": f"{c.recipe}.{source}"}) for c in repeated)
    return whole.model_copy(update={"columns": columns})


class Figure(SettingsBlock):
    """A published figure, as a fraction: of which model, where it stands."""

    source: str
    value: float
    model: str
    where: str
    tokens_per_forward: float | None = None


def figures(recipe: str) -> list[Figure]:
    """Published figures for a recipe; empty where nothing is published."""
    return [
        Figure(
            source=source,
            value=value / 100,
            model=each.title,
            where=each.sources[source],
            tokens_per_forward=column.tokens_per_forward.get(source),
        )
        for each in tables().values()
        for column in each.columns
        if column.recipe == recipe
        for source, value in column.figures.items()
    ]
