"""What every test may ask for."""

import os
import signal
from pathlib import Path

import pytest

# A suite started in the background of a script would pass on that Ctrl-C is ignored, and the tests of Ctrl-C would hang.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Golden numbers are a CPU's; on a machine with a GPU `LLADAFLOW_DEVICE=auto make test` has models lie there.
os.environ.setdefault("LLADAFLOW_DEVICE", "cpu")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the collected public data sets: LLADAFLOW_DATA_ROOT, else ../shared/data; skips without."""
    root = Path(os.environ.get("LLADAFLOW_DATA_ROOT", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no data sets at {root}; set LLADAFLOW_DATA_ROOT")
    return root
