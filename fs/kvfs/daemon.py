"""The embedded daemon of `kvfs up`: chunk store, metadata and mount of one data directory, in one process.

Owns the data directory's layout and the admin socket, through which `kvfs status` and `kvfs down` talk to it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import stat
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import trio

from kvfs.cluster import remote, volume
from kvfs.cluster.map import Class
from kvfs.config import Config
from kvfs.dataplane import DataPlane
from kvfs.meta import namespaces, schema
from kvfs.meta.errors import FsError
from kvfs.meta.group import GroupStore
from kvfs.meta.kv import Store, StoreError
from kvfs.meta.sqlite import SqliteStore
from kvfs.meta.tree import Tree
from kvfs.mount import service
from kvfs.mount.blocks import Info
from kvfs.mount.files import OpenFiles
from kvfs.node import FileQuestions, Namespace, Node, NodeConfig, RailStats, make_store
from kvfs_usrbio.locate import mount_source

REQUEST_MAX: Final = 4096  # bytes of an admin request
ADMIN_CLIENTS: Final = 16
RELEASE_TRIES: Final = 200  # of 50 ms
UNIX_PATH_BYTES: Final = 108  # of sockaddr_un, its closing 0 included


class DaemonError(Exception):
    """The daemon cannot start or be reached; str() is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a data directory."""

    root: Path

    @property
    def store(self) -> Path:
        return self.root / "store.kvfs"

    @property
    def metadata(self) -> Path:
        return self.root / "meta.db"

    @property
    def socket(self) -> Path:
        return self.root / "kvfs.sock"

    @property
    def admin(self) -> Path:
        return self.root / "admin.sock"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def log(self) -> Path:
        return self.root / "daemon.log"


class StatusReport(msgspec.Struct, frozen=True):
    """What `kvfs status --json` prints."""

    directory: str
    mount: str
    socket: str
    pid: int
    namespaces: list[str]
    stats: dict[str, int]
    remote: str = ""
    """URL of the volume, if its data is on chunk servers."""
    rails: list[RailStats] = []
    """The ways to these."""


class AdminRequest(msgspec.Struct, frozen=True):
    command: str
    tenant: str = ""
    name: str = ""
    durable: bool = False


class AdminAnswer(msgspec.Struct, frozen=True):
    error: str = ""
    status: StatusReport | None = None


@contextlib.contextmanager
def _exclusive(layout: Layout):
    """One daemon per data directory, also after a crash: the kernel drops the lock with the process."""
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DaemonError(
                f"{layout.root} is in use by another kvfs; see `kvfs status --dir {layout.root}`"
            ) from None
        yield
    finally:
        os.close(fd)


def _prepare(config: Config) -> Layout:
    """Makes the directory and, the first time, an empty store."""
    layout = Layout(config.dir.absolute())
    try:
        layout.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        raise DaemonError(f"{layout.root} cannot be made: {e.strerror}") from e
    return layout


def _format_if_new(layout: Layout, config: Config) -> None:
    if layout.store.exists() and layout.store.stat().st_size > 0:
        return
    if layout.metadata.exists():
        raise DaemonError(
            f"{layout.store} is missing but {layout.metadata} is there: this is no complete data directory"
        )
    try:
        make_store(layout.store, config.store.size)
    except OSError as e:
        raise DaemonError(f"a store of {config.store.size} bytes cannot be made in {layout.root}: {e.strerror}") from e


class Daemon:
    """One running node with its metadata and mount. `reached`: the cluster that has its data."""

    def __init__(
        self, layout: Layout, config: Config, node: Node, store: Store, reached: remote.Reached | None = None
    ) -> None:
        self.layout = layout
        self.config = config
        self.node = node
        self.store = store
        self.stop = trio.Event()
        self.mounted = trio.Event()
        self.reached = reached
        if reached is not None:
            self._mirror(reached)
        for known in namespaces.list_all(store):
            self._publish(known.tenant, known.name, known.namespace)

    def _publish(self, tenant: str, name: str, found: schema.Namespace) -> Namespace:
        made = Namespace(found.id, evictable=found.cls == schema.NamespaceClass.CACHE)
        self.node.put_namespace(tenant, name, made)
        return made

    def _mirror(self, reached: remote.Reached) -> None:
        """The namespaces are the cluster's; what the metadata knows of them is for the view of blocks."""
        classes = {Class.CACHE: schema.NamespaceClass.CACHE, Class.DURABLE: schema.NamespaceClass.DURABLE}
        namespaces.mirror(self.store, [(n.tenant, n.name, n.id, classes[n.cls]) for n in reached.blocks()])

    def make_namespace(self, tenant: str, name: str) -> schema.Namespace:
        """Namespaces come into being when they are first opened, as caches; those of a cluster do not."""
        found = namespaces.get(self.store, tenant, name)
        if found is None and self.reached is not None:
            raise FsError(errno.EPERM, f"{tenant}/{name}: namespaces of a cluster are made in its cluster file")
        found = found or namespaces.create(self.store, tenant, name)
        self._publish(tenant, name, found)
        return found

    async def _resolve(self, tenant: str, name: str, uid: int) -> Namespace | None:
        del uid  # whom the socket admits may open any namespace until tenants have rights
        if self.reached is not None:
            return None  # the node knows those of the map
        return self._publish(tenant, name, self.make_namespace(tenant, name))

    def status(self, data: DataPlane) -> StatusReport:
        return StatusReport(
            directory=str(self.layout.root),
            mount=str(self.config.mount_point) if self.mounted.is_set() else "",
            socket=str(self.layout.socket),
            pid=os.getpid(),
            namespaces=[f"{n.tenant}/{n.name}" for n in namespaces.list_all(self.store)],
            stats=data.stats(),
            remote=self.config.remote.url,
            rails=[] if self.reached is None else self.node.rails(),
        )

    async def run(self, *, started: trio.Event) -> None:
        """Serves until stop is set, a signal comes, or somebody unmounts."""
        tree = Tree(self.store, root_uid=os.geteuid(), root_gid=os.getegid())

        def mounted(st_dev: int) -> None:
            self.node.set_mount(st_dev)
            self.mounted.set()
            started.set()

        async with DataPlane.open(self.node) as data, trio.open_nursery() as nursery:
            if self.reached is not None:
                await volume.claim(self.layout.root, self.reached.namespace, self.store, data)
            direct = self.node if self.config.fuse.native else None
            files = OpenFiles(tree, data, direct)

            async def serve_mount() -> None:
                await service.serve(
                    self.config.mount_point.absolute(),
                    tree,
                    data,
                    self.make_namespace,
                    files,
                    Info(socket=str(self.layout.socket), directory=str(self.layout.root)),
                    node=direct,
                    source=mount_source(self.layout.root),
                    mounted=mounted,
                )
                nursery.cancel_scope.cancel()

            nursery.start_soon(serve_mount)
            questions = FileQuestions(files.drop_cached, files.store, service.ended)
            nursery.start_soon(self.node.serve_upcalls, self._resolve, questions)
            nursery.start_soon(self._serve_admin, data)
            await self.stop.wait()
            nursery.cancel_scope.cancel()

    async def _serve_admin(self, data: DataPlane) -> None:
        self.layout.admin.unlink(missing_ok=True)
        listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with listening:
            old = os.umask(0o177)
            try:
                with _socket_address(self.layout.admin) as address:
                    await listening.bind(address)
            finally:
                os.umask(old)
            listening.listen(ADMIN_CLIENTS)
            limit = trio.CapacityLimiter(ADMIN_CLIENTS)
            async with trio.open_nursery() as nursery:
                while True:
                    client, _ = await listening.accept()
                    nursery.start_soon(self._answer, client, limit, data)

    def _create(self, request: AdminRequest) -> AdminAnswer:
        if self.reached is not None:
            return AdminAnswer(error="namespaces of a cluster are made in its cluster file: kvfs cluster add-namespace")
        cls = schema.NamespaceClass.DURABLE if request.durable else schema.NamespaceClass.CACHE
        try:
            made = namespaces.create(self.store, request.tenant, request.name, cls, exist_ok=False)
        except OSError as e:
            return AdminAnswer(error=e.strerror or str(e))
        self._publish(request.tenant, request.name, made)
        return AdminAnswer()

    async def _answer(self, client: trio.socket.SocketType, limit: trio.CapacityLimiter, data: DataPlane) -> None:
        with client, contextlib.suppress(OSError, msgspec.DecodeError):
            async with limit:
                with trio.move_on_after(5):
                    raw = await client.recv(REQUEST_MAX)
                    request = msgspec.json.decode(raw, type=AdminRequest)
                    match request.command:
                        case "status":
                            answer = AdminAnswer(status=self.status(data))
                        case "stop":
                            answer = AdminAnswer()
                            self.stop.set()
                        case "namespace":
                            answer = self._create(request)
                        case other:
                            answer = AdminAnswer(error=f"unknown command {other[:40]!r}")
                    await client.send(msgspec.json.encode(answer))


