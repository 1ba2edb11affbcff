"""The client of one process: its connection, the memory it shares with the daemon, and who keeps what alive.

Shared memory is unmapped when the last view of it goes, and the connection closes after the last memory and ring: a
NumPy array over a closed store stays safe to touch.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from kvfs_usrbio._native import ffi, lib


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
    """Memory shared with the daemon: blocks are read into and written from views of it without a copy.

    `view` is a writable memoryview of all bytes; slices of it, and NumPy arrays over it (`numpy.frombuffer(buffer.view,
    ...)`), are what `BlockStore.get` and `put` take. The memory lives as long as any of them.
    """

    def __init__(self, view: memoryview) -> None:
        self.view = view

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, part: slice) -> memoryview:
        return self.view[part]


class Client:
    """Connection and areas; safe to use from several threads."""

    def __init__(self, socket_path: str) -> None:
        out = ffi.new("kvfs_client**")
        check(lib.kvfs_open(os.fsencode(socket_path), out), f"open {socket_path}")
        self.handle: Any = ffi.gc(out[0], lib.kvfs_close)
        self._areas: dict[int, tuple[int, int]] = {}  # first address: (end address, iov id)

    def alloc(self, size: int, *, huge: bool = False) -> Buffer:
        iov = ffi.new("struct kvfs_iov*")
        check(lib.kvfs_iov_alloc(self.handle, size, lib.KVFS_IOV_HUGE if huge else 0, iov), f"allocate {size} bytes")
        base = int(ffi.cast("uintptr_t", iov.base))
        self._areas[base] = (base + iov.size, iov.id)
        handle, areas = self.handle, self._areas

        def free(_: Any) -> None:
            areas.pop(base, None)
            lib.kvfs_iov_free(handle, iov)

        memory = ffi.gc(ffi.cast("char*", iov.base), free, size)
        return Buffer(memoryview(ffi.buffer(memory, size)))

    def find(self, address: int, size: int) -> tuple[int, int] | None:
        """(iov id, offset) if all of the memory is shared with the daemon."""
        for base, (end, number) in tuple(self._areas.items()):
            if base <= address and address + size <= end:
                return number, address - base
        return None

    def open_namespace(self, tenant: str, name: str, *, read_only: bool) -> int:
        flags = lib.KVFS_NS_RDONLY if read_only else 0
        result = lib.kvfs_ns_open(self.handle, tenant.encode(), name.encode(), flags)
        return check(result, f"open namespace {tenant}/{name}")

    def ring(self, entries: int) -> Any:
        out = ffi.new("kvfs_ring**")
        check(lib.kvfs_ring_create(self.handle, entries, out), "create a ring")
        handle = self.handle

        def destroy(ring: Any, _keep: Any = handle) -> None:
            lib.kvfs_ring_destroy(ring)

        return ffi.gc(out[0], destroy)
