"""A chunk server: the devices' nodes, the listeners of one native server over them, the admin port, signals.

SIGHUP reads the cluster file again; SIGTERM and SIGINT end the server in order: no new connections, sessions ended, stores
closed.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from kvfs._node import ffi, lib
from kvfs.cluster import admin, file
from kvfs.cluster.capability import CapabilityError, read_public_key
from kvfs.cluster.config import ChunkConfig, DeviceConfig, admin_address
from kvfs.cluster.map import ClusterMap
from kvfs.cluster.metrics import Source, registry
from kvfs.config import ConfigError
from kvfs.node import ERR_BYTES, Node, NodeConfig, format_store, journal_bytes, make_store, segment_bytes

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
_PROBE: Final = 1 << 20  # bytes at the beginning of a block device that are zeros before it is used for the first time
_RELEASE_TRIES: Final = 100  # of 50 ms: a server that was just killed has its devices a moment longer


class ServerError(Exception):
    """The chunk server cannot start; str() is one sentence that says why."""


class Server:
    """The native server over nodes that run; they must outlive it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    def start(
        cls,
        nodes: Sequence[Node],
        cluster: ClusterMap,
        *,
        auth_key: bytes | None = None,
        sessions: int = 0,
        buffer_bytes: int = 0,
        keep_ms: int = 0,
        data_sums: bool = True,
    ) -> Server:
        err = ffi.new("char[]", ERR_BYTES)
        targets = ffi.new("kvfs_node*[]", [node.handle for node in nodes])
        key = ffi.NULL if auth_key is None else ffi.new("uint8_t[]", auth_key)
        raw = cluster.encode()
        packed = ffi.new("char[]", raw)
        config = ffi.new(
            "struct kvfs_server_config*",
            {
                "targets": targets,
                "target_count": len(nodes),
                "max_sessions": sessions,
                "auth_key": key,
                "map": packed,
                "map_bytes": len(raw),
                "buffer_bytes": buffer_bytes,
                "keep_ms": keep_ms,
                "data_sums": data_sums,
            },
        )
        out = ffi.new("kvfs_server**")
        _raise(lib.kvfs_server_start(config, out, err, ERR_BYTES), err)
        return cls(out[0])

    def listen(self, url: str) -> int:
        """The port, which the system chooses for port 0."""
        err = ffi.new("char[]", ERR_BYTES)
        port: int = lib.kvfs_server_listen(self._handle, url.encode(), err, ERR_BYTES)
        _raise(port, err)
        return port

    def set_map(self, cluster: ClusterMap) -> None:
        err = ffi.new("char[]", ERR_BYTES)
        raw = cluster.encode()
        _raise(lib.kvfs_server_set_map(self._handle, raw, len(raw), err, ERR_BYTES), err)

    def stats(self) -> dict[str, int]:
        """Waits for the reactors' turns: not from trio's thread."""
        out = ffi.new("struct kvfs_net_stats*")
        result: int = lib.kvfs_server_stats(self._handle, out)
        if result < 0:
            raise OSError(-result, f"statistics of the server: {os.strerror(-result)}")
        return {name: getattr(out, name) for name, _ in ffi.typeof("struct kvfs_net_stats").fields}

    def stop(self) -> None:
        handle, self._handle = self._handle, ffi.NULL
        if handle != ffi.NULL:
            lib.kvfs_server_stop(handle)


def _raise(result: int, err: Any) -> None:
    if result < 0:
        raise OSError(-result, ffi.string(err).decode(errors="replace") or os.strerror(-result))


def _is_blank(device: Path) -> bool:
    with open(device, "rb") as raw:
        return not any(raw.read(_PROBE))


def _make_if_new(device: DeviceConfig) -> None:
    """A file that is not there is made; a block device is formatted while it begins with nothing but zeros."""
    path = device.path.absolute()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        make_store(path, device.size)
        log.info("store made", path=str(path), bytes=int(device.size))
        return
    if stat.S_ISBLK(mode) and _is_blank(path):
        with open(path, "rb") as raw:
            size = raw.seek(0, os.SEEK_END)
        format_store(path, size, segment_bytes=segment_bytes(size), journal_bytes=journal_bytes(size))
        log.info("block device formatted", path=str(path), bytes=size)


