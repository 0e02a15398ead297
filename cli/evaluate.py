"""`llada eval`, `llada fetch`, `llada lm-eval`, `llada diff`: measure any model, and compare two measurements.

Thin over tasks.evaluate, tasks.fetch, tasks.lm_eval and tasks.measure; heavy packages are imported inside.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Bits, Device, Model, name_or_champion
from tasks.errors import one_line_errors

if TYPE_CHECKING:
    from llada_core.evaluation.params import EvaluateParams
    from tasks.evaluate import Places


def evaluate(
    benchmarks: Annotated[
        list[str], typer.Argument(help="names of recipes or of puzzle sets in data/eval; none: see --table")
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
    run_code: Annotated[bool, typer.Option(help="allow benchmarks that run the programs a model writes")] = False,
    device: Device = "auto",
    bits: Bits = None,
    out: Annotated[Path | None, typer.Option(help="folder for results; none: reports/checkpoints/MODEL")] = None,
) -> None:
    """Measure a model on benchmarks; one that fails does not stop the others.

    llada eval sudoku countdown          the champion on its puzzles
    llada eval --table instruct --model GSAI-ML/LLaDA-8B-Instruct

    On a machine with several GPUs each answers its share; a model that is too large for one is spread over all.
    Sampler settings are the recipe's; those of puzzles, overrides and dtype are read from params.yaml here.
    """
    with one_line_errors():
        from llada_core.evaluation.recipes import table as published
        from llada_core.modeling.place import checked_bits
        from tasks.folders import safe
        from tasks.measure import sweep_places
        from tasks.runs import home
        from tasks.tracked_results import send_sweep

        if data is not None and not Path(data).expanduser().is_dir():
            raise FileNotFoundError(f"--data {data}: no such folder")
        name = name_or_champion(model)
        asked = list(benchmarks) + ([column.recipe for column in published(table).columns] if table else [])
        if not asked:
            raise ValueError("say what to measure: names of benchmarks, or --table base")
        base = home(Path.cwd())
        given: dict[str, Any] = {
            "benchmarks": tuple(asked),
            "limit": limit,
            "batch_size": batch_size,
            "run_code": run_code,
        }
        given |= {"root": data} | ({} if bits is None else {"bits": checked_bits(device, bits)})
        params = _over_the_projects(base / "params.yaml", given)
        results = out or base / "reports" / "checkpoints" / safe(name)
        places = sweep_places(name, params, base, Path(data).expanduser() if data else None, results)
        found = _swept(name, asked, params, places, device)
        if found is None:
            return
        send_sweep(base, name, params, places, [n for n, line in found.items() if "error" not in line])
        print(f"results are in {results}")
        raise typer.Exit(1 if any("error" in line for line in found.values()) else 0)


def _swept(
    name: str, asked: list[str], params: "EvaluateParams", places: "Places", device: str
) -> dict[str, dict[str, Any]] | None:
    """The results, by all GPUs of this machine; None in the processes that only answer a share."""
    from tasks.evaluate import processes
    from tasks.measure import sweep
    from tasks.program import rank
    from tasks.registry import resolve
    from tasks.shards import sharing

    program = [sys.executable, "-m", "cli.main", *sys.argv[1:]]
    with sharing(processes([resolve(name)], params, device), program):
        found = sweep(name, asked, params, places, device=device)
        return found if rank() == 0 else None


def _over_the_projects(file: Path, asked_for: dict[str, Any]) -> "EvaluateParams":
    """The project's own settings under what was asked for: a small model answers on the canvas that it was trained for,
    and on no other."""
    from llada_core.config.params import Params
    from llada_core.evaluation.params import EvaluateParams

    measured = (Params.load(file).evaluate if file.exists() else None) or EvaluateParams()
    return EvaluateParams.parse({**measured.model_dump(), **asked_for}, "llada eval")


def fetch(
    profile: Annotated[str, typer.Argument(help="a file of profiles/ by name, or any YAML file")],
    folder: Annotated[Path, typer.Argument(help="where to put it all")],
) -> None:
    """Bring all that a profile needs of the Hub into a folder: models, tokenizers, data sets, benchmarks.

    Elsewhere, without the Hub: HF_HOME=FOLDER HF_HUB_OFFLINE=1 llada run PROFILE
    """
    with one_line_errors():
        import os

        os.environ["HF_HOME"] = str(folder.resolve())  # read when the Hub's packages are first imported
        from llada_core.config.params import Params
        from tasks.fetch import fetch as bring
        from tasks.runs import home
        from tasks.workspace import profile_file

        failed = bring(Params.load(profile_file(Path.cwd(), profile)), home(Path.cwd()))
        print(f"with HF_HOME={folder.resolve()} HF_HUB_OFFLINE=1 all of it is found by its name")
        raise typer.Exit(1 if failed else 0)


def lm_eval(context: typer.Context) -> None:
    """lm-eval's own command line with our model registered: --model llada --tasks gsm8k --model_args pretrained=..."""
    with one_line_errors():
        from tasks.lm_eval import run

        run(context.args)


def diff(
    first: Annotated[str, typer.Argument(help="a model of reports/eval, or FOLDER:MODEL")],
    second: Annotated[str, typer.Argument(help="what it is compared with")],
) -> None:
    """Two measurements side by side: scores with a paired test, questions gained and lost, settings, code."""
    with one_line_errors():
        from tasks import measure as comparison

        print(comparison.told(comparison.diff(first, second)))
