"""BlockStore: blocks of one namespace by key, in blocking batches.

Every call takes a batch and returns one int per key. What concerns one key is never an exception:

    get     bytes copied (short at the value's end); MISS; -EIO damaged; other -errno
    put     1 written, 0 was there; -EEXIST there with another length; -ENOSPC; -EINVAL empty or more than 16 MiB;
            -EACCES read-only
    exists  the value's length in bytes; MISS
    evict   0; MISS

What concerns the whole call is: OSError EREMOTEIO if the daemon died (within about 100 ms), ETIMEDOUT, ForkError.
After one of these the batch is undecided: any part of it may have been done.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from kvfs_usrbio._native import ffi, lib
from kvfs_usrbio.client import Buffer, Client, ForkError, check
from kvfs_usrbio.locate import mounted_from

MISS = -errno.ENOENT
SOCKET_NAME = "kvfs.sock"  # in the data directory
KEY_MAX = 32
VALUE_MAX = 16 << 20
RING_ENTRIES = 256
STAGING_BYTES = VALUE_MAX  # per thread, made when memory is used that the daemon does not share
PREFIX_STEP = 256
MAX_BATCH = 1 << 20

Data = Any  # an object with a contiguous buffer: bytes, bytearray, memoryview, numpy array


def socket_path(where: str | os.PathLike[str]) -> str:
    """The daemon's socket for a socket path, a data directory, a place on its mount, or kvfs:///any of them."""
    text = os.fspath(where)
    if text.startswith("kvfs:"):
        url = urlsplit(text)
        if url.netloc not in ("", "localhost"):
            raise ValueError(f"{text}: only this machine's kvfs can be opened: kvfs:///path")
        text = unquote(url.path)
    path = Path(text)
    try:
        mode = path.stat().st_mode
    except OSError as e:
        raise OSError(e.errno, f"no kvfs at {path}: {e.strerror}") from None
    if stat.S_ISDIR(mode):
        path = (mounted_from(path) or path) / SOCKET_NAME
    return str(path)


class _Lane:
    """What one thread owns: a ring and memory for values that the daemon cannot reach where they are."""

    def __init__(self, client: Client, entries: int) -> None:
        self.ring = client.ring(entries)
        self._client = client
        self._staging: Buffer | None = None

    def staging(self) -> Buffer:
        if self._staging is None:
            self._staging = self._client.alloc(STAGING_BYTES)
        return self._staging