@asynccontextmanager
async def _node(device: DeviceConfig, cpu: int | None) -> AsyncGenerator[Node]:
    try:
        await trio.to_thread.run_sync(_make_if_new, device)
    except OSError as e:
        raise ServerError(f"{device.path}: no store of {device.size} bytes can be made: {e.strerror}") from e
    native = NodeConfig(device.path.absolute(), memory_bytes=device.memory, cpu=cpu)
    for last in range(_RELEASE_TRIES, -1, -1):
        try:
            node = await trio.to_thread.run_sync(Node.start, native)
        except OSError as e:
            if e.errno not in (errno.EBUSY, errno.EAGAIN) or last == 0:
                raise ServerError(f"{device.path}: {e.strerror}") from e
            await trio.sleep(0.05)
        else:
            break
    else:
        raise AssertionError
    try:
        yield node
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(node.stop)


@asynccontextmanager
async def _server(config: ChunkConfig, nodes: Sequence[Node], cluster: ClusterMap) -> AsyncGenerator[Server]:
    key = None if config.auth_key is None else bytes(read_public_key(config.auth_key))
    try:
        server = Server.start(
            nodes,
            cluster,
            auth_key=key,
            sessions=config.sessions,
            buffer_bytes=config.buffers,
            keep_ms=int(config.keep * 1000),
            data_sums=config.data_sums,
        )
    except OSError as e:
        raise ServerError(f"the server cannot start: {e.strerror}") from e
    try:
        for url in config.listen:
            try:
                port = server.listen(url)
            except OSError as e:
                said = e.strerror or ""
                raise ServerError(said if said.startswith(url) else f"{url}: {said}") from e
            log.info("listening", url=url, port=port)
        yield server
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(server.stop)


def target_ids(config: ChunkConfig, cluster: ClusterMap) -> list[str]:
    """What metrics call each device: the id of the target that the cluster map has at one of our addresses, or its number.

    Addresses such as 0.0.0.0 say only the port; a map that has two servers on one such port tells nothing then."""
    ports = {url.rpartition(":")[2] for url in config.listen if not url.startswith("shm:")}
    out: list[str] = []
    for number in range(len(config.device)):
        ours = [t.id for t in cluster.targets if t.number == number and any(str(e.port) in ports for e in t.endpoints)]
        exact = [
            t.id
            for t in cluster.targets
            if t.number == number and any(str(e).partition("?")[0] in config.listen for e in t.endpoints)
        ]
        found = exact or ours
        out.append(str(found[0]) if len(found) == 1 else f"number-{number}")
    return out


def prepare(config: ChunkConfig) -> ClusterMap:
    """What can be checked before anything starts; ConfigError or ServerError."""
    cluster = file.load_map(config.cluster)
    try:
        if config.auth_key is not None:
            read_public_key(config.auth_key)
    except CapabilityError as e:
        raise ServerError(str(e)) from e
    return cluster


async def serve(config: ChunkConfig, announce: Callable[[], None] = lambda: None) -> None:
    """Runs until SIGTERM or SIGINT. `announce` is called once clients can connect."""
    cluster = prepare(config)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with AsyncExitStack() as stack:
            nodes: list[Node] = []
            for i, device in enumerate(config.device):
                nodes.append(await stack.enter_async_context(_node(device, config.cpus[i] if config.cpus else None)))
            server = await stack.enter_async_context(_server(config, nodes, cluster))
            source = Source(nodes, server, target_ids(config, cluster), cluster.version)
            async with trio.open_nursery() as nursery:
                ready = trio.Event()
                if config.admin:
                    place = admin_address(config.admin)
                    pages = admin.Pages(registry(source), source.alive, ready.is_set)
                    try:
                        await nursery.start(admin.serve, place, pages)
                    except OSError as e:
                        raise ServerError(f"admin address {config.admin}: {e.strerror or e}") from e
                ready.set()
                announce()
                async for number in signals:
                    if number != signal.SIGHUP:
                        break
                    await _reload(config, server, source)
                nursery.cancel_scope.cancel()


async def _reload(config: ChunkConfig, server: Server, source: Source) -> None:
    """A map that cannot be used changes nothing."""
    try:
        cluster = await trio.to_thread.run_sync(file.load_map, config.cluster)
        await trio.to_thread.run_sync(server.set_map, cluster)
    except ConfigError as e:
        log.error("cluster file not taken", why=str(e))
    except OSError as e:
        log.error("cluster map not taken", why=e.strerror)
    else:
        source.map_version = cluster.version
        log.info("cluster map taken", version=cluster.version)
