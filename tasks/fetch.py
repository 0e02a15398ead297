"""`llada fetch PROFILE FOLDER`: all that a profile would ask of the Hub, put into a folder for machines without one.

The folder is a Hub cache: with `HF_HOME=FOLDER HF_HUB_OFFLINE=1` everything is found by the names that the profile has.
Knows what a profile names; downloads by the functions that the stages themselves use.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from llada_core.config.params import TRAINING_STAGES, Params
from llada_core.settings import ConfigError
from tasks.evaluate import data_root
from tasks.record.registry import named, resolve

Item = tuple[str, Callable[[], object]]
PARTS = ("pretrain", "sft", "grpo", "preference")


def fetch(params: Params, home: Path, tell: Callable[[str], None] = print) -> list[str]:
    """Brings everything, one line each; what failed does not stop the rest and is returned, with its reason."""
    failed = []
    for what, bring in (*_models(params, home), *_sources(params, home), *_benchmarks(params, home)):
        try:
            bring()
        except (ConfigError, ValueError, OSError) as error:
            failed.append(f"{what}: {' '.join(str(error).split())}")
            tell(f"failed   {failed[-1]}")
        else:
            tell(f"fetched  {what}")
    return failed


def _models(params: Params, home: Path) -> Iterator[Item]:
    """Models and tokenizers that the profile starts from or measures, by their names on the Hub."""
    names = [params.training(stage).init_from for stage in params.stages if stage in TRAINING_STAGES]
    names += [name.rpartition("=")[2] for name in (params.evaluate.models if params.evaluate else ())]
    names += [params.data.tokenizer.name if params.data else None]
    for name in dict.fromkeys(filter(None, names)):
        if name not in TRAINING_STAGES and not (home / Path(name).expanduser()).is_dir() and not named(name):
            yield f"model {name}", partial(resolve, name, home)


def _sources(params: Params, home: Path) -> Iterator[Item]:
    """Training data that is not below the data root."""
    from llada_core.data.sources import find

    blocks = [(stage, getattr(params.data, stage)) for stage in PARTS if params.data and getattr(params.data, stage)]
    roots = [root for root in (data_root(params, home), home) if root]
    for stage, source in ((stage, source) for stage, block in blocks for source in block.sources):
        origin = find(source, stage, roots)
        if origin.kind == "hub":
            yield (
                f"data set {origin.place}",
                partial(_load, origin.place, origin.config, origin.split, source.revision),
            )


def _load(name: str, config: str | None, split: str, revision: str | None) -> None:
    import datasets

    try:
        datasets.load_dataset(name, config, split=split, revision=revision)
    except datasets.exceptions.DatasetsError as error:
        raise ConfigError(str(error)) from None


def _benchmarks(params: Params, home: Path) -> Iterator[Item]:
    """Questions of the recipes whose files are not below the data root."""
    from llada_core.evaluation import recipes, taskset

    for name in params.evaluate.benchmarks if params.evaluate else ():
        if recipes.exists(name) and taskset.local_files(recipes.find(name), data_root(params, home)) is None:
            yield f"benchmark {name}", partial(taskset.tasks_of, recipes.find(name))
