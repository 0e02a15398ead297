"""Runs from a terminal: `llada run`, `plan`, `status`, `runs`, `logs`, `cancel`, `accept`, `gc`, `lineage`, `restore`, `doctor`, ...

Thin over tasks; knows no stage. Heavy packages are imported inside the commands that need them.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cli.options import Json, said_to
from llada_core.settings import ConfigError
from tasks.errors import StageError

Overrides = Annotated[list[str], typer.Option("-S", "--set", help="block.key=value, put over the profile; repeatable")]
Profile = Annotated[str | None, typer.Argument(help="a file of profiles/ by name, or any YAML file; none: params.yaml")]
Run = Annotated[str, typer.Argument(help="a run's key, the beginning of it, or a stage's name (its newest run)")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]


def run(
    profile: Profile = None,
    overrides: Overrides = [],  # noqa: B006 (typer's way; never changed)
    upto: Annotated[str | None, typer.Option(help="stop after this stage")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="go on in the background, also when the terminal closes")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Run the pipeline: params.yaml in place, a profile (or overrides) in its own workspace. Resumes what was cut."""
    from tasks.launch.program import STDERR, reproduce, results, summary
    from tasks.launch.workspace import open_workspace
    from tasks.project import Project

    if yes:
        os.environ["LLADAFLOW_YES"] = "1"
    workspace = open_workspace(Project.at(), profile, overrides)
    if detach:
        _detach(workspace.root, as_json)
        return
    with said_to(as_json):
        reproduce(workspace, [upto] if upto else [], STDERR if as_json else None)
    print(json.dumps(results(workspace)) if as_json else summary(workspace))


def _detach(folder: Path, as_json: bool) -> None:
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--detach", "--json")]
    log = folder / "runs" / "pipeline.log" if (folder / "runs").exists() else folder / "pipeline.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", *arguments],
            env=os.environ | {"LLADAFLOW_YES": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    if as_json:
        print(json.dumps({"workspace": str(folder), "process": process.pid, "log": str(log)}))
        return
    print(f"process {process.pid} goes on; log: {log}; `llada status` and `llada logs -f STAGE` show its runs")


def plan(
    profile: Profile = None,
    stage: Annotated[str | None, typer.Option(help="only the script of this stage's job, in its run folder")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="A100-40, A100, H100, H200, or memory as 24GB; none: launch.gpu, else this machine if it has no GPU"
        ),
    ] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="share of the GPU's peak that training reaches")] = 0.4,
    overrides: Overrides = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """What a run would need and how it would run: memory of a GPU, disk, time, commands. Starts and fetches nothing."""
    from llada_core.settings import read_yaml, with_overrides
    from tasks.launch.plan import figures, place_of, refuse, script_of, told
    from tasks.launch.workspace import profile_file
    from tasks.project import Params, Project
    from tasks.stages import TRAINING_STAGES

    if stage is not None:
        if as_json:
            raise ConfigError("--stage shows a script; leave out --json")
        _show_script(stage, profile, overrides)
        return
    values = with_overrides(read_yaml(profile_file(Project.at(), profile)), overrides)
    params = Params.parse(values, profile or "params.yaml")
    planned = []
    for name in (s for s in params.stages if s in TRAINING_STAGES):
        asked = gpu or place_of(params, name)
        if as_json:
            planned.append(figures(params, name, asked, mfu) | {"script": script_of(params, name)})
            refuse(params, name, asked)
            continue
        print(told(params, name, asked, mfu))
        refuse(params, name, asked)
        print(f"\n{script_of(params, name)}\n")
    if as_json:
        print(json.dumps({"profile": params.name, "stages": planned}))


def _show_script(stage: str, profile: str | None, overrides: list[str]) -> None:
    from tasks.graph import load_stage
    from tasks.launch.launcher import launcher_for
    from tasks.launch.workspace import open_workspace, with_sources
    from tasks.project import Params, Project
    from tasks.record.runs import open_run, stage_params

    workspace = open_workspace(Project.at(), profile, overrides)
    print(f"in {workspace.root}")
    params = with_sources(stage_params(workspace, []), workspace)
    made = open_run(workspace, load_stage(workspace, stage, params), params)
    launch = Params.parse(params, "params.yaml").launch.of(stage.partition("@")[0])
    print(f"run folder: {made.path} ({'already done' if made.succeeded else launch.kind})\n")
    if launch.kind != "inline":
        print(launcher_for(launch).script(made))


def runs(
    words: Annotated[list[str], typer.Argument(help="compare A B: two runs by key or stage; none: every run")] = [],  # noqa: B006
) -> None:
    """Every run, as `llada status` shows them; or `compare A B`: what differs between two, and where each ended."""
    if not words:
        status()
        return
    from tasks.project import Project
    from tasks.record.runs import compared, find_run

    if len(words) != 3 or words[0] != "compare":
        raise ConfigError(f"llada runs {' '.join(words)}: write llada runs, or llada runs compare A B")
    print(compared(*(find_run(Project.at(), name) for name in words[1:])))


def status(as_json: Annotated[bool, typer.Option("--json", help="one JSON object per run")] = False) -> None:
    """Every run: state, profile and overrides, begin, duration, job, step of total, loss, time left, size of checkpoints."""
    from tasks.launch.status import COLUMNS, facts_of, line_of
    from tasks.project import Project
    from tasks.record.runs import all_runs

    runs = all_runs(Project.at())
    if as_json:
        print("\n".join(json.dumps(facts_of(found)) for found in runs))
        return
    table = Table(*COLUMNS, box=None)
    for found in runs:
        table.add_row(*line_of(found))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def logs(
    name: Run, follow: Annotated[bool, typer.Option("-f", "--follow", help="until the run has ended")] = False
) -> None:
    """The log of a run."""
    from tasks.launch.jobs import LogReader
    from tasks.launch.status import state_of
    from tasks.project import Project
    from tasks.record.runs import find_run

    found = find_run(Project.at(), name)
    reader = LogReader(found, tail=None if follow else 1 << 20)
    reader.show()
    while follow and state_of(found) in ("running", "unknown"):
        time.sleep(0.5)
        reader.show()
    if follow and not found.succeeded:
        raise StageError(f"{found.key}: {state_of(found)}")


