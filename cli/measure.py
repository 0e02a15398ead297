"""The command eval: recipes or a published table, with their cost before they start, within a budget if there is one."""

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Bits, Compiled, Device, Json, Model, model_folder, name_or_champion, said_to
from llada_core.files import stem, suffix
from llada_core.settings import ConfigError, while_imported

if TYPE_CHECKING:
    from llada_core.evaluation.params import EvaluateParams
    from llada_core.usage import Usage
    from tasks.work.evaluate import Places


def evaluate(
    benchmarks: Annotated[
        list[str],
        typer.Argument(
            help="names of recipes or of puzzle sets in data/eval, or files of questions and answers; none: see --table"
        ),
    ] = [],  # noqa: B006
    model: Model = "",
    table: Annotated[str, typer.Option(help="all benchmarks of a published table: base, instruct, ...")] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, help="questions per benchmark; the score is marked as a subset")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="questions answered at once")] = 32,
    data: Annotated[
        str | None, typer.Option(help="folder with benchmark files; none: LLADAFLOW_DATA_ROOT, else the Hub")
    ] = None,
    estimator: Annotated[
        str, typer.Option(help="auto, stock (LLaDA's own), antithetic, exact, or confidence; none: the recipe's")
    ] = "",
    share: Annotated[
        float | None,
        typer.Option(help="share of each benchmark's questions, drawn with a fixed seed; marked as a subset"),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="time for all of it, such as 4h or 30m: the share of questions that fits is asked")
    ] = "",
    speed: Annotated[
        list[str] | None,
        typer.Option(
            help="accuracy beside tokens a forward with these sampler settings, such as cache=dual; or: usual"
        ),
    ] = None,
    run_code: Annotated[bool, typer.Option(help="allow benchmarks that run the programs a model writes")] = False,
    device: Device = "auto",
    bits: Bits = None,
    compiled: Compiled = "off",
    out: Annotated[Path | None, typer.Option(help="folder for results; none: reports/checkpoints/MODEL")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on benchmarks; one that fails does not stop the others. Says first what each costs on the GPUs here.

    llada eval --table instruct --model GSAI-ML/LLaDA-8B-Instruct --budget 4h

    Sampler settings are the recipe's; those of puzzles, overrides and dtype are read from params.yaml here, but a model
    that another run trained is asked puzzles as was saved with it.
    """
    name, files = name_or_champion(model), [text for text in benchmarks if _is_own(text)]
    asked = _asked([stem(text) if text in files else text for text in benchmarks], table)
    hours = budget_hours(budget) if budget and share is None else None
    given: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "run_code": run_code, "root": data}
    given |= {} if compiled == "off" else {"compile": compiled}
    over = {"estimator": estimator or None, "share": share}
    params, places = _prepared(name, asked, given | _checked(device, bits), over, out, files)
    if speed and as_json:
        raise ConfigError("--speed writes tables; leave out --json")
    if speed:
        return _sped(name, asked, params, places, device, speed)
    with said_to(as_json):
        found = _swept(name, asked, params, places, device, hours)
    return None if found is None else _finished(name, params, places, found, as_json)


def _finished(name: str, params: "EvaluateParams", places: "Places", found: dict[str, Any], as_json: bool) -> None:
    """Sends MLflow what was measured, says where it lies, and ends with status 1 where a benchmark failed."""
    from tasks.project import Project
    from tasks.record.tracking import send_sweep

    measured = [benchmark for benchmark, line in found.items() if "error" not in line]
    with said_to(as_json):
        send_sweep(Project.at(), name, params, places.out, measured, key=places.answers.name)
        print(f"results are in {places.out}")
    if as_json:
        print(json.dumps({"model": name, "results": str(places.out), "benchmarks": found}))
    raise typer.Exit(len(measured) < len(found))


def _is_own(text: str) -> bool:
    """Whether a benchmark is a file of questions and answers."""
    from tasks.own_code import TABLES

    return suffix(text) in TABLES and Path(text).is_file()


def _prepared(
    name: str, asked: list[str], given: dict[str, Any], over: dict[str, Any], out: Path | None, files: Sequence[str]
) -> "tuple[EvaluateParams, Places]":
    """What was asked for over the project's own, and where it is read and written."""
    root = _folder(given["root"])
    model_folder(name)  # what is misspelt is told before torch is imported

    from tasks.folders import safe
    from tasks.project import Project
    from tasks.record.model_usage import saved_usage
    from tasks.work.measure import sweep_places, trained_in, with_own_questions

    project = Project.at()
    base = project.home
    values = {"benchmarks": tuple(asked), **given}
    another = trained_in(name) != project.root
    params = _over_the_projects(base / "params.yaml", values, saved_usage(project, name), another=another)
    params = with_settings(params, asked, over)
    places = sweep_places(name, params, base, root, out or base / "reports" / "checkpoints" / safe(name))
    return params, with_own_questions([Path(text) for text in files], places)


def _folder(data: str | None) -> Path | None:
    root = Path(data).expanduser() if data is not None else None
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"--data {data}: no such folder")
    return root


def _asked(benchmarks: Sequence[str], table: str) -> list[str]:
    from llada_core.evaluation.recipes import table as published

    asked = [*benchmarks, *([column.recipe for column in published(table).columns] if table else [])]
    if not asked:
        raise ValueError("say what to measure: names of benchmarks, or --table base")
    return asked


