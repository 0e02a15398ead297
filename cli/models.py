"""Commands on models: diff, fetch, export, app, ui."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from cli.options import MODEL_HELP, name_or_champion
from llada_core.settings import ConfigError
from tasks.errors import require_port


def fetch(
    profile: Annotated[str, typer.Argument(help="a file of profiles/ by name, or any YAML file")],
    folder: Annotated[Path, typer.Argument(help="where to put it all")],
) -> None:
    """Bring all that a profile needs of the Hub into a folder: models, tokenizers, data sets, benchmarks.

    Elsewhere, without the Hub: HF_HOME=FOLDER HF_HUB_OFFLINE=1 llada run PROFILE
    """
    os.environ["HF_HOME"] = str(folder.resolve())  # read when the Hub's packages are first imported
    from tasks.launch.workspace import fetch as bring
    from tasks.launch.workspace import profile_file
    from tasks.project import Params, Project

    failed = bring(Params.load(profile_file(Project.at(), profile)), Project.at().home)
    print(f"with HF_HOME={folder.resolve()} HF_HUB_OFFLINE=1 all of it is found by its name")
    raise typer.Exit(1 if failed else 0)


def lm_eval(context: typer.Context) -> None:
    """lm-eval's own command line with our model registered: --model llada --tasks gsm8k --model_args pretrained=..."""
    from tasks.lm_eval import run

    run(context.args)


def diff(
    first: Annotated[str, typer.Argument(help="a model of reports/eval, or FOLDER:MODEL")],
    second: Annotated[str, typer.Argument(help="what it is compared with")],
) -> None:
    """Two measurements side by side: scores with a paired test, questions gained and lost, settings, code."""
    from tasks.work import measure as comparison

    print(comparison.told(comparison.diff(first, second)))


CARD = """---
library_name: {library}
license: apache-2.0
tags: [masked-diffusion, llada]
---
# {title}

{what}, exported from `{name}`.

    import llada_core
    model = llada_core.load_model("{folder}")

{facts}
"""
MODEL = "A masked-diffusion language model in the published LLaDA layout"


def export(
    folder: Annotated[Path, typer.Argument(help="the new folder")],
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = "",
    merge: Annotated[bool, typer.Option("--merge", help="add an adapter into the weights of its base model")] = False,
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it is there")] = False,
    push: Annotated[
        str, typer.Option(help="send it to the Hub as well, as OWNER/NAME (private until you open it)")
    ] = "",
) -> None:
    """Copy a model into a self-contained folder: weights in the published layout, tokenizer, model card."""
    from llada_core.files import written_whole
    from tasks.project import Project
    from tasks.record.model_usage import saved_usage
    from tasks.record.registry import resolve

    name = name_or_champion(model)
    source = resolve(name)
    library, what = exportable(source, merge=merge)
    if Path.cwd().is_relative_to(folder.resolve()):
        raise FileExistsError(f"{folder} is where this runs, and is not replaced; choose another name")
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} is there already; choose another name, or --overwrite")
    with written_whole(folder) as staging:
        if merge:
            merge_into(source, staging)
        else:
            shutil.copytree(source, staging, dirs_exist_ok=True)
        usage = saved_usage(Project.at(), name)
        if usage is not None:
            usage.save(staging)
        from app.card import as_markdown, describe
        from app.models import ModelIndex

        facts = as_markdown(describe(ModelIndex(Project.at()), name))
        text = CARD.format(library=library, title=folder.name, what=what, name=name, folder=folder.name, facts=facts)
        (staging / "README.md").write_text(text, encoding="utf-8")
    print(f"{name} is in {folder}")
    if push:
        from huggingface_hub import HfApi

        HfApi().create_repo(push, private=True, exist_ok=True)
        print(f"and at {HfApi().upload_folder(repo_id=push, folder_path=folder, commit_message=name)}")


def exportable(source: Path, *, merge: bool) -> tuple[str, str]:
    """The library that opens what would be exported, and what it is in words.

    Raises FileNotFoundError for a folder that holds no model, `ConfigError` where nothing can be merged, or where an
    adapter alone would name weights that only this project has.
    """
    from llada_core.modeling.folder import CONTENT, base_folder, base_name, is_adapter

    if not is_adapter(source):
        if not (source / "config.json").is_file():
            raise FileNotFoundError(f"{source}: no config.json there, so it is no model folder")
        if merge:
            raise ConfigError(f"{source} is a whole model, so there is no adapter to merge; leave out --merge")
        return "transformers", MODEL
    base = base_name(source)
    if merge:
        return "transformers", MODEL
    if base.startswith(CONTENT):
        raise ConfigError(
            f"{source} is an adapter of weights that only this project has ({base[:19]}...); --merge makes a model of both"
        )
    if at := base_folder(source):
        raise ConfigError(
            f"{source} is an adapter of {at.resolve()}, which nobody else has; --merge makes a model of both"
        )
    return f"peft\nbase_model: {base.partition('@')[0]}", f"An adapter of `{base}`"


