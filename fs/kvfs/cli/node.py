"""`kvfs up`, `down`, `status`: the daemon of one data directory."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import trio
import typer

from kvfs import daemon
from kvfs.cli.output import USAGE, fail, print_json
from kvfs.config import Config, ConfigError, Size, StoreConfig, environment, load
from kvfs.meta import namespaces
from kvfs.meta.errors import FsError
from kvfs_usrbio.locate import mounted_from

UP_EXAMPLES = "Examples:  kvfs up   |   kvfs up --dir /data/kvfs --mount /mnt/kvfs --size 64G --detach"
DOWN_EXAMPLES = "Examples:  kvfs down   |   kvfs down --dir /data/kvfs"
STATUS_EXAMPLES = "Examples:  kvfs status   |   kvfs status --dir /data/kvfs --json"
NO_TIER = "hot blocks of a volume are in the memory of its chunk servers (`memory` of each [[device]])"
START_S = 120
STOP_S = 60

Directory = Annotated[
    Path | None, typer.Option("--dir", help="Data directory, or its mount (default: the configured one).")
]


def configured(file: Path | None = None) -> Config:
    try:
        return load(file)
    except ConfigError as e:
        fail(str(e))


def resolve(directory: Path | None) -> Path:
    """The data directory that is meant: itself, behind a mount of it, or the configured one."""
    place = (directory or configured().dir).absolute()
    return mounted_from(place) or place


def split_namespace(text: str) -> tuple[str, str]:
    """TENANT/NAME; the tenant is `default` where there is none."""
    tenant, slash, name = text.partition("/")
    tenant, name = (tenant, name) if slash else ("default", tenant)
    try:
        namespaces.check_name(tenant)
        namespaces.check_name(name)
    except FsError as e:
        fail((e.strerror or "").partition(": ")[2] or str(e), code=USAGE)
    return tenant, name


def known_namespaces(place: Path) -> list[str]:
    """Of the kvfs that runs in this data directory; ends the command if none does."""
    try:
        status = daemon.ask(place, "status").status
    except daemon.DaemonError as e:
        fail(str(e))
    return status.namespaces if status is not None else []


def up(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Data directory (default: the configured one).")
    ] = None,
    mount: Annotated[Path | None, typer.Option("--mount", help="Where to mount (default: DIR/mnt).")] = None,
    size: Annotated[str | None, typer.Option("--size", help="Bytes of a new store, such as 8G.")] = None,
    memory: Annotated[str | None, typer.Option("--memory", help="Bytes of DRAM for hot blocks.")] = None,
    shared: Annotated[
        str | None, typer.Option("--shared", help="Bytes of memory that one client may share with kvfs.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once the mount answers; run in the background.")
    ] = False,
    file: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file to read.")] = None,
) -> None:
    """Start kvfs on this machine: chunk store, metadata and mount of one data directory."""
    config = configured(file)
    if config.remote.url and memory is not None:
        fail(f"remote.url names a volume, --memory is for data in a directory: {NO_TIER}", code=USAGE)
    try:
        store = StoreConfig(
            size=Size.parse(size) if size is not None else config.store.size,
            memory=Size.parse(memory) if memory is not None else config.store.memory,
            shared=Size.parse(shared) if shared is not None else config.store.shared,
        )
    except ValueError as e:
        fail(str(e), code=USAGE)
    config = msgspec.structs.replace(
        config,
        dir=(directory or config.dir).absolute(),
        mount=(mount.absolute() if mount is not None else config.mount),
        store=store,
    )
    if detach:
        run_detached(config)
    else:
        run_daemon(config)


def run_daemon(config: Config) -> None:
    """In the foreground, until it is told to stop."""

    async def run() -> None:
        started = trio.Event()

        async def announce() -> None:
            await started.wait()
            typer.echo(f"kvfs: mounted at {config.mount_point}; stop with Ctrl-C or `kvfs down --dir {config.dir}`")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(announce)
            await daemon.main(config, started)
            nursery.cancel_scope.cancel()

    try:
        trio.run(run)
    except* daemon.DaemonError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        fail(str(error))


def run_detached(config: Config) -> None:
    """Starts `kvfs up` or `mount` in a session of its own and waits until it answers or ends."""
    layout = daemon.Layout(config.dir)
    layout.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    command = [sys.executable, "-m", "kvfs"]
    if config.remote.url:
        command += ["mount", config.remote.url, str(config.mount_point), "--dir", str(config.dir)]
    else:
        command += ["up", "--dir", str(config.dir), "--mount", str(config.mount_point)]
    with open(layout.log, "ab") as log:
        offset = log.tell()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env={**os.environ, **environment(config)},
        )
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            with open(layout.log, "rb") as log:
                log.seek(offset)
                said = log.read(65536).decode(errors="replace").strip().splitlines()
            fail(
                (said[-1].removeprefix("kvfs: ") if said else "the daemon ended without a word")
                + f" (see {layout.log})"
            )
        try:
            status = daemon.ask(config.dir, "status").status
        except daemon.DaemonError:
            status = None
        if status is not None and status.mount and status.pid == child.pid:
            typer.echo(
                f"kvfs: mounted at {config.mount_point} (pid {child.pid}); stop with `kvfs down --dir {config.dir}`"
            )
            return
        time.sleep(0.05)
    fail(f"the daemon did not mount within {START_S} s (see {layout.log})")


def down(directory: Directory = None) -> None:
    """Stop the kvfs of a data directory: unmount, write everything, end. Exits 1 if none runs."""
    place = resolve(directory)
    try:
        before = daemon.ask(place, "status").status
        daemon.ask(place, "stop")
    except daemon.DaemonError as e:
        fail(str(e))
    deadline = time.monotonic() + STOP_S
    while before is not None and _alive(before.pid):
        if time.monotonic() > deadline:
            fail(f"the daemon (pid {before.pid}) still runs after {STOP_S} s")
        time.sleep(0.02)
    typer.echo("kvfs: stopped")


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rsplit(")", 1)[1].split()[0] != "Z" and os.path.exists(f"/proc/{pid}")


def status(
    directory: Directory = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")] = False,
) -> None:
    """Show what the kvfs of a data directory holds and has done. Exits 1 if none runs."""
    place = resolve(directory)
    try:
        answer = daemon.ask(place, "status")
    except daemon.DaemonError as e:
        fail(str(e))
    if answer.status is None:
        fail(answer.error or "no answer")
    if json:
        print_json(answer.status)
        return
    report, s = answer.status, answer.status.stats
    typer.echo(f"directory   {report.directory} (pid {report.pid})")
    typer.echo(f"mount       {report.mount or '(not mounted)'}")
    if report.remote:
        up = sum(1 for rail in report.rails if rail.up)
        typer.echo(f"volume      {report.remote} ({up} of {len(report.rails)} ways up)")
    typer.echo(f"namespaces  {', '.join(report.namespaces) or '(none)'}")
    typer.echo(
        f"blocks      {s['block_chunks']}, file chunks {s['file_chunks']}, {s['data_bytes'] / 1e6:.1f} MB of data"
    )
    typer.echo(
        f"space       {s['free_bytes'] / 1e9:.2f} of {s['capacity_bytes'] / 1e9:.2f} GB free, {s['evictions']} evictions"
    )
    typer.echo(f"damage      {s['checksum_errors']} checksum errors, {s['io_errors']} I/O errors")
