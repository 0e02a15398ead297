"""pytest for the sandbox, whose interpreter has the standard library alone: a folder with our copy of it.

Made once per process, with its bytecode, as reading its source takes longer than most tests. Knows no programs.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from llada_core.sandbox import SandboxError

MODULES = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py")
"""pytest and what it imports."""

_WARM = "import sys; sys.path.append(sys.argv[1]); import pytest; pytest.main(['--no-header', '-pno:cacheprovider', sys.argv[2]])"
_MADE: list[tempfile.TemporaryDirectory[str]] = []  # gone when this process ends
_LOCK = threading.Lock()


def pytest_folder() -> Path:
    """A folder from which `import pytest` works; raises `SandboxError` where it is not installed."""
    with _LOCK:
        if not _MADE:
            folder = tempfile.TemporaryDirectory(prefix="pytest-lent-")
            _fill(Path(folder.name))
            _MADE.append(folder)
        return Path(_MADE[0].name)


def _fill(folder: Path) -> None:
    folder.chmod(0o755)
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            shutil.copytree(
                spec.submodule_search_locations[0], folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        elif spec is not None and spec.origin:
            shutil.copy(spec.origin, folder)
        elif name == "pytest":
            raise SandboxError("these tests need pytest, which is not installed: pip install 'lladaflow[train]'")
    with tempfile.TemporaryDirectory() as empty:
        command = [sys._base_executable, "-I", "-S", "-c", _WARM, str(folder), empty]  # type: ignore[attr-defined]
        subprocess.run(command, cwd=empty, capture_output=True, check=False)
