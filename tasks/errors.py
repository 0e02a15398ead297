"""How a program ends on a user's mistake: one line and exit status 2.

`LLADAFLOW_TRACEBACK=1` shows the traceback.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llada_core.settings import ConfigError

STOPPED = 75  # exit status of a program that was asked to stop, saved, and can go on


class StageError(RuntimeError):
    """A stage's job ended without success; the text says where its log is and how to go on."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status or 1


class StoppedError(RuntimeError):
    """The stage was asked to stop and has saved what it had."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn expected errors into one line on stderr and an exit status.

    2: a user's mistake; 75: stopped and can go on; 130: Ctrl-C; a failed stage gives its own status, or 1.
    """
    if os.environ.get("LLADAFLOW_TRACEBACK"):
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        _end("interrupted; the same command goes on from the last checkpoint", 130)
    except StoppedError as error:
        _end(str(error), STOPPED)
    except StageError as error:
        _end(str(error), error.status)
    except (ConfigError, ValueError, OSError) as error:
        _end(_text(error), 2)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("mlflow", "sqlalchemy"):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        _end(f"MLflow: {reason[:300]}; `llada doctor` looks at its database", 2)


def require_port(address: str, port: int, option: str) -> None:
    """Raises OSError with one sentence when a port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            why = f"port {port} on {address} is taken ({error.strerror}); choose another: {option} {port + 1}"
            raise OSError(why) from None


def _text(error: Exception) -> str:
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: no permission ({error.strerror}); make it writable for this user"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _end(text: str, status: int) -> None:
    if (run := os.environ.get("LLADAFLOW_RUN")) and os.environ.get("RANK", "0") == "0":
        Path(run, "status").write_text(str(status))  # launchers of several ranks turn every status into 1
    sys.stdout.flush()
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(status)
