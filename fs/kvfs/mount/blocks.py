"""The view `/.kvfs`: `info` tells engines how to reach the node, and below `blocks/<tenant>/<namespace>/<hh>/<hex key>`
every KV block is a read-only file with no record behind it.

Reading asks the store. A new file's bytes wait in memory and become a block when it is closed, at once or not at all;
after that the handle takes no more. Deleting a file evicts the block. `mkdir <tenant>/<namespace>` makes a namespace.
`.kvfs` is not listed in the root directory, so that a copy or a removal of the tree does not walk through the blocks.
The key of a block whose key was longer than 32 bytes is its hash, shown as `<hex>.long` (it can be read and deleted).
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec
import pyfuse3
import trio

from kvfs.dataplane import KEY_MAX, DataPlane, HashedKey
from kvfs.meta import namespaces
from kvfs.meta.errors import FsError
from kvfs.meta.kv import Store
from kvfs.meta.schema import Inode, Namespace

from .attrs import VIEW_TIMEOUT_S, attributes

VIEW_NAME: Final = b".kvfs"
VIEW_BIT: Final = 1 << 63
VALUE_MAX: Final = 16 << 20
MAX_PENDING_BYTES: Final = 256 << 20
"""All blocks being written through the mount; more is ENOMEM."""
MAX_TENANTS: Final = 1024
LONG: Final = b".long"
SCAN_KEEP_S: Final = 2.0
SCAN_KEEP_ENTRIES: Final = 1 << 20
YIELD_EVERY: Final = 4096

Path = tuple[bytes, ...]
"""Names below the root: (b".kvfs", b"blocks", tenant, namespace, hh, key)."""
BLOCK_DEPTH: Final = 6
INFO_NAME: Final = b"info"
INFO_FORMAT: Final = 1
Listing = dict[bytes, list[tuple[bytes, int, int]]]
MakeNamespace = Callable[[str, str], Namespace]


@dataclass(slots=True)
class Node:
    ino: int
    path: Path
    ns_id: int = 0
    size: int = 0
    mtime_ns: int = 0
    lookups: int = 0
    pending: Pending | None = None


@dataclass(slots=True)
class Pending:
    """A block being written."""

    data: bytearray = field(default_factory=bytearray)
    changed: bool = False
    durable: bool = False
    published: bool = False
    lock: trio.Lock = field(default_factory=trio.Lock)


class Info(msgspec.Struct, frozen=True):
    """What `/.kvfs/info` holds, as JSON."""

    socket: str
    directory: str
    format: int = INFO_FORMAT


@dataclass(slots=True)
class InfoHandle:
    """An open `/.kvfs/info`."""


@dataclass(slots=True)
class BlockHandle:
    node: Node
    ns_id: int
    key: bytes
    pending: Pending | None = None


@dataclass(slots=True)
class ViewDir:
    node: Node
    names: list[tuple[bytes, int, int]]
    """Name, size, mtime: as it was when the directory was opened."""


def block_name(key: bytes) -> bytes:
    return key.hex().encode() + (LONG if isinstance(key, HashedKey) else b"")


def block_key(fan: bytes, name: bytes) -> bytes | None:
    """The key that a file name stands for; None: there can be no such file."""
    text = name.removesuffix(LONG)
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        return None
    if not 1 <= len(key) <= KEY_MAX or key.hex().encode() != text or text[:2] != fan:
        return None
    if text != name:
        return HashedKey(key) if len(key) == KEY_MAX else None
    return key


def is_fan(name: bytes) -> bool:
    return len(name) == 2 and all(c in b"0123456789abcdef" for c in name)


class BlockView:
    def __init__(self, store: Store, data: DataPlane, make_namespace: MakeNamespace, info: Info) -> None:
        self.store = store
        self.data = data
        self._make = make_namespace
        self._uid = os.geteuid()
        self._gid = os.getegid()
        self._by_ino: dict[int, Node] = {}
        self._by_path: dict[Path, Node] = {}
        self._last_ino = VIEW_BIT | 1
        self._info = msgspec.json.encode(info) + b"\n"
        self._top = Node(VIEW_BIT | 1, (VIEW_NAME,))
        self._by_ino[self._top.ino] = self._top
        self._by_path[self._top.path] = self._top
        self._tenants: set[str] = set()
        self._pending_bytes = 0
        self._started_ns = time.time_ns()
        self._listing: tuple[int, float, Listing] | None = None

    # -- nodes

    def _node(self, path: Path) -> Node:
        node = self._by_path.get(path)
        if node is None:
            self._last_ino += 1
            node = Node(self._last_ino, path)
            self._by_ino[node.ino] = node
            self._by_path[path] = node
        return node

    def _find(self, ino: int) -> Node:
        node = self._by_ino.get(ino)
        if node is None:
            raise FsError(errno.ESTALE)
        return node

    def _drop_path(self, node: Node) -> None:
        if self._by_path.get(node.path) is node:
            del self._by_path[node.path]

    def forget(self, ino: int, count: int) -> None:
        node = self._by_ino.get(ino)
        if node is None:
            return
        node.lookups -= count
        if node.lookups <= 0 and node is not self._top:
            del self._by_ino[ino]
            self._drop_path(node)

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        if len(node.path) == BLOCK_DEPTH:
            size = len(node.pending.data) if node.pending is not None else node.size
            when = node.mtime_ns
            entry = attributes(
                Inode(node.ino, stat.S_IFREG | 0o444, 1, self._uid, self._gid, size, 0, when, when, when),
                VIEW_TIMEOUT_S,
            )
            if node.pending is not None:
                entry.entry_timeout = 0
                entry.attr_timeout = 0
            return entry
        when = self._started_ns
        if node.path[1:] == (INFO_NAME,):
            size = len(self._info)
            record = Inode(node.ino, stat.S_IFREG | 0o444, 1, self._uid, self._gid, size, 0, when, when, when)
            return attributes(record, VIEW_TIMEOUT_S)
        mode = stat.S_IFDIR | (0o755 if len(node.path) > 1 else 0o555)
        return attributes(Inode(node.ino, mode, 2, self._uid, self._gid, 0, 0, when, when, when), VIEW_TIMEOUT_S)

    def _counted(self, node: Node) -> pyfuse3.EntryAttributes:
        node.lookups += 1
        return self._attributes(node)

    def root(self) -> pyfuse3.EntryAttributes:
        return self._counted(self._top)

    def getattr(self, ino: int) -> pyfuse3.EntryAttributes:
        return self._attributes(self._find(ino))

    def setattr(self, ino: int, size: int | None) -> pyfuse3.EntryAttributes:
        node = self._find(ino)
        if node.pending is None or node.pending.published:
            raise FsError(errno.EPERM)
        if size is not None:
            self._resize(node.pending, size)
            node.pending.changed = True
        return self._attributes(node)

    # -- names

    def _namespace(self, path: Path) -> Namespace:
        try:
            found = namespaces.get(self.store, path[2].decode("ascii"), path[3].decode("ascii"))
        except (UnicodeDecodeError, FsError):
            found = None
        if found is None:
            raise FsError(errno.ENOENT)
        return found

    def _tenant_names(self) -> set[str]:
        return self._tenants | {n.tenant for n in namespaces.list_all(self.store)}

    async def lookup(self, parent_ino: int, name: bytes) -> pyfuse3.EntryAttributes:
        parent = self._find(parent_ino)
        if name in (b".", b".."):
            path = parent.path if name == b"." else parent.path[:-1] or parent.path
            return self._counted(self._node(path))
        path = (*parent.path, name)
        match len(path):
            case 2:
                exists = name in (b"blocks", INFO_NAME)
            case 3:
                exists = name.decode("utf-8", "replace") in self._tenant_names()
            case 4:
                self._namespace(path)
                exists = True
            case 5:
                exists = is_fan(name)
            case _:
                return await self._lookup_block(path)
        if not exists:
            raise FsError(errno.ENOENT)
        return self._counted(self._node(path))

    async def _lookup_block(self, path: Path) -> pyfuse3.EntryAttributes:
        key = block_key(path[4], path[5])
        if key is None:
            raise FsError(errno.ENOENT)
        ns_id = self._namespace(path).id
        size = await self.data.block_exists(ns_id, key)
        if size is None:
            raise FsError(errno.ENOENT)
        return self._counted(self._block(path, ns_id, size, None))

    def _block(self, path: Path, ns_id: int, size: int, mtime: int | None) -> Node:
        node = self._by_path.get(path)
        if node is not None and (node.ns_id != ns_id or node.size != size):
            self._drop_path(node)  # another block by now: the kernel must not show the old one's pages
            node = None
        if node is None:
            node = self._node(path)
            node.ns_id = ns_id
            node.size = size
            node.mtime_ns = self._started_ns
        if mtime is not None:
            node.mtime_ns = mtime * 1_000_000_000
        return node

    def mkdir(self, parent_ino: int, name: bytes) -> pyfuse3.EntryAttributes:
        path = (*self._find(parent_ino).path, name)
        text = name.decode("utf-8", "replace")
        if len(path) == 3:
            namespaces.check_name(text)
            if text in self._tenant_names():
                raise FsError(errno.EEXIST)
            if len(self._tenants) >= MAX_TENANTS:
                raise FsError(errno.ENOSPC)
            self._tenants.add(text)
        elif len(path) == 4:
            tenant = path[2].decode()
            if namespaces.get(self.store, tenant, text) is not None:
                raise FsError(errno.EEXIST)
            self._make(tenant, text)
        elif len(path) == 5 and is_fan(name):
            raise FsError(errno.EEXIST)
        else:
            raise FsError(errno.EPERM)
        return self._counted(self._node(path))

    async def unlink(self, parent_ino: int, name: bytes) -> None:
        path = (*self._find(parent_ino).path, name)
        key = block_key(path[4], name) if len(path) == BLOCK_DEPTH else None
        if key is None:
            raise FsError(errno.EPERM if len(path) != BLOCK_DEPTH else errno.ENOENT)
        evicted = await self.data.block_evict(self._namespace(path).id, key)
        self._listing = None
        node = self._by_path.get(path)
        if node is not None:
            self._drop_path(node)
        if not evicted:
            raise FsError(errno.ENOENT)

    # -- reading

    def open(self, ino: int, flags: int) -> BlockHandle | InfoHandle:
        node = self._find(ino)
        if node.path[1:] == (INFO_NAME,):
            if flags & os.O_ACCMODE != os.O_RDONLY:
                raise FsError(errno.EACCES)
            return InfoHandle()
        if len(node.path) != BLOCK_DEPTH:
            raise FsError(errno.EISDIR)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FsError(errno.EEXIST if node.pending is None else errno.EBUSY)
        key = block_key(node.path[4], node.path[5])
        if key is None or node.pending is not None:
            raise FsError(errno.ENOENT)
        return BlockHandle(node, node.ns_id, key)

    def read_info(self, off: int, size: int) -> bytes:
        return self._info[off : off + size]

    async def read(self, handle: BlockHandle, off: int, size: int) -> bytes:
        if handle.pending is not None:
            return bytes(handle.pending.data[off : off + size])
        size = min(size, handle.node.size - off)
        if size <= 0:
            return b""
        return await self.data.block_get(handle.ns_id, handle.key, off, size)

    # -- writing

    async def create(self, parent_ino: int, name: bytes, flags: int) -> tuple[BlockHandle, pyfuse3.EntryAttributes]:
        path = (*self._find(parent_ino).path, name)
        key = block_key(path[4], name) if len(path) == BLOCK_DEPTH else None
        if key is None or isinstance(key, HashedKey):
            raise FsError(errno.EPERM if len(path) != BLOCK_DEPTH else errno.EINVAL)
        ns_id = self._namespace(path).id
        if await self.data.block_exists(ns_id, key) is not None:
            raise FsError(errno.EEXIST)
        self._last_ino += 1
        pending = Pending()
        node = Node(self._last_ino, path, ns_id, mtime_ns=time.time_ns(), pending=pending)
        self._by_ino[node.ino] = node
        return BlockHandle(node, ns_id, key, pending), self._counted(node)

    def _resize(self, pending: Pending, size: int) -> None:
        if size > VALUE_MAX:
            raise FsError(errno.EFBIG)
        grown = size - len(pending.data)
        if self._pending_bytes + grown > MAX_PENDING_BYTES:
            raise FsError(errno.ENOMEM)
        if grown > 0:
            pending.data.extend(bytes(grown))
        else:
            del pending.data[size:]
        self._pending_bytes += grown

    def write(self, handle: BlockHandle, off: int, data: bytes) -> int:
        pending = handle.pending
        if pending is None:
            raise FsError(errno.EBADF)
        if pending.published or pending.lock.locked():
            raise FsError(errno.EPERM)
        if off + len(data) > len(pending.data):
            self._resize(pending, off + len(data))
        pending.data[off : off + len(data)] = data
        pending.changed = True
        return len(data)

    async def flush(self, handle: BlockHandle) -> None:
        """Publishes what was written. A close before the first write (the shell's, of a duplicate) does nothing."""
        pending = handle.pending
        if pending is None:
            return
        async with pending.lock:
            if pending.published or not pending.changed or not pending.data:
                return
            await self.data.block_put(handle.ns_id, handle.key, pending.data, pending.durable)
            pending.published = True
            self._listing = None

    async def fsync(self, handle: BlockHandle) -> None:
        """What the close publishes survives power loss when the close has returned."""
        if handle.pending is not None:
            handle.pending.durable = True
        else:
            await self.data.sync()

    def release(self, handle: BlockHandle) -> None:
        if handle.pending is not None:
            self._pending_bytes -= len(handle.pending.data)
            handle.pending.data = bytearray()

    # -- listing

    async def _scan(self, ns_id: int) -> Listing:
        now = time.monotonic()
        if self._listing is not None and self._listing[0] == ns_id and now - self._listing[1] < SCAN_KEEP_S:
            return self._listing[2]
        found: dict[bytes, tuple[int, int]] = {}
        async for key, size, mtime in self.data.block_scan(ns_id):
            found[block_name(key)] = (size, mtime)
            if len(found) % YIELD_EVERY == 0:
                await trio.lowlevel.checkpoint()
        listing: Listing = {}
        for name in sorted(found):
            listing.setdefault(name[:2], []).append((name, *found[name]))
        self._listing = (ns_id, time.monotonic(), listing) if len(found) <= SCAN_KEEP_ENTRIES else None
        return listing

    async def opendir(self, ino: int) -> ViewDir:
        node = self._find(ino)
        path = node.path
        names: list[tuple[bytes, int, int]]
        match len(path):
            case 1:
                names = [(b"blocks", 0, 0), (INFO_NAME, 0, 0)]
            case 2:
                names = [(name.encode(), 0, 0) for name in sorted(self._tenant_names())]
            case 3:
                names = [(n.name.encode(), 0, 0) for n in namespaces.list_all(self.store, path[2].decode())]
            case 4:
                names = [(fan, 0, 0) for fan in sorted(await self._scan(self._namespace(path).id))]
            case 5:
                names = (await self._scan(self._namespace(path).id)).get(path[4], [])
            case _:
                raise FsError(errno.ENOTDIR)
        return ViewDir(node, names)

    async def readdir(self, handle: ViewDir, start: int, token: pyfuse3.ReaddirToken) -> None:
        path = handle.node.path
        ns_id = self._namespace(path).id if len(path) == BLOCK_DEPTH - 1 else 0
        for at in range(start, len(handle.names)):
            name, size, mtime = handle.names[at]
            child = (*path, name)
            node = self._block(child, ns_id, size, mtime) if ns_id else self._node(child)
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), self._attributes(node), at + 1):
                if node.lookups == 0:
                    del self._by_ino[node.ino]
                    self._drop_path(node)
                return
            node.lookups += 1
