"""The native node as the daemon owns it: format, start, stop, the namespaces it knows, its questions answered."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from kvfs._node import ffi, lib

ERR_BYTES = 512
SEGMENT_BYTES = 32 << 20
JOURNAL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """Chunks on chunk servers, for NodeConfig: `cluster` is a cluster map, `capability` proves this client's rights."""

    cluster: bytes
    capability: bytes = b""
    file_namespace: int = 0
    """Where file chunks are; 0: there are none, files are refused."""
    transport: int = 0
    """lib's numbers: 0 any, shared memory and RDMA first; 1 TCP; 2 RDMA."""
    connections: int = 0
    deadline_ms: int = 0
    data_sums: bool = True
    rails: str = ""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """`data` is a block device or a file; None, and `remote` set: the chunks are on chunk servers. 0 stands for the native
    default, where there is one."""

    data: Path | None
    socket: Path | None = None
    memory_bytes: int = 0
    dirty_bytes: int = 0
    verify: bool = True
    allowed_uid: int | None = None
    max_sessions: int = 0
    session_bytes: int = 0
    read_only: bool = False
    mount_dev: int = 0
    high_watermark: float = 0.0
    low_watermark: float = 0.0
    remote: RemoteConfig | None = None
    cpu: int | None = None
    """Where the reactor runs; None: anywhere."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """`uid` may open it, besides root and the daemon's own user; None is everybody whom the socket admits."""

    id: int
    evictable: bool = True
    uid: int | None = None


@dataclass(frozen=True, slots=True)
class FileQuestions:
    """What a client's operation on an open file of the mount waits for; an OSError is passed on to it."""

    drop: Callable[[int], Awaitable[None]]
    """The client has written to the inode: the kernel's pages and attributes of it must go."""
    store: Callable[[int], Awaitable[None]]
    """The client's fsync: the inode's size and times must be made durable."""
    unmounted: Callable[[], None] = lambda: None
    """The kernel has ended the mount of fuse_start."""


@dataclass(frozen=True, slots=True)
class RailStats:
    """One way to one target; `speed` in Mbit/s, 0 when not known; `transport` 1 TCP, 2 RDMA, 3 shared memory."""

    target: int
    rail: int
    name: str
    transport: int
    connections: int
    up: int
    speed: int
    bytes_in: int
    bytes_out: int
    ops: int
    failures: int
    reconnects: int
    inflight_bytes: int


# Called for a namespace that a client opens and the node does not know: (tenant, name, the client's uid).
# None: there is none. An OSError is passed on to the client.
Resolver = Callable[[str, str, int], Awaitable[Namespace | None]]


def _raise(result: int, err: Any) -> None:
    if result < 0:
        raise OSError(-result, ffi.string(err).decode(errors="replace"))


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")


def format_store(
    data: Path, size: int, *, segment_bytes: int = SEGMENT_BYTES, journal_bytes: int = JOURNAL_BYTES
) -> None:
    """Makes an empty store; whatever `data` held is lost. A file is made, or grown, to `size` bytes."""
    err = ffi.new("char[]", ERR_BYTES)
    _raise(lib.kvfs_node_format(bytes(data), size, segment_bytes, journal_bytes, err, ERR_BYTES), err)


