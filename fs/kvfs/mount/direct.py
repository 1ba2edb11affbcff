"""Answers the kernel's most frequent requests on the tree without pyfuse3, whose dispatch costs several times what they do.

The node sends these requests here as they come from the kernel, and the answers are written straight to /dev/fuse. A handler
answers at once; what must wait becomes a task. pyfuse3 can serve every one of them too, and does without a node. Layouts
and names: linux/fuse.h.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterable, Iterator
from struct import Struct
from typing import Final

import pyfuse3
import trio

from kvfs.meta.errors import FsError
from kvfs.meta.schema import Inode
from kvfs.node import Node

from .attrs import error_number
from .blocks import VIEW_NAME, ViewDir
from .ops import DirHandle, MountOps
from .packing import (
    NO_ENTRY,
    SMALLEST_DIRENT,
    SMALLEST_ENTRY,
    UNKNOWN_INO,
    attr_out,
    dirent,
    direntplus,
    entry_out,
    view_entry,
)
from .prefetch import EntryPrefetch

REQUEST_BYTES: Final = 8192
"""More than a head and the longest name."""
BUDGET: Final = 32
"""Requests answered before other tasks get their turn."""
ANSWER_MAX: Final = 1 << 20
TASKS: Final = 64
LEFT_MAX: Final = 4096
"""Directories whose attributes the node has (native: AttrTable::kMost)."""

LOOKUP: Final = 1
GETATTR: Final = 3
UNLINK: Final = 10
OPEN: Final = 14
RELEASE: Final = 18
GETXATTR: Final = 22
FLUSH: Final = 25
OPENDIR: Final = 27
READDIR: Final = 28
RELEASEDIR: Final = 29
CREATE: Final = 35
READDIRPLUS: Final = 44

FOPEN_KEEP_CACHE: Final = 2

_IN: Final = Struct("<IIQQIIIHH")
_OUT: Final = Struct("<IiQ")
_OPEN_OUT: Final = Struct("<QIi")
_CREATE_IN: Final = Struct("<IIII")
_OPEN_IN: Final = Struct("<II")
_GETXATTR_IN: Final = Struct("<II")
_GETXATTR_OUT: Final = Struct("<II")
_FH_IN: Final = Struct("<Q")
_READ_IN: Final = Struct("<QQI")

Later = Awaitable[bytes | None]
Reply = bytes | Later
"""What follows the answer's head, or what must be awaited for it."""