def merge_into(source: Path, folder: Path) -> None:
    """Write what an adapter and its base compute together as one model, in the dtype of the base, with its tokenizer."""
    import torch

    from llada_core.modeling import load_model, save_model
    from llada_core.modeling.folder import model_folders
    from llada_core.tokenizer import Tokenizer

    parts = model_folders(source)
    spoken = next((part for part in parts if (part / "tokenizer_config.json").is_file()), source)
    save_model(load_model(source, device=torch.device("cpu")), folder, Tokenizer.load(spoken))
    for name in ("training.json", "usage.json"):
        if (source / name).is_file():
            shutil.copy2(source / name, folder)


def page(context: typer.Context) -> None:
    """Open the page on the registered champion (the options are those of `python -m app --help`)."""
    raise typer.Exit(subprocess.call([sys.executable, "-m", "app", *context.args]))


POOL = "lladaflow"  # as prefect.yaml names it


def deploy(api: str) -> str:
    """Have Prefect's server at an address of its API know what prefect.yaml holds; what it shows, in words."""
    prefect, env = [sys.executable, "-m", "prefect", "--no-prompt"], os.environ | {"PREFECT_API_URL": api}
    for words in (["work-pool", "create", POOL, "--type", "process", "--overwrite"], ["deploy", "--all"]):
        done = subprocess.run([*prefect, *words], env=env, capture_output=True, text=True)
        if done.returncode:
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            return f"  deployments are not made: prefect {' '.join(words)}: {' '.join(last)}"
    page = api.removesuffix("/api")
    return (
        f"  deployments of prefect.yaml: {page}/deployments\n"
        f"  a worker runs them: PREFECT_API_URL={api} prefect worker start --pool {POOL}"
    )


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def ui(
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="port of MLflow")] = 5000,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="port of Prefect")] = 4200,
) -> None:
    """MLflow (runs, models) and Prefect (flows, deployments) on this machine's loopback, until Ctrl-C."""
    from tasks.folders import sqlite_file
    from tasks.project import Project
    from tasks.record.registry import client, version_of
    from tasks.record.tracking import experiment_of

    project, records = Project.at(), None
    if sqlite_file(project.tracking_uri):
        records = client(project)  # its tables are there before a server, and a run beside it, look for them
    address = "127.0.0.1"
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    api = {
        "PREFECT_UI_API_URL": f"http://{address}:{prefect_port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    tracking = ["-m", "mlflow", "server", "--backend-store-uri", project.tracking_uri, "--workers", "1"]
    commands = [
        [sys.executable, *tracking, "--host", address, "--port", str(mlflow_port)],
        [sys.executable, "-m", "prefect", "server", "start", "--host", address, "--port", str(prefect_port)],
    ]
    for name, port in (("mlflow", mlflow_port), ("prefect", prefect_port)):
        require_port(address, port, f"--{name}-port")
    pages = [f"MLflow   http://{address}:{mlflow_port}"]
    if records is not None:
        pages.append(f"  runs   http://{address}:{mlflow_port}/#/experiments/{experiment_of(records, project)}/runs")
    with suppress(ConfigError):
        name = name_or_champion("").removeprefix("models:/").partition("@")[0]
        version_of(project, name, "champion")
        pages.append(f"  model  http://{address}:{mlflow_port}/#/models/{name}")
    flows = "runs of flows (deployments, python -m flows.pipeline); what llada run and dvc repro do is in MLflow alone"
    pages.append(f"Prefect  http://{address}:{prefect_port}  {flows}")
    print("\n".join([*pages, "Ctrl-C ends both"]), flush=True)
    started = [subprocess.Popen(command, env=os.environ | quiet | api, start_new_session=True) for command in commands]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        deployed = not Path("prefect.yaml").is_file()
        while all(process.poll() is None for process in started):
            if not deployed and _answers(f"{api['PREFECT_UI_API_URL']}/health"):
                print(deploy(api["PREFECT_UI_API_URL"]), flush=True)
                deployed = True
            time.sleep(0.5)
        raise ConfigError("one of the two servers has ended; its last words are above")
    except KeyboardInterrupt:
        print("both end", flush=True)
    finally:  # nothing is left behind, however this ends
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:  # a server in the middle of its start does not hear
                os.killpg(process.pid, signal.SIGKILL)
