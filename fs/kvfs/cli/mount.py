"""`kvfs mount`: an existing data directory, or a volume of a cluster, at a mount point."""

import errno
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

import msgspec
import typer

from kvfs import daemon
from kvfs.cli.node import NO_TIER, configured, run_daemon, run_detached
from kvfs.cli.output import USAGE, fail
from kvfs.cluster import remote, volume
from kvfs.config import Config, RemoteConfig, Size
from kvfs_usrbio.remote import is_remote

EXAMPLES = (
    "Examples:  kvfs mount kvfs:///data/kvfs /mnt/kvfs   |   kvfs mount /data/kvfs /mnt/kvfs --detach   |   "
    "kvfs mount kvfs://10.0.0.1:7117,10.0.0.2:7117/acme/home /mnt/home --token acme.token"
)


def _local(url: str) -> Path:
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return Path(url).absolute()
    if parts.scheme != "kvfs" or parts.query or parts.fragment:
        fail(f"{url!r} is not kvfs:///PATH", code=USAGE)
    if not parts.path:
        fail(f"{url!r} names no data directory: kvfs:///PATH", code=USAGE)
    return Path(unquote(parts.path))


def _existing(place: Path) -> Path:
    try:
        daemon.Layout(place).store.stat()
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.ENOTDIR):
            fail(f"{place} cannot be read: {e.strerror}")
        if (place / volume.NOTE).exists():
            fail(
                f"{place} holds the names of a volume: mount that, with kvfs://HOST:PORT/TENANT/VOLUME and --dir {place}"
            )
        fail(f"{place} holds no kvfs; make one with `kvfs up --dir {place}`")
    return place


def _volume(url: str, directory: Path | None, token: Path | None, config: Config) -> tuple[Path, RemoteConfig]:
    """The data directory and the settings."""
    try:
        named = remote.parse_url(url)
    except ValueError as e:
        fail(str(e), code=USAGE)
    place = directory or config.dir / "volumes" / named.tenant / named.name
    settings = msgspec.structs.replace(config.remote, url=url)
    if token is not None:
        settings = msgspec.structs.replace(settings, token=token.absolute())
    return place.absolute(), settings


def mount(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="kvfs:///PATH of a data directory, its path, or kvfs://HOST:PORT/TENANT/VOLUME."
        ),
    ],
    point: Annotated[Path, typer.Argument(metavar="DIR", help="Where to mount: an empty directory, or a new one.")],
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Of a volume: where its names are kept (default: below the configured one)."),
    ] = None,
    token: Annotated[Path | None, typer.Option("--token", help="Of a volume: what gives the right to it.")] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Of a data directory: bytes of DRAM for hot blocks.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once the mount answers; run in the background.")
    ] = False,
) -> None:
    """Mount an existing data directory, or a volume whose data is on chunk servers: starts the daemon, which serves the
    ring too, until Ctrl-C or `kvfs down`.

    A new data directory is made by `kvfs up`, that of a volume by its first mount; names are in it alone, so every mount of
    a volume needs the same. Exits 1 if the directory holds no kvfs, or one runs there already, or the volume belongs to
    another directory or cannot be reached."""
    config = configured()
    if is_remote(url):
        if memory is not None:
            fail(f"--memory is for data directories: {NO_TIER}", code=USAGE)
        place, settings = _volume(url, directory, token, config)
    elif directory is not None or token is not None:
        fail("--dir and --token are for volumes: kvfs://HOST:PORT/TENANT/VOLUME", code=USAGE)
    else:
        place, settings = _existing(_local(url)), RemoteConfig()
    try:
        running = daemon.ask(place, "status").status
    except daemon.DaemonError:
        running = None  # nothing answers; what else may hold the directory, the daemon's start says
    if running is not None:
        where = f" and is mounted at {running.mount}" if running.mount else ""
        fail(f"the kvfs of {place} runs already (pid {running.pid}){where}; stop it with `kvfs down --dir {place}`")
    try:
        size = Size.parse(memory) if memory is not None else config.store.memory
    except ValueError as e:
        fail(str(e), code=USAGE)
    store = msgspec.structs.replace(config.store, memory=size)
    config = msgspec.structs.replace(config, dir=place, mount=point.absolute(), store=store, remote=settings)
    if detach:
        run_detached(config)
    else:
        run_daemon(config)
