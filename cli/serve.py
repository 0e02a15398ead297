"""`llada serve`: models behind an OpenAI-compatible address."""

import os
from typing import Annotated

import typer

from cli.options import Bits, Compiled, Device, name_or_champion
from llada_core.settings import ConfigError
from tasks.errors import require_port

KEY = "LLADAFLOW_API_KEY"


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="a folder, models:/NAME@alias or a Hub name; repeatable; none: the champion"
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="address to listen on; the default is reachable from this machine alone")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port on this machine")] = 8000,
    at_once: Annotated[int, typer.Option(min=1, help="requests that are written at the same time")] = 32,
    waiting: Annotated[
        int, typer.Option(min=0, help="requests that may wait beyond those; further ones get status 429")
    ] = 128,
    seconds: Annotated[float, typer.Option(min=1, help="longest time that one answer may take")] = 120.0,
    follow: Annotated[float, typer.Option(min=0.1, help="seconds between two looks at where an alias leads")] = 5.0,
    device: Device = "auto",
    bits: Bits = None,
    compiled: Compiled = "off",
    devices: Annotated[
        str, typer.Option(help="several, such as cuda:0,cuda:1: a copy on each, one queue for all")
    ] = "",
) -> None:
    """Serve models to programs: /v1/chat/completions, /v1/completions, /v1/score, /health, /metrics. Set LLADAFLOW_API_KEY to ask for a key."""
    require_port(host, port, "--port")
    names = model or [name_or_champion("")]
    import uvicorn

    from app.models import AT_ONCE, ModelCache, ModelIndex, Setting
    from app.server.http import create_app
    from app.server.service import Limits, Service
    from tasks.project import Project

    if at_once > AT_ONCE:
        raise ConfigError(f"--at-once {at_once}: a model writes at most {AT_ONCE} answers together; more may wait")
    cache = ModelCache(
        ModelIndex(Project.at()), most=len(names) + 1, setting=Setting.checked(devices or device, bits, compiled)
    )
    service = Service(cache, names, Limits(at_once=at_once, waiting=waiting, seconds=seconds))
    key = os.environ.get(KEY, "")
    if not key and host not in ("127.0.0.1", "localhost", "::1"):
        print(f"anyone who reaches {host}:{port} can use this model; set {KEY} to ask for a key", flush=True)
    for name in names:
        print(f"{name}: {service.loaded[name].engine.told()}", flush=True)
    print(f"{', '.join(names)} on http://{host}:{port}/v1 (Ctrl-C ends it)", flush=True)
    # A stop lets requests end that are being written, but no longer than one may take.
    uvicorn.run(
        create_app(service, key=key, follow_seconds=follow),
        host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=int(seconds),
        timeout_keep_alive=75,  # uvicorn's 5 s meet a client's next question on the way
    )  # fmt: skip
