"""The daemon's way to the native data plane: file bytes by inode, blocks by namespace, as trio operations.

All methods belong to trio's thread. An operation is submitted to the node's in-process ring; if nothing else is under
way it is looked for a few microseconds (most hits end there), else one reaper task waits for the ring's event fd.
The native side uses the caller's memory until an operation ends, so a cancelled caller still waits for its end.
Errors are OSError with the errno of the native side.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from kvfs._node import ffi, lib

if TYPE_CHECKING:
    from kvfs.node import Node

MAX_INFLIGHT = 4096  # entries of the in-process ring
SPIN_NS = 15_000
KEY_MAX = 32
POOL_MIN = 4096
POOL_MAX = 16 << 20  # largest buffer kept
POOL_KEEP = 64 << 20  # bytes of all idle buffers
SCAN_BYTES = 64 << 10
IO_MAX = 64 << 20  # bytes of one native read or write; longer ones are done in pieces
REAP_BATCH = 256


class HashedKey(bytes):
    """The 32-byte hash that stands for a key of more than 32 bytes, as block_scan reports it."""


def _wire_key(key: bytes) -> tuple[bytes, int]:
    """Key bytes and the ring's key_len, which is 33 for a hash of a longer key."""
    if isinstance(key, HashedKey):
        return key, KEY_MAX + 1
    if len(key) > KEY_MAX:
        return hashlib.blake2b(key, digest_size=32).digest(), KEY_MAX + 1
    if not key:
        raise OSError(errno.EINVAL, "a block key has at least one byte")
    return key, len(key)


def check(result: int, what: str = "") -> int:
    if result < 0:
        text = os.strerror(-result)
        raise OSError(-result, f"{text}: {what}" if what else text)
    return result


class _Pool:
    """Aligned buffers in power-of-two sizes, reused; at most POOL_KEEP bytes lie idle."""

    def __init__(self) -> None:
        self._free: dict[int, list[Any]] = {}
        self._idle = 0

    def take(self, size: int) -> tuple[Any, int]:
        room = max(POOL_MIN, 1 << (size - 1).bit_length()) if size > 1 else POOL_MIN
        free = self._free.get(room)
        if free:
            self._idle -= room
            return free.pop(), room
        memory = lib.kvfs_py_alloc(room)
        if memory == ffi.NULL:
            raise OSError(errno.ENOMEM, f"no memory for a buffer of {room} bytes")
        return ffi.gc(memory, lib.kvfs_py_free, room), room

    def give(self, buffer: Any, room: int) -> None:
        if room <= POOL_MAX and self._idle + room <= POOL_KEEP:
            self._idle += room
            self._free.setdefault(room, []).append(buffer)


@dataclass(slots=True)
class _Op:
    result: int | None = None
    task: trio.lowlevel.Task | None = None


@dataclass(frozen=True, slots=True)
class InodeState:
    size: int
    written_ns: int
    """When data was last written, until inode_take; 0: not since."""