def _checked(device: str, bits: int | None) -> dict[str, Any]:
    if bits is None:
        return {}
    from llada_core.modeling.place import checked_bits

    return {"bits": checked_bits(device, bits)}


def budget_hours(text: str) -> float:
    """Hours in a time such as 4h, 90m or 1.5h; ValueError with what is allowed."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hm])", text.strip())
    if not found or not float(found[1]):
        raise ValueError(f"--budget {text!r}: write hours or minutes above zero, such as 4h or 30m")
    return float(found[1]) / (60 if found[2] == "m" else 1)


def with_settings(params: "EvaluateParams", asked: Sequence[str], given: dict[str, Any]) -> "EvaluateParams":
    """The parameters with settings that are given (others than None) for every benchmark."""
    from llada_core.evaluation.params import BenchmarkSettings

    values = {key: value for key, value in given.items() if value is not None}
    if not values:
        return params
    over = BenchmarkSettings.parse(values, "llada eval")
    own = {name: over.over(params.overrides.get(name, BenchmarkSettings())) for name in asked}
    return params.model_copy(update={"overrides": {**params.overrides, **own}})


def _sped(
    name: str, asked: list[str], params: "EvaluateParams", places: "Places", device: str, texts: Sequence[str]
) -> None:
    """Prints what faster settings cost on each benchmark, and keeps it beside the results: speed-NAME.json, and .md and .png of it."""
    from llada_core.evaluation.benchmark import benchmark
    from llada_core.evaluation.speed import as_values, picture, settings_of, study, told
    from tasks.folders import write_json, write_text
    from tasks.record.registry import resolve
    from tasks.work.evaluate import answering, quiet_lm_eval, speed_answers

    quiet_lm_eval(harness=logging.WARNING)
    with answering(resolve(name), params, device) as answerer:
        for each in asked:
            put = benchmark(each, params, root=places.root, puzzles=places.puzzles)
            if put.recipe.kind != "generate":
                raise ConfigError(f"--speed: {each} writes nothing; name benchmarks that are answered in words")
            points = study(put, answerer, texts, params.limit, kept=speed_answers(places, name, put.name))
            text = told(each, points)
            used = settings_of(put, texts, by_blocks=answerer.model.block_length is not None)
            write_json(places.out / f"speed-{each}.json", {"model": name, **as_values(each, points, used)})
            write_text(places.out / f"speed-{each}.md", text + "\n")
            picture(each, points, places.out / f"speed-{each}.png")
            print(f"{text}\n")
    for each in asked:  # asked again, the same is measured anew: a time is of its day
        shutil.rmtree(speed_answers(places, name, each), ignore_errors=True)


def share_within(
    hours: float, name: str, asked: list[str], params: "EvaluateParams", places: "Places", device: str, processes: int
) -> float:
    """The share of every benchmark's questions that fits into so many hours, at the rate of measured forwards."""
    from tasks.record.registry import resolve
    from tasks.work.evaluate import answering, quiet_lm_eval
    from tasks.work.measure import costs_of

    quiet_lm_eval()
    with answering(resolve(name), params, device) as answerer:
        costs, _ = costs_of(answerer, asked, params, places)
    total = sum(cost.hours for cost in costs.values()) / processes
    share = min(1.0, hours / total) if total else 1.0
    print(
        f"all questions take at most {total:.2f} h on {processes} processes; {hours:.2f} h are for {share:.2%} of them"
    )
    if share * max((cost.answers for cost in costs.values()), default=0) < 1:
        raise ConfigError(f"--budget {hours:.2f} h is for less than a question of each benchmark; give more time")
    return share


def _swept(
    name: str, asked: list[str], params: "EvaluateParams", places: "Places", device: str, hours: float | None
) -> dict[str, dict[str, Any]] | None:
    """The results, by all GPUs of this machine; None in the processes that only answer a share."""
    from tasks.record.registry import resolve
    from tasks.record.runs import rank
    from tasks.work.evaluate import processes, sharing
    from tasks.work.measure import sweep

    program = [sys.executable, "-m", "cli.main", *sys.argv[1:]]
    with while_imported():
        import llada_core.evaluation.benchmark  # noqa: F401 - lm-eval, which the sweep imports

        count = processes([resolve(name)], params, device)
    if hours is not None:
        if "RANK" in os.environ:
            raise ConfigError("--budget is measured by one process; give the others its --share")
        share = share_within(hours, name, asked, params, places, device, count)
        params, program = with_settings(params, asked, {"share": share}), [*program, "--share", repr(share)]
    with sharing(count, program):
        found = sweep(name, asked, params, places, device=device)
        return found if rank() == 0 else None


def _over_the_projects(
    file: Path, asked_for: dict[str, Any], usage: "Usage | None", *, another: bool
) -> "EvaluateParams":
    """The project's own settings under what was asked for: a small model answers on the canvas that it was trained for,
    and on no other. Where the project does not say how puzzles are asked, or another run trained the model (`another`),
    the model's own usage does."""
    from llada_core.evaluation.params import EvaluateParams
    from llada_core.sampling.params import as_values
    from tasks.project import Params

    measured = (Params.load(file).evaluate if file.exists() else None) or EvaluateParams()
    if usage is not None and (another or "puzzles" not in measured.model_fields_set):
        asked_for = {"puzzles": {"sampling": as_values(usage.sampling)}} | asked_for
    return EvaluateParams.parse({**measured.model_dump(), **asked_for}, "llada eval")