def cancel(name: Run) -> None:
    """End the job of a run; training saves itself first, and the next `llada run` goes on from there."""
    from tasks.launch.jobs import grace
    from tasks.launch.launcher import launcher_of
    from tasks.launch.status import state_of
    from tasks.project import Params, Project
    from tasks.record.runs import find_run

    found = find_run(Project.at(), name)
    if state_of(found) != "running":
        raise ConfigError(f"{found.key} is not running ({state_of(found)})")
    launch = Params.parse(found.request["all_params"], "request.json").launch
    launcher_of(found, launch).cancel(found, grace(found, launch))
    print(f"{found.key}: {state_of(found)}")


def accept(stages: Annotated[list[str], typer.Argument(help="stages whose outputs stay as they are")]) -> None:
    """Take outputs as still valid although code or parameters have changed (`dvc commit`): nothing is run again."""
    from tasks.launch.program import dvc, known
    from tasks.project import Project

    raise typer.Exit(dvc(Project.at(), "commit", "--force", *known(Project.at(), stages)))


def gc(yes: Yes = False) -> None:
    """What could be freed: checkpoints of finished runs, workspaces nobody works in, weights no version points to."""
    from tasks.launch.status import candidates, remove
    from tasks.project import Project

    found = candidates(Project.at())
    for item in found:
        print(f"{item.gigabytes:8.2f} GB  {item.path}  ({item.why})")
    if not found:
        print("nothing to free")
    elif yes or typer.confirm(f"free {sum(item.gigabytes for item in found):.2f} GB?"):
        remove(Project.at(), found)


def lineage(
    reference: Annotated[
        str, typer.Argument(help="NAME@alias, models:/NAME/3; or a folder or hash of data: what was made of it")
    ],
) -> None:
    """Where a registered version comes from: commit, dvc.lock, parameters, data, runs, jobs, environment."""
    from tasks.project import Project
    from tasks.record.registry import named, trained_on, version_of

    registered = named(reference)
    if registered is None and (reference.startswith("models:") or "@" in reference):
        raise ConfigError(f"{reference!r} names no version; write models:/NAME@alias or models:/NAME/3")
    if registered is None:
        found = trained_on(Project.at(), reference)
        for version in found:
            print(f"models:/{version.name}/{version.number}  {' '.join('@' + a for a in version.aliases)}")
        if not found:
            raise ConfigError(f"no registered version was made of {reference!r}; give a folder or the hash of one")
        return
    version = version_of(Project.at(), *registered)
    print(f"models:/{version.name}/{version.number}  {' '.join('@' + alias for alias in version.aliases)}")
    for key, value in sorted(version.tags.items()):
        shown = json.dumps(json.loads(value), indent=1) if value.startswith("{") else value
        print(f"{key}: {shown}")
    print("parameters, code and log of each stage:")
    for key in json.loads(version.tags["stage_runs"]).values():
        print(f"  {Project.at().runs / key}")


def promote(
    name: Annotated[str, typer.Argument(help="registered model")],
    version: Annotated[str, typer.Argument(help="number or alias")] = "candidate",
    why: Annotated[str, typer.Option(help="kept with the version")] = "promoted by hand",
) -> None:
    """Make a version champion, once its weights are verified."""
    from tasks.launch.trial import try_out
    from tasks.project import Project
    from tasks.work import register as promotion

    print(f"champion: version {promotion.promote(Project.at(), name, version, why, try_out).number}")


def rollback(
    name: Annotated[str, typer.Argument(help="registered model")],
    why: Annotated[str, typer.Option(help="kept with the version")] = "rolled back",
) -> None:
    """Give `champion` back to the version that held it before."""
    from tasks.launch.trial import try_out
    from tasks.project import Project
    from tasks.work import register as promotion

    print(f"champion: version {promotion.roll_back(Project.at(), name, why, try_out).number}")


def restore() -> None:
    """Register anew what the registry has lost, from store/receipts.jsonl, and send MLflow every run again."""
    from tasks.project import Project
    from tasks.record.versions import restore as restore_records

    lost = restore_records(Project.at())
    print(f"registered anew: {', '.join(lost)}" if lost else "the registry has lost no model")


def doctor(as_json: Json = False) -> None:
    """Is this machine (and its cluster) fit: each finding with its remedy; exit status 1 if something is missing."""
    from flows.pipeline import require_prefect
    from tasks.folders import NoDatabaseError
    from tasks.launch.doctor import Finding, findings, with_remedy
    from tasks.project import Project

    with said_to(as_json):
        found = list(findings(Project.at()))
        try:
            found.append(Finding(True, require_prefect()))
        except NoDatabaseError as error:
            found.append(with_remedy(error))
    fit = all(finding.fine for finding in found)
    if as_json:
        print(json.dumps({"fit": fit, "findings": [vars(finding) for finding in found]}))
    for finding in [] if as_json else found:
        print(f"{'ok  ' if finding.fine else 'BAD '} {finding.what}" + ("" if finding.fine else f"; {finding.remedy}"))
    raise typer.Exit(0 if fit else 1)


OF_A_PROJECT = (run, status, runs, logs, cancel, accept, gc, restore)
COMMANDS = (run, plan, status, runs, logs, cancel, accept, gc, lineage, promote, rollback, restore, doctor)
