"""Jobs: one call of the API as a sequence of native batches, whoever runs them (a blocking call or a Queue).

A job is a generator. It yields a native batch to be run, and None once, before it uses the lane's staging memory. It
returns one int per key.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Generator, Sequence
from typing import Any

from kvfs_usrbio._native import ffi, lib
from kvfs_usrbio.client import Buffer, Client
from kvfs_usrbio.memory import Data, Memory, memory_of

KEY_MAX = 32
VALUE_MAX = 16 << 20
STAGING_BYTES = VALUE_MAX
MAX_BATCH = 1 << 20
SCAN_ENTRY = 64  # sizeof(struct kvfs_scan_entry)

Job = Generator[Any, None, list[int]]


class Lane:
    """A ring, and memory for values that the daemon cannot reach where they are. One thread at a time."""

    def __init__(self, client: Client, entries: int) -> None:
        self.ring = client.ring(entries)
        self.batch = ffi.new("struct kvfs_batch*")
        self.size = 64
        self.blocks = ffi.new("struct kvfs_block[]", self.size)
        self.statuses = ffi.new("int64_t[]", self.size)
        self._client = client
        self._staging: Buffer | None = None

    def grow(self, count: int) -> None:
        self.size = count
        self.blocks = ffi.new("struct kvfs_block[]", count)
        self.statuses = ffi.new("int64_t[]", count)

    def staging(self) -> Buffer:
        if self._staging is None:
            self._staging = self._client.alloc(STAGING_BYTES)
        return self._staging


def check_count(count: int) -> None:
    if count > MAX_BATCH:
        raise ValueError(f"{count} keys in one batch; at most {MAX_BATCH}")


def pack(keys: Sequence[bytes]) -> tuple[bytes, Any, int]:
    """Keys for kvfs_py_fill: all of them, the length of each or NULL, the length of all."""
    if not keys:
        return b"", ffi.NULL, 1
    lengths = set(map(len, keys))
    if len(lengths) == 1:
        length = lengths.pop()
        if 0 < length <= KEY_MAX:
            return b"".join(keys), ffi.NULL, length
    if 0 in lengths or not keys[0]:
        raise ValueError(f"key {[len(key) for key in keys].index(0)} is empty")
    lens = ffi.new("uint8_t[]", [min(len(key), KEY_MAX + 1) for key in keys])
    short = [bytes(key) if len(key) <= KEY_MAX else hashlib.blake2b(key, digest_size=KEY_MAX).digest() for key in keys]
    return b"".join(short), lens, 0


def make_batch(blocks: Any, count: int, opcode: int, flags: int, handle: int) -> Any:
    batch = ffi.new("struct kvfs_batch*")
    batch.blocks = blocks
    batch.n = count
    batch.opcode = opcode
    batch.flags = flags
    batch.handle = handle
    return batch


def _statuses(blocks: Any, count: int) -> list[int]:
    out = ffi.new("int64_t[]", count)
    lib.kvfs_py_statuses(blocks, count, out)
    return ffi.unpack(out, count) if count else []


def plain(opcode: int, handle: int, keys: Sequence[bytes]) -> Job:
    """exists, evict."""
    count = len(keys)
    check_count(count)
    blob, lens, length = pack(keys)
    packed = ffi.from_buffer(blob)
    blocks = ffi.new("struct kvfs_block[]", count)
    lib.kvfs_py_fill(blocks, count, packed, lens, length, 0, 0, 0)
    yield make_batch(blocks, count, opcode, 0, handle)
    return _statuses(blocks, count)


def transfer(
    client: Client,
    lane: Lane,
    opcode: int,
    flags: int,
    handle: int,
    keys: Sequence[bytes] | None,
    values: Sequence[Data],
    offsets: Sequence[int] | None,
) -> Job:
    """get, put, and (without keys) read, write. Shared memory is used in place; the rest goes through staging."""
    count = len(values)
    check_count(count)
    for name, others in (("keys", keys), ("offsets", offsets)):
        if others is not None and len(others) != count:
            raise ValueError(f"{len(others)} {name} and {count} buffers")
    reading = opcode in (lib.KVFS_OP_GET, lib.KVFS_OP_READ)
    if keys is None:
        blob, lens, length = b"", ffi.NULL, 0
    else:
        blob, lens, length = pack(keys)
    packed = ffi.from_buffer(blob)
    blocks = ffi.new("struct kvfs_block[]", count)
    lib.kvfs_py_fill(blocks, count, ffi.NULL if keys is None else packed, lens, length, 0, 0, 0)
    iovs = ffi.new("uint16_t[]", count)
    memories: list[Memory] = []  # keeps the callers' buffers exported until the end
    staged: list[tuple[int, int, Memory]] = []  # (index, offset in staging, the caller's memory)
    start, used, granted = 0, 0, False  # the run of blocks not yet done, and staging they use

    def copy_back() -> None:
        if reading and staged:
            base = lane.staging().address
            for i, at, memory in staged:
                if blocks[i].status > 0:
                    ffi.memmove(memory.native, ffi.cast("char*", base + at), blocks[i].status)
        staged.clear()

    def run(end: int) -> Any:
        batch = make_batch(blocks + start, end - start, opcode, flags, handle)
        batch.iovs = iovs + start
        return batch

    try:
        for i, value in enumerate(values):
            memory = memory_of(value, writable=reading)
            memories.append(memory)
            size = memory.size
            block = blocks[i]
            # One byte more than a value can have is refused by the daemon, for this key only.
            block.len = min(size, VALUE_MAX if reading or keys is None else VALUE_MAX + 1)
            if offsets is not None:
                block.off = offsets[i]
            place = client.find(memory.address, size)
            if place is None and size > 0 and (reading or keys is None or size <= VALUE_MAX):
                need = min(size, VALUE_MAX)
                if not granted:
                    yield None
                    granted = True
                if used + need > STAGING_BYTES:
                    yield run(i)
                    copy_back()
                    start, used = i, 0
                staging = lane.staging()
                if not reading:
                    ffi.memmove(ffi.cast("char*", staging.address + used), memory.native, need)
                staged.append((i, used, memory))
                place = staging.iov, used
                used += (need + 4095) & ~4095
            iovs[i], block.value_off = place or (0, 0)
        yield run(count)
        copy_back()
        return _statuses(blocks, count)
    finally:
        for memory in memories:
            memory.release()


def slots(
    opcode: int, flags: int, handle: int, keys: Sequence[bytes], buffer: Buffer, stride: int, offset: int, length: int
) -> Job:
    """get and put of equal slices of one shared buffer."""
    count = len(keys)
    check_count(count)
    blob, lens, key_length = pack(keys)
    packed = ffi.from_buffer(blob)
    blocks = ffi.new("struct kvfs_block[]", count)
    lib.kvfs_py_fill(blocks, count, packed, lens, key_length, buffer.offset + offset, stride, length)
    batch = make_batch(blocks, count, opcode, flags, handle)
    batch.iov = buffer.iov
    yield batch
    del buffer  # held until here
    return _statuses(blocks, count)


def scan_page(lane: Lane, handle: int, cursor: int, limit: int, found: list[bytes]) -> Job:
    """Up to `limit` raw entries, joined, into `found`."""
    yield None
    staging = lane.staging()
    blocks = ffi.new("struct kvfs_block[]", 1)
    blocks[0].off = cursor
    blocks[0].len = min(limit * SCAN_ENTRY, STAGING_BYTES)
    batch = make_batch(blocks, 1, lib.KVFS_OP_SCAN, 0, handle)
    batch.iov = staging.iov
    yield batch
    status = int(blocks[0].status)
    if status < 0:
        raise OSError(-status, f"scan: {errno.errorcode.get(-status, str(-status))}")
    found.append(bytes(staging.view[:status]))
    return [status]


def file_sync(handle: int) -> Job:
    blocks = ffi.new("struct kvfs_block[]", 1)
    yield make_batch(blocks, 1, lib.KVFS_OP_FSYNC, 0, handle)
    return _statuses(blocks, 1)
