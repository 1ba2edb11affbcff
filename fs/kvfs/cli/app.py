"""The command tree: options of `kvfs` itself and the subcommands' registration."""

from typing import Annotated

import typer

from kvfs import __version__
from kvfs.cli import (
    bench,
    blocks,
    cluster,
    config,
    connectors,
    doctor,
    fsck,
    ls,
    mount,
    namespace,
    node,
    rails,
    replay,
    serve,
    token,
    usrbio,
)

app = typer.Typer(
    name="kvfs",
    help="A file system for the KV-cache blocks of LLM inference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("config", epilog=config.EXAMPLES)(config.config)
app.command("connectors", epilog=connectors.EXAMPLES)(connectors.connectors)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("fsck", cls=fsck.Command, epilog=fsck.EXAMPLES)(fsck.fsck)
app.command("up", epilog=node.UP_EXAMPLES)(node.up)
app.command("down", epilog=node.DOWN_EXAMPLES)(node.down)
app.command("status", epilog=node.STATUS_EXAMPLES)(node.status)
app.command("mount", epilog=mount.EXAMPLES)(mount.mount)
app.command("namespace", epilog=namespace.EXAMPLES)(namespace.namespace)
app.command("ls", epilog=ls.EXAMPLES)(ls.ls)
app.command("put", epilog=blocks.PUT_EXAMPLES)(blocks.put)
app.command("get", epilog=blocks.GET_EXAMPLES)(blocks.get)
app.command("stat", epilog=blocks.STAT_EXAMPLES)(blocks.stat)
app.command("replay", epilog=replay.EXAMPLES)(replay.replay)
app.add_typer(bench.app, name="bench")
app.command("rm", epilog=blocks.RM_EXAMPLES)(blocks.rm)
app.add_typer(serve.app, name="serve")
app.add_typer(cluster.app, name="cluster")
app.add_typer(token.app, name="token")
app.command("rails", epilog=rails.EXAMPLES)(rails.rails)
app.command("usrbio", epilog=usrbio.EXAMPLES)(usrbio.usrbio)


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
