"""Whether Prefect's server, or the database of the one it would start, answers and is of this version. Starts nothing."""

import importlib.metadata
import json
import urllib.request

from prefect.settings import get_current_settings

from tasks.folders import SECONDS, NoDatabaseError, require, shown


def require_prefect() -> str:
    """What was found; raises `NoDatabaseError` with the remedy."""
    settings = get_current_settings()
    if not (api := settings.api.url):
        url = settings.server.database.connection_url
        database = url.get_secret_value() if url else ""
        require("Prefect", database, "PREFECT_SERVER_DATABASE_CONNECTION_URL")
        return f"Prefect starts a server when it needs one, on {shown(database)}"
    ours = importlib.metadata.version("prefect")
    try:
        with urllib.request.urlopen(f"{api.rstrip('/')}/admin/version", timeout=SECONDS) as answer:
            theirs = json.load(answer)
    except (OSError, ValueError) as error:
        ways = "start it (`make ui`), or unset PREFECT_API_URL"
        raise NoDatabaseError(f"Prefect's server at {api}: {error}; {ways}") from None
    if theirs != ours:
        ways = "run both from this environment, or `prefect config unset PREFECT_API_URL`"
        raise NoDatabaseError(f"Prefect's server at {api} is version {theirs}, this is {ours}; {ways}")
    return f"Prefect's server at {api} is version {theirs}, as this is"