class BlockStore:
    """Safe to use from several threads, each of which gets a ring of its own. A forked child opens its own store."""

    def __init__(self, client: Client, namespace: int, *, ring_entries: int, timeout: float | None) -> None:
        self._client: Client | None = client
        self._namespace = namespace
        self._entries = ring_entries
        self._timeout: int = lib.KVFS_NO_TIMEOUT if timeout is None else int(timeout * 1e9)
        self._local = threading.local()
        self._pid = os.getpid()

    @classmethod
    def open(
        cls,
        where: str | os.PathLike[str],
        namespace: str = "default",
        *,
        read_only: bool = False,
        ring_entries: int = RING_ENTRIES,
        timeout: float | None = 30.0,
    ) -> BlockStore:
        """`where`: the daemon's socket, its data directory, or kvfs:///either. `namespace`: "tenant/name", or a name
        of the tenant "default". `timeout`: seconds per call; None waits as long as the daemon lives."""
        tenant, slash, name = namespace.partition("/")
        if not slash:
            tenant, name = "default", namespace
        client = Client(socket_path(where))
        handle = client.open_namespace(tenant, name, read_only=read_only)
        return cls(client, handle, ring_entries=ring_entries, timeout=timeout)

    def close(self) -> None:
        """Buffers and views of them stay valid; the connection ends with the last of them."""
        self._client = None
        self._local = threading.local()

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def alloc(self, size: int, *, huge: bool = False) -> Buffer:
        """Memory shared with the daemon, zeroed. `huge`: on 2 MiB pages if there are any."""
        return self._open().alloc(size, huge=huge)

    def exists(self, keys: Sequence[bytes]) -> list[int]:
        return self._plain(lib.KVFS_OP_EXISTS, keys)

    def evict(self, keys: Sequence[bytes]) -> list[int]:
        return self._plain(lib.KVFS_OP_EVICT, keys)

    def match_prefix(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys are all there."""
        for start in range(0, len(keys), PREFIX_STEP):
            for i, status in enumerate(self.exists(keys[start : start + PREFIX_STEP])):
                if status < 0:
                    return start + i
        return len(keys)

    def get(self, keys: Sequence[bytes], dests: Sequence[Data]) -> list[int]:
        """Reads each value, as far as it fits, into the writable buffer beside its key."""
        return self._transfer(lib.KVFS_OP_GET, keys, dests, 0)

    def put(self, keys: Sequence[bytes], srcs: Sequence[Data], *, durable: bool = False) -> list[int]:
        """Stores each value unless its key is there. `durable`: returns once it would survive a loss of power."""
        return self._transfer(lib.KVFS_OP_PUT, keys, srcs, lib.KVFS_SQE_DURABLE if durable else 0)

    def _open(self) -> Client:
        if self._client is None:
            raise ValueError("the store is closed")
        if os.getpid() != self._pid:
            raise ForkError
        return self._client

    def _lane(self) -> _Lane:
        client = self._open()
        lane: _Lane | None = getattr(self._local, "lane", None)
        if lane is None:
            lane = self._local.lane = _Lane(client, self._entries)
        return lane

    def _run(self, lane: _Lane, opcode: int, flags: int, iovs: Any, blocks: Any, count: int) -> None:
        result: int = lib.kvfs_py_batch(
            lane.ring.handle, opcode, flags, self._namespace, iovs, blocks, count, self._timeout
        )
        if result < 0:
            del self._local.lane  # operations may still be under way: neither ring nor staging is used again
            check(result, "blocks")

    def _blocks(self, keys: Sequence[bytes]) -> tuple[Any, list[Any]]:
        """The native batch, and what it points to."""
        count = len(keys)
        if count > MAX_BATCH:
            raise ValueError(f"{count} keys in one batch; at most {MAX_BATCH}")
        blocks = ffi.new("struct kvfs_block[]", count)
        keep: list[Any] = []
        for i, key in enumerate(keys):
            if not key:
                raise ValueError(f"key {i} is empty")
            size = len(key)
            if size > KEY_MAX:
                key, size = hashlib.blake2b(key, digest_size=KEY_MAX).digest(), KEY_MAX + 1
            native = ffi.from_buffer(key)
            keep.append(native)
            block = blocks[i]
            block.key = native
            block.key_len = size
        return blocks, keep

    def _plain(self, opcode: int, keys: Sequence[bytes]) -> list[int]:
        lane = self._lane()
        blocks, _keep = self._blocks(keys)
        self._run(lane, opcode, 0, ffi.NULL, blocks, len(keys))
        return [blocks[i].status for i in range(len(keys))]

    def _transfer(self, opcode: int, keys: Sequence[bytes], values: Sequence[Data], flags: int) -> list[int]:
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} keys and {len(values)} buffers")
        lane = self._lane()
        client = self._open()
        reading = opcode == lib.KVFS_OP_GET
        count = len(keys)
        blocks, _keep = self._blocks(keys)
        iovs = ffi.new("uint16_t[]", count)
        staged: list[tuple[int, int, Any]] = []  # (index, offset in staging, the caller's memory)
        base, used = 0, 0  # the run of blocks not yet done, and staging they use
        memories: list[Any] = []  # keeps the callers' buffers exported until the end
        try:
            for i, value in enumerate(values):
                memory = ffi.from_buffer("char[]", value, require_writable=reading)
                memories.append(memory)
                size = len(memory)
                blocks[i].len = min(size, VALUE_MAX) if reading else min(size, VALUE_MAX + 1)
                place = client.find(int(ffi.cast("uintptr_t", memory)), size)
                if place is None and size > 0 and (reading or size <= VALUE_MAX):
                    need = min(size, VALUE_MAX)
                    if used + need > STAGING_BYTES:
                        self._flush(lane, opcode, flags, iovs, blocks, base, i, staged)
                        base, used = i, 0
                    staging = lane.staging()
                    if not reading:
                        ffi.memmove(staging.address + used, memory, need)
                    staged.append((i, used, memory))
                    place = staging.iov, used
                    used += (need + 4095) & ~4095
                iovs[i], blocks[i].value_off = place or (0, 0)
            self._flush(lane, opcode, flags, iovs, blocks, base, count, staged)
            return [blocks[i].status for i in range(count)]
        finally:
            # Not left to the collector: a traceback may keep this frame in a cycle, and a memoryview that is collected
            # while it has an export crashes CPython 3.11.
            for memory in memories:
                ffi.release(memory)

    def _flush(
        self, lane: _Lane, opcode: int, flags: int, iovs: Any, blocks: Any, start: int, end: int, staged: list[Any]
    ) -> None:
        """Runs blocks [start, end) and empties `staged`."""
        self._run(lane, opcode, flags, iovs + start, blocks + start, end - start)
        if opcode == lib.KVFS_OP_GET and staged:
            address = lane.staging().address
            for i, at, memory in staged:
                if blocks[i].status > 0:
                    ffi.memmove(memory, address + at, blocks[i].status)
        staged.clear()
