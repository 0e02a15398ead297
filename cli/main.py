"""The `llada` command: every command registered under the heading a newcomer looks for it. Does nothing itself."""

import typer

from cli import measure, models, runs, serve, talk
from cli.options import in_project
from cli.wheel import init

ANY_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

llada = typer.Typer(
    help="Train, measure, register and talk to masked-diffusion language models of the LLaDA family.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
llada.command("sample", rich_help_panel="Talk")(talk.sample)
llada.command("chat", rich_help_panel="Talk")(talk.chat)
llada.command("app", rich_help_panel="Talk", context_settings=ANY_ARGUMENTS)(models.page)
llada.command("serve", rich_help_panel="Talk")(serve.serve)
llada.command("eval", rich_help_panel="Measure")(measure.evaluate)
llada.command("fetch", rich_help_panel="Measure")(models.fetch)
llada.command("lm-eval", rich_help_panel="Measure", context_settings=ANY_ARGUMENTS)(models.lm_eval)
llada.command("diff", rich_help_panel="Measure")(models.diff)
llada.command("init", rich_help_panel="Run")(init)
for command in runs.COMMANDS:
    works = in_project(command) if command in runs.OF_A_PROJECT else command
    llada.command(command.__name__, rich_help_panel="Run")(works)
llada.command("export", rich_help_panel="Models")(models.export)
llada.command("ui", rich_help_panel="Models")(models.ui)


def main() -> None:
    """The entry point."""
    llada()


if __name__ == "__main__":
    main()
