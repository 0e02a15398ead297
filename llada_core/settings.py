"""What every block of settings is: frozen, closed to unknown keys, told in one line; and settings as dotted keys."""

import difflib
import gc
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator


class ConfigError(ValueError):
    """A user's mistake in a configuration, told in one line."""


class _Free:
    """What `NOT_IN_FINGERPRINT` is."""


# Marks a setting (`Annotated[int, NOT_IN_FINGERPRINT]`) that says how fast, where or how often, and never what is computed (beyond the
# order of sums). A run may go on with another value, and a result does not have another name for it.
NOT_IN_FINGERPRINT = _Free()


class SettingsBlock(BaseModel):
    """A frozen set of named values; unknown keys are refused with the nearest valid one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def determining(self) -> dict[str, Any]:
        """The values, as JSON, that a result depends on: defaults filled in, settings marked `NOT_IN_FINGERPRINT` left out."""
        return self.model_dump(mode="json", by_alias=True, exclude=free_settings(type(self)))

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """The block built from `values` as YAML gives them; raises `ConfigError`, whose text starts with `where`."""
        try:
            return cls.model_validate(values, strict=False)
        except ValidationError as error:
            raise ConfigError("; ".join(f"{where}: {explain(cls, e)}" for e in error.errors())) from None


Kind = Literal["choice", "switch", "integer", "number", "list", "text"]
KINDS: dict[str, Kind] = {
    "boolean": "switch",
    "integer": "integer",
    "number": "number",
    "array": "list",
    "string": "text",
}


@dataclass(frozen=True)
class SettingInfo:
    """One setting as a person meets it; `low` and `high` are None without a limit, `optional` ones may be left empty."""

    name: str
    description: str
    kind: Kind
    default: Any
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False


def describe(block: type[Any]) -> dict[str, SettingInfo]:
    """Name -> what the field says of itself (`Field(description=...)`, type, limits), in the order of the fields.

    The one description that the page's panel, `--help` and the docs show. `block` has flat fields: numbers, texts,
    switches, lists of numbers, or one of these and None.
    """
    found = {}
    for name, schema in TypeAdapter(block).json_schema()["properties"].items():
        parts = schema.get("anyOf", [schema])
        inner = next(part for part in parts if part.get("type") != "null")
        found[name] = SettingInfo(
            name,
            schema.get("description", ""),
            "choice" if "enum" in inner else KINDS[inner["type"]],
            schema.get("default"),
            low=inner.get("minimum", inner.get("exclusiveMinimum")),
            high=inner.get("maximum", inner.get("exclusiveMaximum")),
            choices=tuple(inner.get("enum", ())),
            optional=len(parts) > 1,
        )
    return found


def free_settings(block: type[BaseModel]) -> dict[str, Any]:
    """The settings marked `NOT_IN_FINGERPRINT`, as pydantic's `exclude` names them: name -> True, or those of the block below."""
    found: dict[str, Any] = {}
    for name, field in block.__pydantic_fields__.items():
        inner = _block_in(field.annotation)
        if NOT_IN_FINGERPRINT in field.metadata:
            found[name] = True
        elif isinstance(inner, type) and issubclass(inner, BaseModel) and (below := free_settings(inner)):
            found[name] = below
    return found


def explain(block: type[Any], error: Any) -> str:
    """One error of pydantic in one line; `block` is the model or the pydantic dataclass that refuses the values."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        _, _, last = key.rpartition(".")
        return f"unknown key {key!r}{nearest(last, _keys_at(block, error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"the key {key!r} is missing"
    reason = error["msg"].removeprefix("Value error, ")
    return f"{key or block.__name__}: {reason}" + (
        "" if error["type"] == "value_error" else f" (got {error['input']!r})"
    )


def _keys_at(block: type[Any], path: tuple[str | int, ...]) -> list[str]:
    """The keys of the block found by following `path` from `block`."""
    for part in path:
        field = _by_key(block).get(str(part))
        inner = None if field is None else _block_in(field.annotation)
        if inner is not None:
            block = inner
    return list(_by_key(block))


def _by_key(block: type[Any]) -> dict[str, Any]:
    """The fields of a block as people write them, who do not know that one is called otherwise in the code."""
    return {field.alias or name: field for name, field in block.__pydantic_fields__.items()}


def _block_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation)):
        return annotation  # a pydantic dataclass names its fields as a model does
    return next((b for a in getattr(annotation, "__args__", ()) if (b := _block_in(a)) is not None), None)


def nearest(word: str, allowed: list[str]) -> str:
    """How an error ends: the nearest allowed word, or the list of all of them."""
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(sorted(allowed))}"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises `ConfigError` with file and line if there is none."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"{path}, line {line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:  # a control character, the NULs of a power cut: it has no mark
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of blocks, got {type(values).__name__}")
    return values


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one level of dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def with_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `values` with `block.key=value` texts applied; each value is read as YAML."""
    result = yaml.safe_load(yaml.safe_dump(values))
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"override {text!r}: write it as block.key=value")
        *parents, last = path.split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"override {text!r}: {parent!r} is not a block")
        target[last] = _number_or_yaml(value)
    return result


