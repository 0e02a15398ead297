"""What is asked of a stage: all that determines its result, which names its run, and what is free to change meanwhile.

Knows dvc.yaml's stages and the configuration; does not know run folders, jobs or what a stage does.
"""

import os
from pathlib import Path
from typing import Any

from llada_core.config.params import TRAINING_STAGES, Params
from llada_core.settings import flat
from llada_core.training.params import TrainingParams
from tasks.folders import content_hash, files_in, hash_of, home
from tasks.graph import CODE, Stage, chosen

FINGERPRINT_DIGITS = 16
DETERMINING = ("stage", "settings", "code", "inputs")
Request = dict[str, Any]
"""The content of request.json."""


def request_of(root: Path, stage: Stage, params: dict[str, Any]) -> Request:
    """What `stage` would make now: hashes of the code that runs and of the inputs, the settings, and their origin.

    `settings` determine the result. They are told with their defaults, so that one spelled out is the same one.
    `free` are those that the configuration marks `FREE`; `params` are both, as a person wrote them.
    """
    files = [file for path in stage.code for file in files_in(root / path)]
    parsed = Params.parse(params, "params.yaml")
    determining = parsed.determining()
    settings = chosen(determining, stage)
    told = flat(chosen(parsed.model_dump(mode="json", by_alias=True), stage))
    source = hash_of([content_hash(root / package) for package in sorted(CODE)])
    pipeline = {key: value for key, value in determining.items() if key != "launch"}
    request = {
        "stage": stage.name,
        "settings": settings,
        "free": {key: value for key, value in told.items() if key not in flat(settings)},
        "params": chosen(params, stage),
        "code": {file.relative_to(root).as_posix(): content_hash(file) for file in files},
        "inputs": {path: content_hash(root / path) for path in stage.inputs},
        "outs": list(stage.outs),
        "root": str(root.resolve()),
        "home": str(home(root).resolve()),
        "source": source,
        "pipeline": hash_of([pipeline, source])[:FINGERPRINT_DIGITS],
        "all_params": params,
    }
    return request | {"any_length": fingerprint(_of_any_length(request))}


def fingerprint(request: Request) -> str:
    """The name of a result: 16 hex digits. Where an input from outside the project lies does not enter."""
    inputs = [["" if os.path.isabs(path) else path, digest] for path, digest in sorted(request["inputs"].items())]
    settings = dict(request["settings"])
    if models := settings.get("evaluate.models"):  # a label stands in tables; what it labels is told by its content
        named = [name.partition("=") for name in models]
        settings["evaluate.models"] = [[label, request["inputs"].get(folder, "")] for label, _, folder in named]
    values = {key: request[key] for key in DETERMINING} | {"settings": settings, "inputs": sorted(inputs)}
    return hash_of(values)[:FINGERPRINT_DIGITS]


def training_block(request: Request) -> dict[str, Any] | None:
    """The settings of a training stage; None for any other stage."""
    block = request["settings"].get(request["stage"])
    return block if request["stage"] in TRAINING_STAGES and isinstance(block, dict) else None


def with_block(request: Request, block: dict[str, Any]) -> Request:
    """The request of a training stage with other settings."""
    return request | {"settings": request["settings"] | {request["stage"]: block}}


def _of_any_length(request: Request) -> Request:
    """A request with nothing in it that says how long training is: the same for all that are one run, cut or extended."""
    block = training_block(request)
    if block is None:
        return request
    receipt = f"models/{block['flops_of']}/training.json"  # read for its FLOPs alone
    inputs = {path: digest for path, digest in request["inputs"].items() if path != receipt}
    fixed = {key: value for key, value in block.items() if key not in (*TrainingParams.LENGTH, "extend")}
    return with_block(request, fixed) | {"inputs": inputs}


def changed_settings(new: Request, old: Request) -> list[str]:
    """The free settings that `new` asks for and `old` did not, a short text each."""
    now, then = new["free"], old.get("free", {})
    return [f"{key}: {then.get(key)} -> {now[key]}" for key in sorted(now) if now[key] != then.get(key)]


def differences(new: Request, old: Request) -> list[str]:
    """What determines `new` and is not as it was for `old`, a short line each."""
    lines = []
    for part, one in (("settings", "setting"), ("code", "code"), ("inputs", "input")):
        now, then = flat(new[part]), flat(old.get(part, {}))
        for key in sorted(now.keys() | then.keys()):
            if now.get(key) != then.get(key):
                values = f": {then.get(key)} -> {now.get(key)}" if part == "settings" else ""
                lines.append(f"{one} {key}{values}")
    return lines
