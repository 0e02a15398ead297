"""What every test may ask for."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the collected public data sets: LLADAFLOW_DATA_ROOT, else ../shared/data; skips without."""
    root = Path(os.environ.get("LLADAFLOW_DATA_ROOT", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no data sets at {root}; set LLADAFLOW_DATA_ROOT")
    return root