def _number_or_yaml(text: str) -> Any:
    """YAML 1.1 reads 2e-5 as a string; a person means the number."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


DEVICES = "auto, cuda, cuda:N, mps, cpu"  # where a model may lie


DEVICE_SETTING = "LLADAFLOW_DEVICE"  # what "auto" means in a process and its children, if not the best there is


Bits = Literal[4, 8]  # of a quantised weight
# Of a likelihood, see `llada_core.likelihood`; here, so that settings know them without torch.
Estimator = Literal["auto", "stock", "antithetic", "exact", "confidence"]


class NoiseParams(SettingsBlock):
    """The forward process (LLaDA, arXiv:2502.09992, eq. 3): t = epsilon + (highest - epsilon) u, mask probability 1 - alpha(t)."""

    schedule: Literal["linear", "cosine"] = "linear"
    epsilon: float = Field(default=1e-3, gt=0, lt=1)  # the lowest time
    # The highest. Settings that came after runs were made are left out where they have their default: so those keep
    # their names and checkpoints.
    highest: float = Field(default=1.0, gt=0, le=1, exclude_if=lambda value: value == 1.0)
    weight: Literal["elbo", "uniform"] = "elbo"  # elbo: -alpha'(t) / (1 - alpha(t)); uniform: 1
    stratified: bool = True  # spread the times of one global batch evenly (unbiased, less variance)

    @model_validator(mode="after")
    def _an_interval(self) -> Self:
        if self.epsilon >= self.highest:
            raise ValueError(f"noise.epsilon {self.epsilon} is the lowest time and highest {self.highest} the highest")
        return self


def require_package(name: str, extra: str, what: str) -> None:
    """Raises `ConfigError` with the command that installs the package `name`, unless it is there; `what` needs it."""
    if find_spec(name) is None:
        raise ConfigError(f"{what} needs the package {name}: pip install 'lladaflow[{extra}]'")


@contextmanager
def while_imported() -> Iterator[None]:
    """While it lasts, the cycle collector waits: modules stay, and it would walk over them again and again."""
    collecting = gc.isenabled()
    gc.disable()  # a fifth of the processor's time that torch, transformers and what uses them take
    try:
        yield
    finally:
        # Nor do later collections look at what stays. Once: a process that has worked may have let go of a model that only
        # the collector can free, and what is frozen it never frees.
        if not gc.get_freeze_count():
            gc.freeze()
        if collecting:
            gc.enable()


def function_at(path: str, what: str) -> Callable[..., Any]:
    """The function at a dotted path, which may lie in the working directory, or of a file, as `./my_maps.py:function`.

    `what` opens the error's text.
    """
    file, colon, name = path.rpartition(":")
    if colon:
        return _function_in(_module_of(Path(file).expanduser(), f"{what} {path!r}"), name, f"{what} {path!r}: {file}")
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ConfigError(f"{what} {path!r}: write it as ./file.py:function or package.module.function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        ways = "a function of a file of your own is written ./my_file.py:function"
        raise ConfigError(f"{what} {path!r}: no module named {error.name!r}; {ways}") from None
    return _function_in(module, name, f"{what} {path!r}: {module_name}")


def _module_of(file: Path, what: str) -> ModuleType:
    """A file of one's own as a module, run once for what it holds; raises `ConfigError` that names the line at fault."""
    if not file.is_file():
        raise ConfigError(f"{what}: there is no file {file} in {Path.cwd()}")
    digest = hashlib.sha256(str(file.resolve()).encode() + b"\0" + file.read_bytes()).hexdigest()
    name = f"{file.stem}_{digest[:16]}"
    spec = spec_from_file_location(name, file)
    if name in sys.modules or spec is None or spec.loader is None:
        return sys.modules[name]
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        line = getattr(error, "lineno", None) or getattr(
            error.__traceback__ and error.__traceback__.tb_next, "tb_lineno", "?"
        )
        raise ConfigError(
            f"{what}: {file} cannot be imported: {type(error).__name__}: {error} (line {line})"
        ) from error
    return module


def _function_in(module: ModuleType, name: str, what: str) -> Callable[..., Any]:
    found = vars(module).get(name)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{what} has no function {name!r}{nearest(name, functions)}")
    function: Callable[..., Any] = found
    return function
