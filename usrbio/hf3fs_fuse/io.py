"""3FS's Python interface to user-space I/O (`hf3fs_fuse.io`), served by kvfs.

Interface and behaviour are 3FS's, so that what was written for it runs unchanged; hf3fs_py_usrbio tells the details.
"""

from __future__ import annotations

import multiprocessing.shared_memory  # callers use it without importing it themselves
import os
from collections.abc import Callable
from typing import Final
from uuid import uuid4

import hf3fs_py_usrbio as h3fio
from hf3fs_py_usrbio import (
    deregister_fd,
    extract_mount_point,
    force_fsync,
    hardlink,
    ioring,
    iovec,
    punch_hole,
    register_fd,
)

Path = str | os.PathLike[str]
Callback = Callable[[memoryview, int], int | bool | None]


class IorPriority:
    """What `make_ioring` takes as priority. kvfs serves all alike."""

    HIGH: Final = -1
    NORMAL: Final = 0
    LOW: Final = 1


def make_iovec(
    shm: multiprocessing.shared_memory.SharedMemory, hf3fs_mount_point: Path, block_size: int = 0, numa: int = -1
) -> iovec:
    """Shares all of `shm` with the daemon; it may be unlinked right after. `del` the iovec before `shm.close()`."""
    return iovec(shm.buf, str(uuid4()), hf3fs_mount_point, block_size, numa)


def make_ioring(
    hf3fs_mount_point: Path,
    entries: int,
    for_read: bool = True,
    io_depth: int = 0,
    priority: int | None = None,
    timeout: int | None = None,
    numa: int = -1,
    flags: int = 0,
) -> ioring:
    """A ring for reads or for writes; `priority`, `timeout` and `numa` have no effect. See hf3fs_py_usrbio.ioring."""
    return ioring(hf3fs_mount_point, entries, for_read, io_depth, priority, timeout, numa, flags)


def read_file(
    fn: Path,
    hf3fs_mount_point: Path | None = None,
    block_size: int = 1 << 30,
    off: int = 0,
    priority: int | None = None,
    cb: Callback | None = None,
) -> bytes | None:
    """A file's bytes from `off` on, read `block_size` bytes at a time.

    With `cb` they are handed over instead, as cb(bytes, offset), and None is returned: an int from it is the offset to go on
    at, another true value ends the reading. The memory is only lent to it.
    """
    mount = extract_mount_point(fn) if hf3fs_mount_point is None else hf3fs_mount_point
    if mount is None:
        raise ValueError(f"{os.fspath(fn)} is not on a kvfs mount")
    fd = os.open(fn, os.O_RDONLY)
    try:
        register_fd(fd)
        try:
            return _read(fd, mount, block_size, off, priority, cb)
        finally:
            deregister_fd(fd)
    finally:
        os.close(fd)


def _read(fd: int, mount: Path, block_size: int, off: int, priority: int | None, cb: Callback | None) -> bytes | None:
    shm = multiprocessing.shared_memory.SharedMemory(size=block_size, create=True)
    try:
        memory = shm.buf
        assert memory is not None  # only once it is closed
        ring = make_ioring(mount, 1, priority=priority)
        whole = make_iovec(shm, mount)
        pieces: list[bytes] = []
        while True:
            done = ring.prepare(whole[:block_size], True, fd, off).submit().wait(min_results=1)[0]
            if done.result < 0:
                raise OSError(-done.result, os.strerror(-done.result))
            if done.result == 0:
                break
            if cb is None:
                pieces.append(bytes(memory[: done.result]))
            else:
                with memory[: done.result] as lent:
                    answer = cb(lent, off)
                if isinstance(answer, int) and not isinstance(answer, bool):
                    off = answer
                    continue
                if answer:
                    break
            if done.result < block_size:
                break
            off += block_size
        ring.destroy()
        return None if cb is not None else b"".join(pieces)
    finally:
        shm.close()
        shm.unlink()


__all__ = [
    "IorPriority",
    "deregister_fd",
    "extract_mount_point",
    "force_fsync",
    "h3fio",
    "hardlink",
    "ioring",
    "iovec",
    "make_ioring",
    "make_iovec",
    "multiprocessing",
    "punch_hole",
    "read_file",
    "register_fd",
]
