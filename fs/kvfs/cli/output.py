"""What subcommands share in talking to people and to machines: errors, JSON."""

from typing import NoReturn

import msgspec
import typer

FAILED = 1
USAGE = 2


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Says why on standard error and ends the command."""
    typer.echo(f"kvfs: {message}", err=True)
    raise typer.Exit(code)


def _plain(value: object) -> object:
    return int(value) if isinstance(value, int) else str(value)


def print_json(value: object) -> None:
    """One indented JSON document on standard output; sizes are numbers, paths text."""
    document = msgspec.json.encode(value, enc_hook=_plain)
    typer.echo(msgspec.json.format(document, indent=2).decode())
