"""The client of one process: its connection, the memory it shares with the daemon, and who keeps what alive.

Shared memory is unmapped when the last view of it goes, and the connection closes after the last memory and ring: a
NumPy array over a closed store stays safe to touch.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from typing import Any

from kvfs_usrbio._native import ffi, lib
from kvfs_usrbio.memory import Data, Memory, memory_of

Area = tuple[int, int, int]  # end address, iov id, address of the iov's first byte

# Why memory cannot be shared: it is not of the kind, or it is too much, or too many pieces.
UNSHARED = frozenset(
    -e for e in (errno.EOPNOTSUPP, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EDQUOT, errno.EMFILE)
)

_forks = 0  # how often this process has been forked from one that had this module


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)


class ForkError(RuntimeError):
    """A connection was used in a forked child, which has to open its own."""

    def __init__(self) -> None:
        super().__init__("this process was forked after the store was opened: open a BlockStore of its own")


def check(result: int, what: str) -> int:
    if result == -errno.ECHILD:
        raise ForkError
    if result == -errno.EREMOTEIO:
        raise OSError(errno.EREMOTEIO, f"{what}: the kvfs daemon is gone")
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


class Buffer:
    """Memory for blocks, from `alloc` or `register`.

    `view` is a writable memoryview of all bytes; slices of it, and NumPy arrays over it (`numpy.frombuffer(buffer.view,
    ...)`), are what `BlockStore.get` and `put` take. `shared`: the daemon reads and writes it in place; otherwise each
    transfer is copied once. Memory from `alloc` lives as long as any view of it.
    """

    def __init__(self, view: memoryview, address: int, iov: int, offset: int = 0) -> None:
        self.view = view
        self.address = address  # valid as long as view
        self.iov = iov  # -1: not shared
        self.offset = offset  # of the first byte in the iov

    @property
    def shared(self) -> bool:
        return self.iov >= 0

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, part: slice) -> memoryview:
        return self.view[part]


class _Connection:
    """The native client, closed when its last user lets go.

    Counted by hand: the garbage collector may finalise a client, its rings and its memory in any order, and each of
    the latter still needs the connection to be freed.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self._users = 1
        self._closed = False
        self._lock = threading.RLock()  # a finaliser may run inside another's hold or drop

    def hold(self) -> None:
        with self._lock:
            self._users += 1

    def drop(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and not self._closed:
                self._closed = True
                lib.kvfs_close(self.handle)


class Ring:
    """A native ring, destroyed when this goes."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle


def _free(connection: _Connection, areas: dict[int, Area], base: int, iov: Any) -> None:
    areas.pop(base, None)
    lib.kvfs_iov_free(connection.handle, iov)
    connection.drop()


def _destroy(connection: _Connection, ring: Any) -> None:
    lib.kvfs_ring_destroy(ring)
    connection.drop()


class Client:
    """Connection and areas; safe to use from several threads."""

    def __init__(self, socket_path: str) -> None:
        out = ffi.new("kvfs_client**")
        check(lib.kvfs_open(os.fsencode(socket_path), out), f"open {socket_path}")
        self._connection = _Connection(out[0])
        self._forks = _forks
        self.handle: Any = out[0]
        weakref.finalize(self, self._connection.drop).atexit = False
        self._areas: dict[int, Area] = {}  # by first address
        self._last: tuple[int, Area] = 0, (0, 0, 0)  # found last
        self._registered: dict[int, tuple[Memory, Any]] = {}  # by Buffer.address

    def check_fork(self) -> None:
        if _forks != self._forks:
            raise ForkError

    @property
    def alive(self) -> bool:
        """The daemon is there, which does not mean that it answers."""
        return bool(lib.kvfs_alive(self.handle))

    def abandon(self) -> None:
        lib.kvfs_abandon(self.handle)

    def alloc(self, size: int, *, huge: bool = False) -> Buffer:
        iov = ffi.new("struct kvfs_iov*")
        check(lib.kvfs_iov_alloc(self.handle, size, lib.KVFS_IOV_HUGE if huge else 0, iov), f"allocate {size} bytes")
        base = int(ffi.cast("uintptr_t", iov.base))
        self._areas[base] = base + iov.size, iov.id, base
        self._connection.hold()
        # Views and arrays keep `memory` alive, not the other way round; weakref.finalize, unlike ffi.gc, also runs with
        # its arguments whole when the memory is part of a garbage cycle.
        memory = ffi.buffer(iov.base, iov.size)
        weakref.finalize(memory, _free, self._connection, self._areas, base, iov).atexit = False
        return Buffer(memoryview(memory)[:size], base, iov.id)

    def register(self, data: Data) -> Buffer:
        """Shares `data` in place if that is possible. Its memory stays exported until `unregister` or the end."""
        memory = memory_of(data, writable=True)
        if memory.size == 0:
            memory.release()
            raise ValueError("nothing to register: the buffer is empty")
        view = memoryview(ffi.buffer(memory.native, memory.size))
        found = self.find(memory.address, memory.size)
        if found is not None or memory.address in self._registered:
            raise ValueError("this memory is registered already")
        iov = ffi.new("struct kvfs_iov*")
        result = lib.kvfs_iov_register(self.handle, ffi.cast("void*", memory.address), memory.size, iov)
        if result in UNSHARED:
            self._registered[memory.address] = memory, None  # not memory that can be shared: copied through staging
            return Buffer(view, memory.address, -1)
        if result < 0:
            memory.release()
        check(result, f"register {memory.size} bytes")
        base = int(ffi.cast("uintptr_t", iov.base))
        # Only the caller's own bytes: what else lies in the first and last page is not theirs to have transferred.
        self._areas[memory.address] = memory.address + memory.size, iov.id, base
        self._registered[memory.address] = memory, iov
        return Buffer(view, memory.address, iov.id, memory.address - base)

    def unregister(self, buffer: Buffer) -> None:
        """Waits for transfers under way in it. The memory is then the caller's alone; the Buffer's view must go."""
        memory, iov = self._registered.pop(buffer.address)
        self._areas.pop(buffer.address, None)
        buffer.iov = -1
        if iov is not None:
            lib.kvfs_iov_free(self.handle, iov)
        memory.release()

    def find(self, address: int, size: int) -> tuple[int, int] | None:
        """(iov id, offset) if all of the memory is shared with the daemon."""
        start, area = self._last
        # Still there: the collector may have freed it, and its addresses may be another's by now.
        if start <= address and address + size <= area[0] and self._areas.get(start) is area:
            return area[1], address - area[2]
        for start, area in tuple(self._areas.items()):
            if start <= address and address + size <= area[0]:
                self._last = start, area
                return area[1], address - area[2]
        return None

    def open_namespace(self, tenant: str, name: str, *, read_only: bool) -> int:
        flags = lib.KVFS_NS_RDONLY if read_only else 0
        result = lib.kvfs_ns_open(self.handle, tenant.encode(), name.encode(), flags)
        return check(result, f"open namespace {tenant}/{name}")

    def ring(self, entries: int) -> Ring:
        out = ffi.new("kvfs_ring**")
        check(lib.kvfs_ring_create(self.handle, entries, out), "create a ring")
        self._connection.hold()
        ring = Ring(out[0])
        weakref.finalize(ring, _destroy, self._connection, out[0]).atexit = False
        return ring
