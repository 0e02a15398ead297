"""Options that several commands share: the model, and the sampler's settings with their descriptions."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from llada_core.sampling.params import MODES, PRESETS, SamplingParams, changed, preset
from llada_core.settings import DEVICE_SETTING, DEVICES, ConfigError, describe
from tasks.errors import one_line_errors

MODEL_HELP = "a folder, models:/NAME@alias, or a Hub name; none: the champion of params.yaml"
Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
Device = Annotated[
    str, typer.Option(help=f"where the model lies: {DEVICES}; auto: GPUs if there are any", envvar=DEVICE_SETTING)
]
Bits = Annotated[int | None, typer.Option(help="weights of 4 or 8 bits, on a CUDA GPU; none: as stored")]
COMPILE_HELP = "off, graph (a step is one captured function) or max (minutes, fastest kernels)"
Compiled = Annotated[str, typer.Option("--compile", help=COMPILE_HELP)]
SETTINGS = describe(SamplingParams)
OWN_OPTION = ("max_new_tokens", "block_length", "steps", "temperature", "threshold", "cache", "sampler", "seed")
PRESET_HELP = f"{', '.join(PRESETS)}; of LLaDA2 also {', '.join(MODES)}; none: the settings that come with the model"
OTHERS = ", ".join(sorted(set(SETTINGS) - set(OWN_OPTION)))


Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout; all that is said goes to stderr")]


def said_to(as_json: bool) -> AbstractContextManager[object]:
    """While it lasts, what is printed goes to stderr where stdout is for JSON."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def _option(name: str) -> Any:
    return typer.Option(help=SETTINGS[name].description)


@dataclass(frozen=True)
class ModelOptions:
    """The options of every command that writes: which model, where it lies, and how it is sampled."""

    model: Model = ""
    preset: Annotated[str, typer.Option(help=PRESET_HELP)] = ""
    max_new_tokens: Annotated[int | None, _option("max_new_tokens")] = None
    block_length: Annotated[int | None, _option("block_length")] = None
    steps: Annotated[int | None, _option("steps")] = None
    temperature: Annotated[float | None, _option("temperature")] = None
    threshold: Annotated[float | None, _option("threshold")] = None
    cache: Annotated[str | None, _option("cache")] = None
    sampler: Annotated[str | None, _option("sampler")] = None
    seed: Annotated[int | None, _option("seed")] = None
    device: Device = "auto"
    bits: Bits = None
    others: Annotated[
        list[str] | None,
        typer.Option("-S", "--set", help=f"any sampler setting as name=value; repeatable: {OTHERS}"),
    ] = None

    def given(self) -> dict[str, Any]:
        """The sampler settings that were asked for, by name; raises ValueError for one without a value."""
        values = {name: getattr(self, name) for name in OWN_OPTION if getattr(self, name) is not None}
        for text in self.others or ():
            key, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"--set {text!r}: write it as name=value")
            values[key.strip()] = yaml.safe_load(value)
        return values


def with_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command(..., options: ModelOptions)` as typer reads it: each field of `ModelOptions` is an option of its own."""
    own = [p for p in signature(command).parameters.values() if p.annotation is not ModelOptions]
    shared = list(signature(ModelOptions).parameters.values())

    @wraps(command)
    def called(**values: Any) -> None:
        options = ModelOptions(**{option.name: values.pop(option.name) for option in shared})
        command(**values, options=options)

    called.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]
    return called


def in_project(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, refused with one line where there is no project for it to work on."""

    @wraps(command)
    def called(**values: Any) -> None:
        if not Path("dvc.yaml").is_file():
            raise ConfigError(
                f"{Path.cwd()} is no project, there is no dvc.yaml; go to one, or `llada init FOLDER` makes one"
            )
        command(**values)

    return called


def telling(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose expected errors end it with one line and their exit status: commands only raise."""

    @wraps(command)
    def called(**values: Any) -> None:
        with one_line_errors():
            command(**values)

    return called


def name_or_champion(name: str) -> str:
    """The name that was given, else that of the project's champion."""
    from tasks.project import Project
    from tasks.record.registry import champion_of

    return name or champion_of(Project.at())


def model_folder(name: str) -> Path:
    """The folder of a model, found before anything slow is imported; raises `ConfigError` or FileNotFoundError."""
    from llada_core.modeling.folder import is_adapter, require_folder
    from tasks.record.registry import resolve

    folder = resolve(name)
    if not is_adapter(folder):
        require_folder(folder, "config.json")
    return folder


def settings(base: SamplingParams, options: ModelOptions) -> SamplingParams:
    """The settings of a model, changed by a preset, then by what was given; a length alone moves what depends on it."""
    values = options.given()
    base = base.at_length(values.get("max_new_tokens", base.max_new_tokens))
    return changed(preset(options.preset, base) if options.preset else base, values)
