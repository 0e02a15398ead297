"""Registered versions made and pointed to; a registry that was lost, filled again from its receipts."""

import getpass
import importlib.metadata
import json
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from tasks.folders import PATIENCE, sqlite_file
from tasks.project import Project
from tasks.record.registry import Version, client, is_lost, receipts, store_folder, write_receipt
from tasks.record.runs import RunFolder
from tasks.record.tracking import Sender, send_pending

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "mlflow")


def make_version(project: Project, receipt: dict[str, Any]) -> Version:
    """A new version that points to stored weights; nothing is copied but a note of some 30 KB."""
    talk, digest = client(project), receipt["hash"]
    import mlflow

    config = {"path": str(store_folder(project, digest)), "hash": digest, "sampling": receipt["sampling"]}
    # Receipts of old have none of these.
    config |= {"device": receipt.get("device", "auto"), "bits": receipt.get("bits"), "usage": receipt.get("usage", {})}
    run_id = _mlflow_run(project, receipt["tags"])
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("mlflow_model.py")),
            model_config=config,
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES],
            registered_model_name=receipt["name"],
        )
    number = str(logged.registered_model_version)
    tags = {**receipt["tags"], "content_hash": digest}
    for key, value in tags.items():
        talk.set_model_version_tag(receipt["name"], number, key, value)
    return Version(receipt["name"], number, digest, tags)


def point(project: Project, version: Version, alias: str, why: str) -> None:
    """Set an alias, with a record of who, when and why."""
    client(project).set_registered_model_alias(version.name, alias, version.number)
    if alias in version.aliases:
        return
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record = {"alias": alias, "hash": version.hash, "why": why, "who": getpass.getuser(), "when": when}
    write_receipt(project, {"event": "alias", "name": version.name, **record})
    client(project).set_model_version_tag(
        version.name, version.number, f"{alias}.record", json.dumps(record, sort_keys=True)
    )


def register_lost(project: Project, name: str) -> bool:
    """Fill a lost registry from the receipts: versions in their order, then the aliases as they last were.

    False, and nothing done, where MLflow knows the model, or no receipt does.
    """
    if not is_lost(project, name):
        return False
    print(f"the registry has lost model {name!r}; registering it anew from {project.store / 'receipts.jsonl'}")
    made: dict[str, Version] = {}
    aliases: dict[str, str] = {}
    for receipt in (r for r in receipts(project) if r["name"] == name):
        if receipt["event"] == "alias":
            aliases[receipt["alias"]] = receipt["hash"]
        elif receipt["hash"] not in made and store_folder(project, receipt["hash"]).is_dir():
            made[receipt["hash"]] = make_version(project, receipt)
    for alias, digest in aliases.items():
        if digest in made:
            client(project).set_registered_model_alias(name, alias, made[digest].number)
    return True


def restore(project: Project) -> list[str]:
    """Register anew what the registry has lost and send MLflow all runs again; returns the names of these models."""
    names = dict.fromkeys(receipt["name"] for receipt in receipts(project))
    lost = [name for name in names if register_lost(project, name)]
    send_pending(project, again=True)
    return lost


def restore_if_empty(project: Project) -> None:
    """Send what MLflow does not have, and fill an empty database again; costs nothing when all is there."""
    if os.environ.get("LLADAFLOW_TRACKING") == "off":
        return
    if next(receipts(project), None) is not None and _database_is_empty(project):
        restore(project)
    else:
        send_pending(project)


def _database_is_empty(project: Project) -> bool:
    path = sqlite_file(project.tracking_uri)
    if path is None:
        return False
    if not path.exists():
        return True
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE)) as database:
        try:
            return not database.execute("select 1 from model_versions limit 1").fetchall()
        except sqlite3.OperationalError as error:
            return "no such table" in str(error)  # one that is locked may hold everything


def _mlflow_run(project: Project, tags: dict[str, str]) -> str | None:
    """The MLflow run of the stage that made the weights; None when its run folder is gone."""
    for key in json.loads(tags["stage_runs"]).values():
        run = RunFolder(project.runs / key)
        if (run.path / "request.json").exists():
            return Sender(run).send()
    return None