async def _signals(stop: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            stop.set()


async def _released(layout: Layout) -> None:
    """Waits until a daemon that was just killed has let go of the store: the kernel ends its io_uring a moment later."""
    with open(layout.store, "rb") as store:
        for _ in range(RELEASE_TRIES):
            try:
                fcntl.flock(store, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await trio.sleep(0.05)
            else:
                fcntl.flock(store, fcntl.LOCK_UN)
                return
    raise DaemonError(f"{layout.store} is in use by another process")


def _reach(config: Config) -> remote.Reached:
    return remote.reach(config.remote.url, config.remote.token)


async def _remote_node(layout: Layout, config: Config) -> tuple[NodeConfig, remote.Reached]:
    """For a volume whose data is on chunk servers; the directory is the volume's afterwards."""
    try:
        reached = await trio.to_thread.run_sync(_reach, config)
    except OSError as e:
        raise DaemonError(e.strerror or str(e)) from e
    except ValueError as e:
        raise DaemonError(str(e)) from e
    if reached.namespace.cls is not Class.VOLUME:
        raise DaemonError(
            f"{reached.url}: {reached.namespace} is a namespace of blocks ({reached.namespace.cls}), no volume"
        )
    volume.attach(layout.root, reached.namespace, others=[layout.store, layout.metadata])
    settings = config.remote
    native = reached.config(
        transport=settings.transport,
        connections=settings.connections,
        deadline=settings.deadline,
        data_sums=settings.data_sums,
        rails=settings.rails,
    )
    return NodeConfig(data=None, socket=layout.socket, session_bytes=config.store.shared, remote=native), reached


async def _local_node(layout: Layout, config: Config) -> NodeConfig:
    note = volume.read_note(layout.root)
    if note is not None:
        raise DaemonError(
            f"{layout.root} holds the names of volume {note.tenant}/{note.name}: mount it with "
            f"`kvfs mount kvfs://HOST:PORT/{note.tenant}/{note.name} DIR --dir {layout.root}`"
        )
    await trio.to_thread.run_sync(_format_if_new, layout, config)
    await _released(layout)
    return NodeConfig(
        data=layout.store,
        socket=layout.socket,
        memory_bytes=config.store.memory,
        session_bytes=config.store.shared,
    )


@asynccontextmanager
async def _opened(config: Config) -> AsyncGenerator[Daemon]:
    layout = _prepare(config)
    with _exclusive(layout):
        reached: remote.Reached | None = None
        if config.remote.url:
            native, reached = await _remote_node(layout, config)
        else:
            native = await _local_node(layout, config)
        layout.socket.unlink(missing_ok=True)
        async with Node.open(native) as node:
            store = GroupStore(SqliteStore(layout.metadata))
            try:
                yield Daemon(layout, config, node, store, reached)
            finally:
                store.close()
    for left in (layout.socket, layout.admin):
        left.unlink(missing_ok=True)


async def main(config: Config, started: trio.Event) -> None:
    """Runs the daemon of `config` until it is told to stop. `started` is set once the mount answers."""
    try:
        async with _opened(config) as daemon, trio.open_nursery() as nursery:
            nursery.start_soon(_signals, daemon.stop)
            await daemon.run(started=started)
            nursery.cancel_scope.cancel()
    except* (service.MountError, StoreError, volume.VolumeError) as group:
        raise DaemonError(str(_leaves(group)[0]).rstrip(".")) from None
    except* OSError as group:
        first = next(e for e in _leaves(group) if isinstance(e, OSError))
        place = first.filename if isinstance(first.filename, str) else config.dir
        raise DaemonError(f"{place}: {first.strerror or first}") from group


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for e in group.exceptions:
        found += _leaves(e) if isinstance(e, BaseExceptionGroup) else [e]  # pyright: ignore[reportUnknownArgumentType]
    return found


@contextlib.contextmanager
def _socket_address(path: Path) -> Generator[str]:
    """A Unix socket's address, of 107 bytes at most, for a path of any length (native/ring/unix_address.h)."""
    if len(os.fsencode(path)) < UNIX_PATH_BYTES:
        yield str(path)
        return
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def ask(directory: Path, request: str | AdminRequest) -> AdminAnswer:
    """One question to the daemon of a data directory; DaemonError if none runs there."""
    layout = Layout(directory.absolute())
    try:
        if not stat.S_ISSOCK(layout.admin.stat().st_mode):
            raise DaemonError(f"{layout.admin} is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
            s.settimeout(10)
            with _socket_address(layout.admin) as address:
                s.connect(address)
            s.sendall(msgspec.json.encode(AdminRequest(request) if isinstance(request, str) else request))
            s.shutdown(socket.SHUT_WR)
            raw = b""
            while part := s.recv(65536):
                raw += part
        return msgspec.json.decode(raw, type=AdminAnswer)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ECONNREFUSED):
            raise DaemonError(f"no kvfs runs in {layout.root}; start it with `kvfs up --dir {layout.root}`") from None
        raise DaemonError(f"the kvfs in {layout.root} does not answer: {e.strerror or e}") from e
    except msgspec.DecodeError as e:
        raise DaemonError(f"the kvfs in {layout.root} gave no valid answer") from e
