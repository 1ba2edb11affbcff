"""3FS's native Python module under its own name, over libhf3fs_api_shared: memory, rings and open files of a kvfs mount.

Programs written for 3FS import `hf3fs_fuse.io`, which is this and a little more. Errors are OSError with the errno that
the C interface gives. While one thread waits on a ring others may prepare and submit. After a fork the child makes its own
rings; memory and registered files go on working there.
"""

from __future__ import annotations

import itertools
import os
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from errno import EAGAIN, EINVAL, ENAMETOOLONG
from typing import Any, Final, Self, overload

from hf3fs_py_usrbio._native import ffi, lib

Path = str | os.PathLike[str]

_PATH_MAX: Final = 4096
_PUNCH_MAX: Final = 16  # ranges of one call, as in 3FS
_NEVER: Final = (1 << 63) - 1
_MICROSECOND: Final = timedelta(microseconds=1)


def _failed(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _address(memory: Any) -> tuple[int, int]:
    """Address and size of a writable buffer; BufferError or TypeError if it is not one. Nothing of it is held."""
    with ffi.from_buffer("uint8_t[]", memory, require_writable=True) as pointer:
        return int(ffi.cast("uintptr_t", pointer)), len(pointer)


def extract_mount_point(path: Path) -> str | None:
    """Where the kvfs that `path` lies on is mounted; None if it is on something else or does not exist."""
    mount = ffi.new("char[]", _PATH_MAX)
    size = lib.hf3fs_extract_mount_point(mount, _PATH_MAX, os.fsencode(path))
    if size < 0:
        return None
    if size > _PATH_MAX:
        raise _failed(ENAMETOOLONG)
    return os.fsdecode(ffi.string(mount))


def register_fd(fd: int, flags: int = 0) -> None:
    """Lets rings of this process use an open file, within its access mode. EBADF: not an open file of a kvfs mount;
    EINVAL: registered already. To be taken back with `deregister_fd` before it is closed."""
    code = lib.hf3fs_reg_fd(fd, flags)
    if code > 0:
        raise _failed(code)


def deregister_fd(fd: int) -> None:
    """The opposite of `register_fd`; nothing if the descriptor is not registered."""
    lib.hf3fs_dereg_fd(fd)


def force_fsync(fd: int) -> int:
    """What was written, and the file's size, survive a loss of power. 0; unlike 3FS's, raises OSError rather than
    returning -1."""
    os.fsync(fd)
    return 0


def hardlink(target: Path, link_name: Path) -> None:
    """A second name for the file `target`."""
    code = lib.hf3fs_hardlink(os.fsencode(target), os.fsencode(link_name))
    if code != 0:
        raise _failed(abs(code))


@overload
def punch_hole(filename: Path, start: Sequence[int], end: Sequence[int], flags: int = 0) -> None: ...
@overload
def punch_hole(filename: int, start: Sequence[int], end: Sequence[int], flags: int = 0) -> None: ...
def punch_hole(filename: Path | int, start: Sequence[int], end: Sequence[int], flags: int = 0) -> None:
    """Gives back the space of the bytes [start[i], end[i]) of a file, given by name or descriptor, which then read as
    zeros; its size stays. RuntimeError: unequal or more than 16 ranges."""
    if len(start) != len(end) or len(start) > _PUNCH_MAX:
        raise RuntimeError(f"{len(start)} starts and {len(end)} ends: as many of both and at most {_PUNCH_MAX}")
    if not isinstance(filename, int):
        fd = os.open(filename, os.O_RDWR)
        try:
            return punch_hole(fd, start, end, flags)
        finally:
            os.close(fd)
    code = lib.hf3fs_punchhole(filename, len(start), ffi.new("size_t[]", start), ffi.new("size_t[]", end), flags)
    if code != 0:
        raise _failed(abs(code))
    return None


class iovec:
    """Memory that the caller has mapped, shared with the daemon; or a part `[a:b]` of it, which is what is transferred.

    `base` is the buffer of shared memory (multiprocessing.shared_memory.SharedMemory().buf), which may be unlinked as
    soon as this has returned. Nothing of the buffer is held: it may be closed, but not used for I/O, while this exists.
    The sharing ends when the iovec and all its parts are gone. `result` of a part that `ioring.wait` returned: bytes
    transferred (fewer at the file's end), or -errno; `userdata` is what `ioring.prepare` was given.
    """

    __slots__ = ("_area", "_at", "_base", "_size", "result", "userdata")

    result: int
    userdata: Any

    def __init__(self, base: Any, id: str, hf3fs_mount_point: Path, block_size: int = 0, numa: int = -1) -> None:
        """`id`: the text of a UUID, as 3FS wants one (ValueError otherwise)."""
        self._base, self._size = _address(base)
        area = ffi.new("struct hf3fs_iov*")
        code = lib.hf3fs_py_wrap(
            area, self._base, uuid.UUID(id).bytes, os.fsencode(hf3fs_mount_point), self._size, block_size, numa
        )
        if code < 0:
            raise _failed(-code)
        self._area = ffi.gc(area, lib.hf3fs_iovdestroy)
        self._at = 0
        self.result = 0
        self.userdata = None

    def __getitem__(self, part: slice) -> iovec:
        start, stop, step = part.indices(self._size)
        if step != 1:
            raise ValueError("step not 1 when slicing iovec")
        return self._part(start, max(start, stop) - start)

    def slice_by(self, buf: Any) -> iovec:
        """The part that a buffer inside the memory covers. IndexError: it is not inside."""
        address, size = _address(buf)
        start = address - self._base - self._at
        if start < 0 or start + size > self._size:
            raise IndexError("given buf is out of range")
        return self._part(start, size)

    @property
    def base_off(self) -> int:
        """Bytes from the memory's beginning to this part's."""
        return self._at

    def _part(self, start: int, size: int) -> iovec:
        part = _new(iovec)
        part._area = self._area
        part._base = self._base
        part._at = self._at + start
        part._size = size
        part.result = 0
        part.userdata = None
        return part


_new = iovec.__new__


class ioring:
    """A ring of `entries` operations at most, all reads or all writes.

    `io_depth` > 0: they start in batches of exactly that many; else as soon as they are submitted. `flags`: 1 is accepted (a
    read sees every acknowledged write anyway), 2 lets a read of a hole end in -ENODATA rather than in zeros. `priority`,
    `timeout` and `numa` are accepted, for 3FS's sake.
    """

    __slots__ = ("_next", "_pending", "_ring", "entries")

    def __init__(
        self,
        hf3fs_mount_point: Path,
        entries: int,
        for_read: bool = True,
        io_depth: int = 0,
        priority: int | None = None,
        timeout: int | None = None,
        numa: int = -1,
        flags: int = 0,
    ) -> None:
        """OSError EINVAL: entries or io_depth out of range, or not the mount point of a kvfs."""
        self._ring: Any = None
        self._next = itertools.count().__next__
        self._pending: dict[int, iovec] = {}  # by order of preparation; keeps their memory shared
        out = ffi.new("struct hf3fs_py_ring**")
        code = lib.hf3fs_py_ring_create(
            out, os.fsencode(hf3fs_mount_point), entries, for_read, io_depth, timeout or 0, numa, flags
        )
        if code < 0:
            raise _failed(-code)
        self._ring = out[0]
        self.entries: int = lib.hf3fs_py_ring_entries(self._ring)

    @staticmethod
    def size_for_entries(entries: int) -> int:
        """Bytes of shared memory behind a ring."""
        return lib.hf3fs_ior_size(entries)

    def prepare(self, iov: iovec, read: bool, fd: int, off: int, userdata: Any = None) -> Self:
        """One operation between all of `iov` and the file from `off` on. It may start before `submit`.

        OSError EINVAL: not the ring's direction, or no bytes; EBADF: the descriptor is not registered; EACCES: not open
        for that; EAGAIN: `entries` operations are under way.
        """
        if self._ring is None:
            raise _failed(EINVAL)
        iov.userdata = userdata
        sequence = self._next()
        self._pending[sequence] = iov  # before: another thread may be waiting
        area, at, size = iov._area, iov._at, iov._size  # pyright: ignore[reportPrivateUsage]
        code = lib.hf3fs_py_prepare(self._ring, area, read, at, size, fd, off, sequence)
        if code < 0:
            del self._pending[sequence]
            raise _failed(-code)
        return self

    def submit(self) -> Self:
        """Tells the daemon of what was prepared."""
        if self._ring is None:
            raise _failed(EINVAL)
        code = lib.hf3fs_py_submit(self._ring)
        if code < 0:
            raise _failed(-code)
        return self

    def wait(self, *, max_results: int = 0, min_results: int = 0, timeout: timedelta | None = None) -> list[iovec]:
        """The parts whose operations are done, in the order in which they were prepared, with `result` and `userdata`.

        Waits for `min_results`, at most for `timeout`, after which it returns those there are; then takes up to
        `max_results` (at least one) if they are there. OSError EREMOTEIO or EIO: the daemon is gone.
        """
        if self._ring is None:
            raise _failed(EINVAL)
        most = max(max_results, min_results, 1)
        until = _NEVER if timeout is None else time.time_ns() + timeout // _MICROSECOND * 1000
        while (count := lib.hf3fs_py_wait(self._ring, min_results, most, until)) == -EAGAIN:
            pass
        if count < 0:
            raise _failed(-count)
        count = min(count, most)
        lib.hf3fs_py_reap(self._ring, count)
        sequence = ffi.unpack(lib.hf3fs_py_sequence(self._ring), count) if count else ()
        results = ffi.unpack(lib.hf3fs_py_results(self._ring), count) if count else ()
        take = self._pending.pop
        done: list[iovec] = []
        for place, result in zip(sequence, results, strict=True):
            iov = take(place)
            iov.result = result
            done.append(iov)
        return done

    def destroy(self) -> None:
        """Ends the ring; what was under way is undecided. Idempotent."""
        ring, self._ring = self._ring, None
        if ring is not None:
            lib.hf3fs_py_ring_destroy(ring)
        self._pending.clear()

    def __del__(self) -> None:
        if hasattr(self, "_pending"):  # or it was never made
            self.destroy()


__all__ = [
    "deregister_fd",
    "extract_mount_point",
    "force_fsync",
    "hardlink",
    "ioring",
    "iovec",
    "punch_hole",
    "register_fd",
]
