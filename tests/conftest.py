"""What every test may ask for."""

import os
import signal
from pathlib import Path

import pytest

# A suite started in the background of a script would pass on that Ctrl-C is ignored, and the tests of Ctrl-C would hang.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Golden numbers are a CPU's; on a machine with a GPU `LLADAFLOW_DEVICE=auto make test` has models lie there.
os.environ.setdefault("LLADAFLOW_DEVICE", "cpu")

# Files whose tests take longest begin first: with two workers, one that comes last has the machine to itself for minutes.
LONGEST = (
    *("test_pipeline.py", "test_middle.py", "test_plan.py", "test_flows.py", "test_ranks.py", "test_cli_runs.py"),
    *("test_gpu_benchmark.py", "test_serve_command.py", "test_engine.py", "test_shards.py", "test_workspace.py"),
    *("test_wheel.py", "test_settings.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all else in its order; `make test` tells xdist to keep it."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the collected public data sets: LLADAFLOW_DATA_ROOT, else ../shared/data; skips without."""
    root = Path(os.environ.get("LLADAFLOW_DATA_ROOT", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no data sets at {root}; set LLADAFLOW_DATA_ROOT")
    return root
