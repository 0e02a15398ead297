"""Move the alias `champion` by a person's decision, or back to the model that held it before; both leave a record."""

from pathlib import Path

from llada_core.config.params import Params
from llada_core.settings import ConfigError
from tasks.gate import Decision
from tasks.register import CHAMPION, champion_among, judge, point
from tasks.registry import Version, receipts, require_weights, verified, version_of, versions
from tasks.trial import try_out


def gate(root: Path, name: str, which: str) -> Decision:
    """What the gate of params.yaml says of a version against the present champion."""
    params = Params.load(root / "params.yaml")
    if params.register_ is None or params.register_.name != name:
        raise ConfigError(
            f"params.yaml has no gate for model {name!r}; promote without it (`llada promote`, gated=false)"
        )
    return judge(root, params, version_of(root, name, which), champion_among(versions(root, name)))


def promote(root: Path, name: str, which: str, why: str) -> Version:
    """Make a version (number or alias) champion, once its weights are verified and it has answered a question."""
    version = version_of(root, name, which)
    require_weights(verified(root, version.hash))
    try_out(root, version)
    point(root, version, CHAMPION, why)
    return version


def roll_back(root: Path, name: str, why: str = "rolled back") -> Version:
    """Give the alias back to the last champion before the present one; raises `ConfigError` when there was none."""
    present = version_of(root, name, CHAMPION)
    held = [r["hash"] for r in receipts(root) if r["name"] == name and r.get("alias") == CHAMPION]
    before = next((digest for digest in reversed(held) if digest != present.hash), None)
    version = next((v for v in versions(root, name) if v.hash == before), None)
    if version is None:
        raise ConfigError(f"model {name!r} had no champion before version {present.number}")
    return promote(root, name, version.number, why)
