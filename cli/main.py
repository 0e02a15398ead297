"""The `llada` command: every command registered under the heading a newcomer looks for it. Does nothing itself."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer

from cli import measure, models, runs, serve, talk
from cli.options import in_project, telling
from cli.wheel import init

ANY_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

llada = typer.Typer(
    help="Train, measure, register and talk to masked-diffusion language models of the LLaDA family.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _told(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lladaflow {version('lladaflow')}")
        raise typer.Exit


@llada.callback()
def options(
    _: Annotated[bool, typer.Option("--version", callback=_told, is_eager=True, help="Show the version.")] = False,
) -> None:
    """What stands before a command."""


def add(command: Callable[..., None], heading: str, name: str = "", context: dict[str, Any] | None = None) -> None:
    """Register a command under a heading of the help."""
    llada.command(name or command.__name__, rich_help_panel=heading, context_settings=context)(telling(command))


add(talk.sample, "Talk")
add(talk.chat, "Talk")
add(models.page, "Talk", "app", ANY_ARGUMENTS)
add(serve.serve, "Talk")
add(measure.evaluate, "Measure", "eval")
add(models.fetch, "Measure")
add(models.lm_eval, "Measure", "lm-eval", ANY_ARGUMENTS)
add(models.diff, "Measure")
add(init, "Run")
for command in runs.COMMANDS:
    add(in_project(command) if command in runs.OF_A_PROJECT else command, "Run")
add(models.export, "Models")
add(models.ui, "Models")


def main() -> None:
    """The entry point."""
    llada()


if __name__ == "__main__":
    main()