class DataPlane:
    """Use it inside `async with DataPlane.open(node)`, which runs the reaper."""

    def __init__(self, handle: Any) -> None:
        self._node = handle
        self._ops: dict[int, _Op] = {}
        self._next = 1
        self._cqes = ffi.new("struct kvfs_cqe[]", REAP_BATCH)
        self._pool = _Pool()
        self._size = ffi.new("uint64_t*")
        self._when = ffi.new("uint64_t*")
        self._room = trio.lowlevel.ParkingLot()

    @staticmethod
    @asynccontextmanager
    async def open(node: Node) -> AsyncGenerator[DataPlane]:
        plane = DataPlane(node.handle)
        async with trio.open_nursery() as nursery:
            # Cancellation from outside must not end the reaper before the operations that it ends.
            reaper = trio.CancelScope(shield=True)
            nursery.start_soon(plane._reaper, reaper)
            try:
                yield plane
            finally:
                # Operations of tasks outside this block end before the node may go.
                with trio.CancelScope(shield=True):
                    while plane._ops:
                        await trio.sleep(0.001)
                reaper.cancel()

    async def _reaper(self, scope: trio.CancelScope) -> None:
        fd: int = lib.kvfs_node_event_fd(self._node)
        with scope:
            while True:
                await trio.lowlevel.wait_readable(fd)
                self._reap(0)

    def _reap(self, spin_ns: int) -> None:
        got: int = lib.kvfs_py_reap(self._node, self._cqes, REAP_BATCH, spin_ns)
        for i in range(got):
            cqe = self._cqes[i]
            op = self._ops.pop(cqe.user_data)
            op.result = cqe.result
            if op.task is not None:
                trio.lowlevel.reschedule(op.task)
        if got > 0 and self._room:
            self._room.unpark(count=got)

    async def _call(self, opcode: int, **more: Any) -> int:
        """One operation (see `_submit`); the result as the ring gives it. `memory` stays valid until this returns."""
        op = await self._submit(opcode, **more)
        if len(self._ops) == 1:
            self._reap(SPIN_NS)
        return await self._result(op)

    async def _submit(
        self,
        opcode: int,
        *,
        flags: int = 0,
        handle: int = 0,
        memory: int = 0,
        off: int = 0,
        length: int = 0,
        key: bytes = b"",
        key_len: int = 0,
    ) -> _Op:
        """Waits for room in the ring, for nothing else."""
        while len(self._ops) >= MAX_INFLIGHT:
            await self._room.park()
        op = _Op()
        number = self._next
        self._next += 1
        self._ops[number] = op
        taken: int = lib.kvfs_py_submit(
            self._node, opcode, flags, handle, number, memory, off, length, key, len(key), key_len
        )
        if taken != 1:
            del self._ops[number]
            raise OSError(errno.EAGAIN, "the data plane takes no operation")
        return op

    async def _result(self, op: _Op) -> int:
        if op.result is None:
            op.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        assert op.result is not None
        return op.result

    async def _fill(self, opcode: int, off: int, size: int, what: str, **more: Any) -> bytes:
        """An operation that fills `size` bytes of memory; the bytes it did fill."""
        buffer, room = self._pool.take(size)
        try:
            address = int(ffi.cast("uintptr_t", buffer))
            n = check(await self._call(opcode, memory=address, off=off, length=size, **more), what)
            return bytes(ffi.buffer(buffer, n)) if n else b""
        finally:
            self._pool.give(buffer, room)

    # Files. Reads, writes and truncation need the inode open (inode_open). What is read and written here may stay in
    # the kernel's page cache, unless a client writes the same file: see Node.serve_upcalls.

    async def read(self, ino: int, off: int, size: int) -> bytes:
        """Up to `size` bytes, short at the end of the file; holes are zeros."""
        key = ino.to_bytes(8, "little")
        if size <= IO_MAX:
            return await self._fill(
                lib.KVFS_OP_INODE_READ, off, size, f"read inode {ino}", key=key, flags=lib.KVFS_SQE_FUSE
            )
        pieces: list[bytes] = []
        while size > 0:
            want = min(size, IO_MAX)
            piece = await self._fill(
                lib.KVFS_OP_INODE_READ, off, want, f"read inode {ino}", key=key, flags=lib.KVFS_SQE_FUSE
            )
            pieces.append(piece)
            if len(piece) < want:
                break
            off += want
            size -= want
        return b"".join(pieces)

    async def write(self, ino: int, off: int, data: bytes | bytearray | memoryview) -> int:
        """Bytes written: all, or fewer if an error came after the first ones."""
        key = ino.to_bytes(8, "little")
        memory = ffi.from_buffer(data)
        base = int(ffi.cast("uintptr_t", memory))
        size = len(memory)
        done = 0
        try:
            while done < size:
                want = min(size - done, IO_MAX)
                n = await self._call(
                    lib.KVFS_OP_INODE_WRITE,
                    flags=lib.KVFS_SQE_FUSE,
                    memory=base + done,
                    off=off + done,
                    length=want,
                    key=key,
                )
                if n < 0 and done == 0:
                    check(n, f"write inode {ino}")
                done += max(n, 0)
                if n < want:
                    break
        finally:
            ffi.release(memory)
        return done

    async def _inode(self, opcode: int, ino: int, off: int, what: str) -> None:
        check(await self._call(opcode, off=off, key=ino.to_bytes(8, "little")), f"{what} inode {ino}")

    async def truncate(self, ino: int, size: int) -> None:
        await self._inode(lib.KVFS_OP_INODE_TRUNCATE, ino, size, "truncate")

    async def land(self, ino: int) -> None:
        """What was written so far is in the store: a size stored after this is of bytes that are there."""
        await self._inode(lib.KVFS_OP_INODE_LAND, ino, 0, "land")

    async def fsync(self, ino: int) -> None:
        await self._inode(lib.KVFS_OP_INODE_FSYNC, ino, 0, "fsync")

    async def delete(self, ino: int, size: int) -> None:
        """Drops all bytes of the inode, which reach no further than `size`."""
        await self._inode(lib.KVFS_OP_INODE_DELETE, ino, size, "delete")

    async def delete_many(self, files: Sequence[tuple[int, int]]) -> None:
        """`delete` of each (inode, size), at once; the first error when all have ended."""
        ops = [
            await self._submit(lib.KVFS_OP_INODE_DELETE, off=size, key=ino.to_bytes(8, "little")) for ino, size in files
        ]
        results = [await self._result(op) for op in ops]
        for (ino, _), result in zip(files, results, strict=True):
            check(result, f"delete inode {ino}")

    async def sync(self) -> None:
        """Everything acknowledged so far becomes durable."""
        check(await self._call(lib.KVFS_OP_SYNC), "sync")

    async def checkpoint(self) -> None:
        check(await self._call(lib.KVFS_OP_CHECKPOINT), "checkpoint")

    async def file_scan(self) -> AsyncIterator[tuple[int, int, int]]:
        """Every file chunk of the store: (inode, chunk number, bytes)."""
        async for key, length, _ in self._scan(lib.KVFS_OP_INODE_SCAN, 0):
            yield int.from_bytes(key[:8], "little"), int.from_bytes(key[8:16], "little"), length

    def inode_open(self, ino: int, size: int) -> None:
        """Counted; the first open sets the size."""
        check(lib.kvfs_node_inode_open(self._node, ino, size), f"open inode {ino}")

    def inode_size(self, ino: int) -> int:
        return check(lib.kvfs_node_inode_size(self._node, ino), f"size of inode {ino}")

    def inode_show(self, ino: int) -> InodeState:
        """For the kernel, which may keep it: a client's write has it dropped."""
        check(lib.kvfs_node_inode_show(self._node, ino, self._size, self._when), f"state of inode {ino}")
        return InodeState(self._size[0], self._when[0])

    def inode_take(self, ino: int) -> InodeState:
        """For whoever stores it: the size as far as its bytes are in the store, see `land`."""
        check(lib.kvfs_node_inode_take(self._node, ino, self._size, self._when), f"state of inode {ino}")
        return InodeState(self._size[0], self._when[0])

    def inode_no_capability(self, ino: int, on: bool) -> None:
        """Whether it is known to have no security.capability, for which the kernel asks before each write."""
        check(lib.kvfs_node_inode_no_capability(self._node, ino, on), f"state of inode {ino}")

    def inode_landed(self, ino: int) -> bool:
        """Whether `land` has nothing to wait for."""
        return check(lib.kvfs_node_inode_landed(self._node, ino), f"state of inode {ino}") == 1

    def inode_refs(self, ino: int) -> int:
        """Opens not yet closed, those of clients' file handles among them."""
        return check(lib.kvfs_node_inode_refs(self._node, ino), f"references of inode {ino}")

    def inode_close(self, ino: int) -> int:
        """References left."""
        return check(lib.kvfs_node_inode_close(self._node, ino), f"close inode {ino}")

    # Blocks. A key of more than 32 bytes stands under its 32-byte hash.

    async def block_get(self, ns_id: int, key: bytes, off: int, size: int) -> bytes:
        """Bytes [off, off + size) of the value, short at its end; ENOENT for a miss."""
        wire, key_len = _wire_key(key)
        return await self._fill(lib.KVFS_OP_GET, off, size, "block", handle=ns_id, key=wire, key_len=key_len)

    async def block_put(
        self, ns_id: int, key: bytes, data: bytes | bytearray | memoryview, durable: bool = False
    ) -> bool:
        """True if written, False if it was there; EEXIST if it is there with another length."""
        wire, key_len = _wire_key(key)
        flags = lib.KVFS_SQE_DURABLE if durable else 0
        with ffi.from_buffer(data) as memory:
            result = await self._call(
                lib.KVFS_OP_PUT,
                flags=flags,
                handle=ns_id,
                memory=int(ffi.cast("uintptr_t", memory)),
                length=len(memory),
                key=wire,
                key_len=key_len,
            )
        return check(result, "block") == 1

    async def block_exists(self, ns_id: int, key: bytes) -> int | None:
        """The value's length, None for a miss."""
        wire, key_len = _wire_key(key)
        result = await self._call(
            lib.KVFS_OP_EXISTS, flags=lib.KVFS_SQE_NOTOUCH, handle=ns_id, key=wire, key_len=key_len
        )
        return None if result == -errno.ENOENT else check(result, "block")

    async def block_evict(self, ns_id: int, key: bytes) -> bool:
        """False for a miss."""
        wire, key_len = _wire_key(key)
        result = await self._call(lib.KVFS_OP_EVICT, handle=ns_id, key=wire, key_len=key_len)
        return False if result == -errno.ENOENT else check(result, "block") == 0

    async def block_scan(self, ns_id: int) -> AsyncIterator[tuple[bytes, int, int]]:
        """(key, length, mtime in seconds) of every block; one that moves meanwhile may come twice."""
        async for entry in self._scan(lib.KVFS_OP_SCAN, ns_id):
            yield entry

    async def _scan(self, opcode: int, handle: int) -> AsyncIterator[tuple[bytes, int, int]]:
        cursor = 0
        size: int = ffi.sizeof("struct kvfs_scan_entry")
        while True:
            packed = await self._fill(opcode, cursor, SCAN_BYTES, "scan", handle=handle)
            if not packed:
                return
            entries = ffi.from_buffer("struct kvfs_scan_entry[]", packed)
            for i in range(len(packed) // size):
                entry = entries[i]
                raw = bytes(ffi.buffer(entry.key, min(entry.key_len, KEY_MAX)))
                yield HashedKey(raw) if entry.key_len > KEY_MAX else raw, entry.length, entry.mtime
            cursor = entries[len(packed) // size - 1].cursor

    def space_short(self) -> bool:
        """So little space is left that every byte which is freed is wanted at once."""
        return lib.kvfs_node_space_short(self._node) == 1

    def stats(self) -> dict[str, int]:
        out = ffi.new("struct kvfs_node_stats*")
        check(lib.kvfs_node_stats(self._node, out), "stats")
        return {name: getattr(out, name) for name, _ in ffi.typeof("struct kvfs_node_stats").fields}
