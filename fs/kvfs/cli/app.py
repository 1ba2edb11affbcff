"""The command tree: options of `kvfs` itself and the subcommands' registration."""

from typing import Annotated

import typer

from kvfs import __version__
from kvfs.cli import config, doctor

app = typer.Typer(
    name="kvfs",
    help="A file system for the KV-cache blocks of LLM inference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("config", epilog=config.EXAMPLES)(config.config)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvfs {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[  # typer runs the callback; the value itself is not used
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """A file system for the KV-cache blocks of LLM inference."""
