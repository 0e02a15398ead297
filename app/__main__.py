"""`python -m app`: the page on a loopback port."""

import os
from typing import Annotated, Any

import typer

from llada_core.settings import DEVICE_SETTING, DEVICES
from tasks.errors import one_line_errors, require_port


def serve(  # noqa: PLR0913 - a command has as many arguments as it has options
    model: Annotated[
        str, typer.Option(help="Alias, version, folder or Hub name; default: the champion of params.yaml.")
    ] = "",
    also: Annotated[
        list[str] | None, typer.Option(help="Further model that may be asked where others reach the page; repeatable.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is reachable from this machine alone.")
    ] = "127.0.0.1",
    share: Annotated[bool, typer.Option(help="Open a public link through Gradio's servers.")] = False,
    login: Annotated[
        str, typer.Option(help="USER:PASSWORD asked for before the page opens.", envvar="LLADAFLOW_APP_LOGIN")
    ] = "",
    at_once: Annotated[int, typer.Option(min=1, help="Answers written at the same time; more wait in line.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="Longest time that one answer may compute.")] = 120.0,
    device: Annotated[
        str, typer.Option(help=f"Where models lie: {DEVICES}; auto: GPUs if there are any.", envvar=DEVICE_SETTING)
    ] = "auto",
    bits: Annotated[int | None, typer.Option(help="Weights of 4 or 8 bits, on a CUDA GPU; default: as stored.")] = None,
) -> None:
    """Open the page: talk to a model in the browser and watch it write."""
    with one_line_errors():
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        require_port(host, port, "--port")
        user, _, password = login.partition(":")
        if login and not (user and password):
            raise ValueError("--login wants USER:PASSWORD, both not empty")
        auth = (user, password) if login else None
        launch(
            (model, *(also or ())),
            (device, bits),
            at_once=at_once,
            seconds=seconds,
            where=(host, port, share),
            auth=auth,
        )


def options() -> dict[str, Any]:
    """What Gradio is told in every case: our look, no telemetry, no uploads, nothing from elsewhere."""
    from app import page

    return {
        "css_paths": [page.CSS],
        "theme": page.theme(),
        "footer_links": [],
        "max_file_size": "1kb",
        "enable_monitoring": False,
        "state_session_capacity": 256,
    }


LOOPBACK = ("127.0.0.1", "localhost", "::1")


def launch(
    models: tuple[str, ...],
    lies: tuple[str, int | None],
    *,
    at_once: int,
    seconds: float,
    where: tuple[str, int, bool],
    auth: tuple[str, str] | None,
) -> None:
    """Loads the first model on a device in so many bits, then serves the page until Ctrl-C; without a model the page says
    what to run."""
    from tasks.project import Project
    from tasks.record.registry import champion_of

    model, *also = models
    name = model or champion_of(Project.at())  # first: Gradio takes seconds to import
    from app import page
    from app.models import AppState, ModelCache, ModelIndex, Setting, UserError

    catalogue, setting = ModelIndex(Project.at()), Setting.checked(*lies)
    named = None if where[0] in LOOPBACK and not where[2] else tuple(dict.fromkeys([name, *also]))
    state = AppState(
        ModelCache(catalogue, setting=setting), catalogue, name, seconds=seconds, at_once=at_once, named=named
    )
    try:
        state.loaded(name)
        blocks = page.build_page(state)
    except UserError as error:
        if model:
            raise
        blocks = page.absent(name, str(error))
    host, port, share = where
    blocks.launch(server_name=host, server_port=port, share=share, auth=auth, **options())


if __name__ == "__main__":
    typer.run(serve)
