"""`kvfs namespace`: make a namespace, durable or a cache."""

from typing import Annotated

import typer

from kvfs import daemon
from kvfs.cli.node import Directory, resolve, split_namespace
from kvfs.cli.output import fail

EXAMPLES = "Examples:  kvfs namespace me/cache   |   kvfs namespace me/weights --durable"


def namespace(
    name: Annotated[str, typer.Argument(help="TENANT/NAME, or a name of the tenant `default`.")],
    durable: Annotated[bool, typer.Option("--durable", help="Its blocks are never evicted to make room.")] = False,
    directory: Directory = None,
) -> None:
    """Make a namespace. Those that are opened without one become caches. Exits 1 if it is there already."""
    tenant, plain = split_namespace(name)
    try:
        answer = daemon.ask(resolve(directory), daemon.AdminRequest("namespace", tenant, plain, durable))
    except daemon.DaemonError as e:
        fail(str(e))
    if answer.error:
        fail(answer.error)
    typer.echo(f"{tenant}/{plain}: {'durable' if durable else 'cache'}")