class DirectRequests:
    def __init__(self, ops: MountOps, node: Node, requests: socket.socket, kernel: int) -> None:
        """`requests` is the far end of the node's socket, `kernel` /dev/fuse; both stay the caller's."""
        self.ops = ops
        self._node = node
        self._left: set[int] = set()
        """Directories for which the node has an answer to GETATTR."""
        ops.tree.on_change = self._changed
        self.prefetch = EntryPrefetch(ops, node)
        self._requests = requests
        self._kernel = kernel
        self._handlers: dict[int, Callable[[int, bytes, int, int], Reply]] = {
            LOOKUP: self._lookup,
            GETATTR: self._getattr,
            UNLINK: self._unlink,
            OPEN: self._open,
            RELEASE: self._release,
            GETXATTR: self._getxattr,
            FLUSH: self._flush,
            OPENDIR: self._opendir,
            RELEASEDIR: self._releasedir,
            CREATE: self._create,
            READDIR: self._readdir,
            READDIRPLUS: self._readdirplus,
        }

    OPCODES: Final = (
        LOOKUP,
        GETATTR,
        UNLINK,
        OPEN,
        RELEASE,
        GETXATTR,
        FLUSH,
        OPENDIR,
        READDIR,
        RELEASEDIR,
        CREATE,
        READDIRPLUS,
    )

    async def serve(self) -> None:
        """Until cancelled or the node closes its end."""
        self._requests.setblocking(False)
        limit = trio.CapacityLimiter(TASKS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.prefetch.run)
            while True:
                await trio.lowlevel.wait_readable(self._requests)
                for _ in range(BUDGET):
                    try:
                        message = self._requests.recv(REQUEST_BYTES)
                    except BlockingIOError:
                        break
                    if not message:
                        nursery.cancel_scope.cancel()
                        return
                    later = self._take(message)
                    if later is not None:
                        nursery.start_soon(self._finish, *later, limit)

    def _take(self, message: bytes) -> tuple[int, int, Later] | None:
        """Answers, or returns the request's number, opcode and what is to be awaited first."""
        _, opcode, unique, nodeid, uid, gid, _, _, _ = _IN.unpack_from(message)
        try:
            reply = self._handlers[opcode](nodeid, message, uid, gid)
        except Exception as error:
            self._answer(unique, -error_number(error, opcode))
            return None
        if isinstance(reply, bytes):
            self._answer(unique, 0, reply)
            return None
        return unique, opcode, reply

    async def _finish(self, unique: int, opcode: int, what: Later, limit: trio.CapacityLimiter) -> None:
        code, body = 0, None
        async with limit:
            try:
                body = await what
            except Exception as error:
                code = -error_number(error, opcode)
        self._answer(unique, code, body or b"")

    def _answer(self, unique: int, code: int, body: bytes = b"") -> None:
        try:
            os.write(self._kernel, _OUT.pack(_OUT.size + len(body), code, unique) + body)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EPERM):  # nobody waits for it any more; unmounted
                raise

    # -- handlers: node, message, uid, gid

    def _lookup(self, nodeid: int, message: bytes, uid: int, gid: int) -> bytes:
        name = message[_IN.size : -1]
        if nodeid == pyfuse3.ROOT_INODE and name == VIEW_NAME:
            return view_entry(self.ops.view.root())
        inode = self.ops.tree.find(nodeid, name)
        if inode is None:
            return NO_ENTRY
        self.prefetch.missed(nodeid)
        return entry_out(self.ops.files.overlay(inode))

    def _getattr(self, nodeid: int, message: bytes, uid: int, gid: int) -> bytes:
        inode = self.ops.files.overlay(self.ops.tree.getattr(nodeid))
        answer = attr_out(inode)
        if stat.S_ISDIR(inode.mode):
            if len(self._left) >= LEFT_MAX and nodeid not in self._left:
                self._node.fuse_attr(self._left.pop(), None)
            if self._node.fuse_attr(nodeid, answer):
                self._left.add(nodeid)
        return answer

    def _changed(self, ino: int, inode: Inode | None) -> None:
        """The tree has changed an inode."""
        self.prefetch.changed(ino)
        if ino not in self._left:
            return
        if inode is None:
            self._left.discard(ino)
            self._node.fuse_attr(ino, None)
        else:
            self._node.fuse_attr(ino, attr_out(inode))

    def _create(self, nodeid: int, message: bytes, uid: int, gid: int) -> bytes:
        _, mode, _, _ = _CREATE_IN.unpack_from(message, _IN.size)
        name = message[_IN.size + _CREATE_IN.size : -1]
        fh, inode = self.ops.create_file(nodeid, name, mode, uid, gid)
        return entry_out(inode) + _OPEN_OUT.pack(fh, 0, 0)

    def _open(self, nodeid: int, message: bytes, uid: int, gid: int) -> Reply:
        flags, _ = _OPEN_IN.unpack_from(message, _IN.size)
        if flags & os.O_TRUNC:
            return self._open_empty(nodeid, uid)
        return _OPEN_OUT.pack(self.ops.open_file(nodeid), FOPEN_KEEP_CACHE, 0)

    async def _open_empty(self, nodeid: int, uid: int) -> bytes:
        await self.ops.empty(nodeid, uid)
        return _OPEN_OUT.pack(self.ops.open_file(nodeid), FOPEN_KEEP_CACHE, 0)

    def _release(self, nodeid: int, message: bytes, uid: int, gid: int) -> Reply:
        return self.ops.release_now(_FH_IN.unpack_from(message, _IN.size)[0]) or b""

    def _getxattr(self, nodeid: int, message: bytes, uid: int, gid: int) -> bytes:
        size, _ = _GETXATTR_IN.unpack_from(message, _IN.size)
        value = self.ops.attribute(nodeid, message[_IN.size + _GETXATTR_IN.size : -1])
        if size == 0:
            return _GETXATTR_OUT.pack(len(value), 0)
        if len(value) > size:
            raise FsError(errno.ERANGE)
        return value

    def _flush(self, nodeid: int, message: bytes, uid: int, gid: int) -> bytes:
        self.ops.flush_file(_FH_IN.unpack_from(message, _IN.size)[0])
        return b""

    def _unlink(self, nodeid: int, message: bytes, uid: int, gid: int) -> Reply:
        return self.ops.unlink_now(nodeid, message[_IN.size : -1]) or b""

    def _opendir(self, nodeid: int, message: bytes, uid: int, gid: int) -> bytes:
        return _OPEN_OUT.pack(self.ops.open_directory(nodeid), 0, 0)

    def _releasedir(self, nodeid: int, message: bytes, uid: int, gid: int) -> bytes:
        self.ops.close_directory(_FH_IN.unpack_from(message, _IN.size)[0])
        return b""

    def _readdir(self, nodeid: int, message: bytes, uid: int, gid: int) -> bytes:
        """Names alone: the kernel asks in this way while nobody looks at what they name."""
        fh, cookie, size = _READ_IN.unpack_from(message, _IN.size)
        handle = self.ops.handle(fh)
        if isinstance(handle, ViewDir):
            names = enumerate(handle.names[cookie:], cookie + 1)
            return _fit(size, (dirent(UNKNOWN_INO, at, name, 0) for at, (name, _, _) in names))
        if not isinstance(handle, DirHandle):
            raise FsError(errno.ENOTDIR)
        return _fit(size, self._names(handle.ino, cookie, size // SMALLEST_DIRENT + 1))

    def _readdirplus(self, nodeid: int, message: bytes, uid: int, gid: int) -> bytes:
        fh, cookie, size = _READ_IN.unpack_from(message, _IN.size)
        handle = self.ops.handle(fh)
        if not isinstance(handle, DirHandle):
            raise FsError(errno.ENOTDIR)
        return _fit(size, self._entries(handle.ino, cookie, size // SMALLEST_ENTRY + 1))

    def _names(self, ino: int, cookie: int, limit: int) -> Iterator[bytes]:
        while page := self.ops.tree.readdir(ino, cookie, limit):
            cookie = page[-1].cookie
            for dentry in page:
                yield dirent(dentry.ino, dentry.cookie, dentry.name, dentry.dtype)

    def _entries(self, ino: int, cookie: int, limit: int) -> Iterator[bytes]:
        overlay = self.ops.files.overlay
        while page := self.ops.tree.readdir_plus(ino, cookie, limit):
            cookie = page[-1][0].cookie
            for dentry, inode in page:
                yield direntplus(dentry, overlay(inode))


def _fit(size: int, entries: Iterable[bytes]) -> bytes:
    """As many of the first as an answer of `size` bytes holds."""
    left = min(size, ANSWER_MAX)
    parts: list[bytes] = []
    for entry in entries:
        left -= len(entry)
        if left < 0:
            break
        parts.append(entry)
    return b"".join(parts)
