"""`kvfs mount`: an existing data directory at a mount point."""

import errno
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

import msgspec
import typer

from kvfs import daemon
from kvfs.cli.node import configured, run_daemon, run_detached
from kvfs.cli.output import USAGE, fail
from kvfs.config import Size, StoreConfig

EXAMPLES = "Examples:  kvfs mount kvfs:///data/kvfs /mnt/kvfs   |   kvfs mount /data/kvfs /mnt/kvfs --detach"


def _local(url: str) -> Path:
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return Path(url).absolute()
    if parts.scheme != "kvfs" or parts.query or parts.fragment:
        fail(f"{url!r} is not kvfs:///PATH", code=USAGE)
    if parts.netloc not in ("", "localhost"):
        fail(f"{url}: only this machine's data directories can be mounted: kvfs:///PATH", code=USAGE)
    if not parts.path:
        fail(f"{url!r} names no data directory: kvfs:///PATH", code=USAGE)
    return Path(unquote(parts.path))


def mount(
    url: Annotated[str, typer.Argument(metavar="URL", help="kvfs:///PATH of a data directory, or its path.")],
    point: Annotated[Path, typer.Argument(metavar="DIR", help="Where to mount: an empty directory, or a new one.")],
    memory: Annotated[str | None, typer.Option("--memory", help="Bytes of DRAM for hot blocks.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once the mount answers; run in the background.")
    ] = False,
) -> None:
    """Mount an existing data directory: starts its daemon, which serves the ring too, until Ctrl-C or `kvfs down`.

    A new data directory is made by `kvfs up`. Exits 1 if the directory holds no kvfs or one runs there already."""
    place = _local(url)
    layout = daemon.Layout(place)
    try:
        layout.store.stat()
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            fail(f"{place} holds no kvfs; make one with `kvfs up --dir {place}`")
        fail(f"{place} cannot be read: {e.strerror}")
    try:
        running = daemon.ask(place, "status").status
    except daemon.DaemonError:
        running = None  # nothing answers; what else may hold the directory, the daemon's start says
    if running is not None:
        where = f" and is mounted at {running.mount}" if running.mount else ""
        fail(f"the kvfs of {place} runs already (pid {running.pid}){where}; stop it with `kvfs down --dir {place}`")
    config = configured()
    try:
        size = Size.parse(memory) if memory is not None else config.store.memory
    except ValueError as e:
        fail(str(e), code=USAGE)
    config = msgspec.structs.replace(
        config, dir=place, mount=point.absolute(), store=StoreConfig(size=config.store.size, memory=size)
    )
    if detach:
        run_detached(config)
    else:
        run_daemon(config)
