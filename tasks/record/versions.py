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
from tasks.record.registry import Version, client, is_lost, receipts, store_folder, tracking_uri, write_receipt
from tasks.record.runs import RunFolder, home
from tasks.record.tracking import Sender, send_pending

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "mlflow")


def make_version(root: Path, receipt: dict[str, Any]) -> Version:
    """A new version that points to stored weights; nothing is copied but a note of some 30 KB."""
    talk, digest = client(root), receipt["hash"]
    import mlflow

    config = {"path": str(store_folder(root, digest)), "hash": digest, "sampling": receipt["sampling"]}
    # Receipts of old have none of these.
    config |= {"device": receipt.get("device", "auto"), "bits": receipt.get("bits"), "usage": receipt.get("usage", {})}
    run_id = _mlflow_run(root, receipt["tags"])
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


def point(root: Path, version: Version, alias: str, why: str) -> None:
    """Set an alias, with a record of who, when and why."""
    client(root).set_registered_model_alias(version.name, alias, version.number)
    if alias in version.aliases:
        return
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record = {"alias": alias, "hash": version.hash, "why": why, "who": getpass.getuser(), "when": when}
    write_receipt(root, {"event": "alias", "name": version.name, **record})
    client(root).set_model_version_tag(
        version.name, version.number, f"{alias}.record", json.dumps(record, sort_keys=True)
    )


def register_lost(root: Path, name: str) -> bool:
    """Fill a lost registry from the receipts: versions in their order, then the aliases as they last were.

    False, and nothing done, where MLflow knows the model, or no receipt does.
    """
    if not is_lost(root, name):
        return False
    print(f"the registry has lost model {name!r}; registering it anew from {home(root) / 'store' / 'receipts.jsonl'}")
    made: dict[str, Version] = {}
    aliases: dict[str, str] = {}
    for receipt in (r for r in receipts(root) if r["name"] == name):
        if receipt["event"] == "alias":
            aliases[receipt["alias"]] = receipt["hash"]
        elif receipt["hash"] not in made and store_folder(root, receipt["hash"]).is_dir():
            made[receipt["hash"]] = make_version(root, receipt)
    for alias, digest in aliases.items():
        if digest in made:
            client(root).set_registered_model_alias(name, alias, made[digest].number)
    return True


def restore(root: Path) -> list[str]:
    """Register anew what the registry has lost and send MLflow all runs again; returns the names of these models."""
    names = dict.fromkeys(receipt["name"] for receipt in receipts(root))
    lost = [name for name in names if register_lost(root, name)]
    send_pending(root, again=True)
    return lost


def restore_if_empty(root: Path) -> None:
    """Send what MLflow does not have, and fill an empty database again; costs nothing when all is there."""
    if os.environ.get("LLADAFLOW_TRACKING") == "off":
        return
    if next(receipts(root), None) is not None and _database_is_empty(root):
        restore(root)
    else:
        send_pending(root)


def _database_is_empty(root: Path) -> bool:
    path = sqlite_file(tracking_uri(root))
    if path is None:
        return False
    if not path.exists():
        return True
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE)) as database:
        try:
            return not database.execute("select 1 from model_versions limit 1").fetchall()
        except sqlite3.OperationalError as error:
            return "no such table" in str(error)  # one that is locked may hold everything


def _mlflow_run(root: Path, tags: dict[str, str]) -> str | None:
    """The MLflow run of the stage that made the weights; None when its run folder is gone."""
    for key in json.loads(tags["stage_runs"]).values():
        run = RunFolder(home(root) / "runs" / key)
        if (run.path / "request.json").exists():
            return Sender(run).send()
    return None
