"""The trial before a version becomes champion: loaded from where it is registered, it answers a question, in a job that is
launched as evaluations are, since the process that registers may lie on a machine that could not load it.

`python -m tasks.trial` is what runs inside the job.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from llada_core.sampling.params import SamplingParams, as_values
from tasks.errors import StageError
from tasks.folders import content_hash, hash_of, read_json, write_json
from tasks.graph import CODE
from tasks.launch.jobs import attach_or_submit, follow
from tasks.launch.program import run_inline
from tasks.project import LaunchParams, Params, Project, RegisterParams
from tasks.record.registry import Version, settings_of, store_folder, verified
from tasks.record.runs import RunFolder, StageContext, copy_code, stage_params

STAGE = "trial"
QUESTION = [{"role": "user", "content": "Hello"}]
FAILURES = (ValueError, OSError, RuntimeError)  # of a model that does not load or answer, in this process


def try_out(project: Project, version: Version) -> None:
    """Have a version loaded from the store, with the settings it was registered with, and asked a question.

    Raises `StageError` with the reason when it does not answer; no alias has moved then.
    """
    verified(project, version.hash)
    run = _folder(project, version)
    launch = _for_one_process(Params.parse(run.request["all_params"], run.key).launch.of("evaluate"))
    print(f"{version.name} version {version.number} is tried before it becomes champion", flush=True)
    try:
        if launch.kind == "inline":
            run_inline(run, answer, again=True)
        else:
            follow(run, attach_or_submit(run, launch, again=True), launch)
    except FAILURES as error:
        reason = _last_error(run, launch) or " ".join(str(error).split())
        told = f"{version.name} version {version.number} does not become champion, it does not answer: {reason}"
        remedy = f"`llada logs {run.key}` tells more, the same command tries again"
        raise StageError(f"{told}; {remedy}", getattr(error, "status", None)) from error


def answer(work: StageContext) -> None:
    """What the job does. Raises ValueError or OSError for a model that does not load or computes no numbers."""
    import torch

    from llada_core.modeling import load_to_answer
    from llada_core.sampling import generate
    from llada_core.tokenizer import Tokenizer

    asked = work.run.request
    folder, settings = Path(asked["folder"]), asked["settings"]
    if content_hash(folder) != folder.name:
        raise ValueError(f"{folder} was altered: its files no longer have the registered hash")
    model = load_to_answer(folder, device=settings["device"], bits=settings["bits"])
    tokenizer = Tokenizer.load(folder)
    spoken = isinstance(tokenizer.fast.chat_template, str)
    prompt = tokenizer.chat_ids(QUESTION) if spoken else tokenizer.encode(QUESTION[0]["content"])
    canvas = torch.tensor([[*prompt, tokenizer.special.mask_id]], device=model.device)
    with torch.inference_mode():
        numbers = bool(torch.isfinite(model(canvas).logits).all())
    if not numbers:
        raise ValueError(f"{folder}: the model computes no numbers (NaN or infinite logits)")
    reply = generate(model, [prompt], SamplingParams(**settings["sampling"])).answers[0].tolist()
    print(f"asked {QUESTION[0]['content']!r}, it answers {tokenizer.answer_text(reply)!r}", flush=True)


def _folder(project: Project, version: Version) -> RunFolder:
    """The run folder of a version's trial by the code that runs now, with a snapshot of it."""
    own = settings_of(project, version)
    settings = {
        "sampling": own.get("sampling") or as_values(RegisterParams(name=version.name).sampling),
        "device": own.get("device") or "auto",
        "bits": own.get("bits"),
    }
    code = Path(__file__).resolve().parents[2]
    source = hash_of([content_hash(code / package) for package in sorted(CODE)])
    place = store_folder(project, version.hash)
    request = {"stage": STAGE, "settings": settings, "free": {}, "code": {}, "outs": [], "source": source}
    request |= {"inputs": {f"store/{version.hash}": version.hash}, "folder": str(place.resolve())}
    request |= {"params": {"register": version.name}, "root": str(project.root.resolve())}
    request["all_params"] = _params(project, version.name)
    run = RunFolder(project.runs / f"{STAGE}-{hash_of([version.hash, settings, source])[:16]}")
    run.path.mkdir(parents=True, exist_ok=True)
    with FileLock(run.path / ".lock"):
        if not run.tree.is_dir():
            fresh = run.path / "tree.new"
            shutil.rmtree(fresh, ignore_errors=True)
            copy_code(code, fresh)
            os.replace(fresh, run.tree)
        file = run.path / "request.json"
        if not file.exists() or read_json(file) != request:
            write_json(file, request)
    return run


def _params(project: Project, name: str) -> dict[str, Any]:
    """The project's parameters, or where a person promotes from a folder without any, the least there can be."""
    if (project.root / "params.yaml").exists():
        return stage_params(project, [])
    return {"name": name, "stages": ["register"], "register": {"name": name}}


def _for_one_process(launch: LaunchParams) -> LaunchParams:
    """Where and how evaluations run, but alone: one question is not shared."""
    single = {"processes": 1, "cpu_processes": 1, "shards": 1, "accelerate_config": None}
    return launch.model_copy(update=single | {"slurm": launch.slurm.model_copy(update={"nodes": 1})})


def _last_error(run: RunFolder, launch: LaunchParams) -> str:
    """The last error that the job has told of; empty if it ended without a word."""
    if launch.kind == "inline" or not run.log.exists():
        return ""
    log = run.log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.removeprefix("error: ") for line in log if line.startswith("error: ")]
    return said[-1] if said else ""