def make_store(path: Path, size: int) -> None:
    """An empty store of `size` bytes in a new file, which is there whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    try:
        format_store(new, size, segment_bytes=segment_bytes(size), journal_bytes=journal_bytes(size))
    except OSError:
        new.unlink(missing_ok=True)
        raise
    new.rename(path)


def segment_bytes(size: int) -> int:
    """Of a store of this size: the smallest power of two that makes at most 1024 segments, from 1 to 16 MiB."""
    segment = 1 << 20
    while segment < 16 << 20 and size // segment > 1024:
        segment *= 2
    return segment


def journal_bytes(size: int) -> int:
    return min(max(size // 64, 4 << 20), 64 << 20)


def _remote(config: RemoteConfig, keep: list[Any]) -> Any:
    cluster = ffi.new("char[]", config.cluster)
    capability = ffi.new("char[]", config.capability) if config.capability else ffi.NULL
    rails = ffi.new("char[]", config.rails.encode()) if config.rails else ffi.NULL
    native = ffi.new(
        "struct kvfs_remote_config*",
        {
            "map": cluster,
            "map_bytes": len(config.cluster),
            "capability": capability,
            "capability_bytes": len(config.capability),
            "file_ns": config.file_namespace,
            "transport": config.transport,
            "connections": config.connections,
            "deadline_ms": config.deadline_ms,
            "data_sums": config.data_sums,
            "rails": rails,
        },
    )
    keep += [cluster, capability, rails, native]
    return native


class Node:
    """A running node. `async with Node.open(config)` also stops it, whatever happens."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    @classmethod
    def start(cls, config: NodeConfig) -> Node:
        """Opens the store (recovering it if it was not closed) and serves the socket. May take seconds."""
        err = ffi.new("char[]", ERR_BYTES)
        data = ffi.NULL if config.data is None else ffi.new("char[]", bytes(config.data))
        keep: list[Any] = []  # what `remote` points to
        remote = ffi.NULL if config.remote is None else _remote(config.remote, keep)
        socket = ffi.NULL if config.socket is None else ffi.new("char[]", bytes(config.socket))
        native = ffi.new(
            "struct kvfs_node_config*",
            {
                "data_path": data,
                "socket_path": socket,
                "memory_bytes": config.memory_bytes,
                "dirty_bytes": config.dirty_bytes,
                "verify": config.verify,
                "allowed_uid": lib.KVFS_ANY_UID if config.allowed_uid is None else config.allowed_uid,
                "max_sessions": config.max_sessions,
                "read_only": config.read_only,
                "session_bytes": config.session_bytes,
                "mount_dev": config.mount_dev,
                "high_watermark": config.high_watermark,
                "low_watermark": config.low_watermark,
                "remote": remote,
                "pin_cpu": 0 if config.cpu is None else config.cpu + 1,
            },
        )
        out = ffi.new("kvfs_node**")
        _raise(lib.kvfs_node_start(native, out, err, ERR_BYTES), err)
        keep.clear()
        return cls(out[0])

    def stop(self) -> None:
        """Ends all sessions, drains, checkpoints. No data plane of this node may be open."""
        handle, self.handle = self.handle, ffi.NULL
        if handle != ffi.NULL:
            err = ffi.new("char[]", ERR_BYTES)
            _raise(lib.kvfs_node_stop(handle, err, ERR_BYTES), err)

    @staticmethod
    @asynccontextmanager
    async def open(config: NodeConfig) -> AsyncGenerator[Node]:
        node = await trio.to_thread.run_sync(Node.start, config)
        try:
            yield node
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(node.stop)

    def stats(self) -> dict[str, int]:
        """Waits for the reactor's turn: not from trio's thread."""
        out = ffi.new("struct kvfs_node_stats*")
        _check(lib.kvfs_node_stats(self.handle, out), "statistics of the node")
        return {name: getattr(out, name) for name, _ in ffi.typeof("struct kvfs_node_stats").fields}

    def rails(self) -> list[RailStats]:
        """The connections to chunk servers, of a node with `remote`."""
        room = 64
        while True:
            out = ffi.new("struct kvfs_rail_stats[]", room)
            count: int = lib.kvfs_node_rails(self.handle, out, room)
            _check(count, "rails of the node")
            if count <= room:
                break
            room = count
        names = [name for name, _ in ffi.typeof("struct kvfs_rail_stats").fields]
        rows = [{n: getattr(out[i], n) for n in names} for i in range(count)]
        return [RailStats(**{**row, "name": ffi.string(row["name"]).decode(errors="replace")}) for row in rows]

    def put_namespace(self, tenant: str, name: str, namespace: Namespace) -> None:
        uid = lib.KVFS_ANY_UID if namespace.uid is None else namespace.uid
        result = lib.kvfs_node_ns_put(
            self.handle, tenant.encode(), name.encode(), namespace.id, int(namespace.evictable), uid
        )
        if result < 0:
            raise OSError(-result, f"namespace {tenant}/{name}")

    def set_mount(self, st_dev: int) -> None:
        """The mount whose open files clients may register."""
        result = lib.kvfs_node_set_mount(self.handle, st_dev)
        if result < 0:
            raise OSError(-result, "the node serves no file handles")

    def fuse_start(self, kernel: int, daemon: int) -> None:
        """Serves the mount whose /dev/fuse is `kernel`, passing on what is not its own to `daemon`, one end of a
        SOCK_SEQPACKET socketpair. Both descriptors are the node's from now on."""
        err = ffi.new("char[]", ERR_BYTES)
        _raise(lib.kvfs_node_fuse_start(self.handle, kernel, daemon, err, ERR_BYTES), err)

    def fuse_direct(self, direct: int, opcodes: Iterable[int]) -> None:
        """Requests with one of `opcodes` on the tree's inodes go to the socket `direct` instead, whose reader answers on
        /dev/fuse itself. The descriptor is the node's from now on."""
        result = lib.kvfs_node_fuse_direct(self.handle, direct, sum(1 << code for code in set(opcodes)))
        if result < 0:
            raise OSError(-result, "the node serves no mount")

    def fuse_attr(self, ino: int, answer: bytes | None) -> bool:
        """Leaves an answer to GETATTR of a directory, which the caller keeps right; None takes it back. False: no room, or
        no mount any more."""
        value = ffi.NULL if answer is None else ffi.from_buffer(answer)
        return lib.kvfs_node_fuse_attr(self.handle, ino, value, 0 if answer is None else len(answer)) >= 0

    def fuse_entries(self, parent: int, entries: bytes) -> bool:
        """Leaves answers to LOOKUP in a directory, each for one use: as READDIRPLUS has them, of inodes with one name. Each
        change must be told. False: no room for all, or no mount any more."""
        return lib.kvfs_node_fuse_entries(self.handle, parent, ffi.from_buffer(entries), len(entries)) >= 0

    def fuse_entry_changed(self, ino: int) -> None:
        """Takes such an answer back, if there is one."""
        lib.kvfs_node_fuse_entry_changed(self.handle, ino)

    def fuse_stop(self) -> None:
        """Returns when every request under way has ended."""
        result = lib.kvfs_node_fuse_stop(self.handle)
        if result < 0:
            raise OSError(-result, "the node serves no mount")

    def fuse_invalidate(self, ino: int) -> None:
        """The kernel forgets pages and attributes of `ino`; FileNotFoundError: it does not know it. Waits for reads of it
        under way, so not from trio's thread."""
        result = lib.kvfs_node_fuse_invalidate(self.handle, ino)
        if result < 0:
            raise OSError(-result, f"invalidation of inode {ino}")

    async def serve_upcalls(self, resolve: Resolver, files: FileQuestions | None = None) -> None:
        """Answers opens of unknown namespaces, one at a time, and questions about files, side by side, until cancelled.

        Those about files are at most one per open inode and fsync.
        """
        fd: int = lib.kvfs_node_upcall_fd(self.handle)
        call = ffi.new("struct kvfs_upcall*")
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(fd)
                while lib.kvfs_node_next_upcall(self.handle, call) == 1:
                    if call.kind == lib.KVFS_UPCALL_UNMOUNTED:
                        if files is not None:
                            files.unmounted()
                        continue
                    if call.kind != lib.KVFS_UPCALL_NAMESPACE:
                        nursery.start_soon(self._answer_file, call.id, call.kind, call.ino, files)
                        continue
                    number: int = call.id
                    answer = errno.EIO
                    try:
                        answer = await self._resolve(call, resolve)
                    finally:
                        lib.kvfs_node_answer(self.handle, number, answer)

    async def _answer_file(self, number: int, kind: int, ino: int, files: FileQuestions | None) -> None:
        answer = errno.EIO
        try:
            if files is not None:
                await (files.drop if kind == lib.KVFS_UPCALL_DROP else files.store)(ino)
            answer = 0
        except OSError as error:
            answer = error.errno or errno.EIO
        finally:
            lib.kvfs_node_answer(self.handle, number, answer)

    async def _resolve(self, call: Any, resolve: Resolver) -> int:
        """0 or the errno for the client."""
        try:
            tenant, name = ffi.string(call.tenant).decode(), ffi.string(call.name).decode()
        except UnicodeDecodeError:
            return errno.EINVAL
        try:
            found = await resolve(tenant, name, call.uid)
            if found is None:
                return errno.ENOENT
            self.put_namespace(tenant, name, found)
        except OSError as e:
            return e.errno or errno.EIO
        return 0
