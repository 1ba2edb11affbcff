"""`kvfs serve`: the processes of a cluster."""

from pathlib import Path
from typing import Annotated

import structlog
import trio
import typer

from kvfs.cli.output import USAGE, fail
from kvfs.cluster import config, server
from kvfs.config import ConfigError

app = typer.Typer(help="Run a server of a cluster.", no_args_is_help=True)
CHUNK_EXAMPLES = (
    "Examples:  kvfs serve chunk --print-default-config > chunk.toml   |   "
    "kvfs serve chunk --config chunk.toml --check   |   kvfs serve chunk --config chunk.toml"
)


@app.command("chunk", epilog=CHUNK_EXAMPLES)
def chunk(
    path: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file to read.")] = None,
    print_default: Annotated[
        bool, typer.Option("--print-default-config", help="Print a commented configuration and exit.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Check configuration, cluster file and key, and exit.")
    ] = False,
) -> None:
    """Serve the chunk stores of this machine's devices to clients over TCP, RDMA and shared memory,
    until Ctrl-C or SIGTERM.

    SIGHUP reads the cluster file again. Exits 1 if it cannot start."""
    if print_default:
        typer.echo(config.DEFAULT, nl=False)
        return
    if path is None:
        fail("say --config FILE; --print-default-config prints one to begin with", code=USAGE)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(typer.get_text_stream("stderr")))
    try:
        found = config.load(path)
        if check:
            cluster = server.prepare(found)
            typer.echo(f"{path}: {len(found.device)} devices, cluster map version {cluster.version}")
            return
    except (ConfigError, server.ServerError) as e:
        fail(str(e))

    def announce() -> None:
        typer.echo(f"kvfs: serving {len(found.device)} targets on {', '.join(found.listen)}; stop with Ctrl-C")

    try:
        trio.run(server.serve, found, announce)
    except* (ConfigError, server.ServerError) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        fail(str(error))
