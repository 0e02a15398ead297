"""Prefect flows over `tasks`: they walk DVC's graph and repeat none of it."""

import os

# Before Prefect is imported: a busy machine needs longer than its default to start the server of a run without one.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "600")
os.environ.setdefault("PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
