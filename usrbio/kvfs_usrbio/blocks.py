"""BlockStore: blocks of one namespace by key, in batches.

Every call takes a batch and returns one int per key. What concerns one key is never an exception:

    get     bytes copied (short at the value's end, 0 beyond it); MISS; -EIO damaged; other -errno
    put     1 written, 0 was there; -EEXIST there with another length; -ENOSPC; -EINVAL empty or more than 16 MiB;
            -EACCES read-only
    exists  the value's length in bytes; MISS
    evict   0; MISS

What concerns the whole call is: OSError EREMOTEIO if the daemon died (within about 100 ms), ETIMEDOUT, ForkError.
After one of these the batch is undecided: any part of it may have been done.

Each operation has three forms: blocking (`get`), awaitable under asyncio and trio (`aget`), and submit/poll (`queue()`
and `submit_get`). docs/engine-api.md shows all of them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kvfs_usrbio import jobs, remote
from kvfs_usrbio._native import ffi, lib
from kvfs_usrbio.aio import Maker
from kvfs_usrbio.client import Buffer, check
from kvfs_usrbio.files import File
from kvfs_usrbio.memory import Data
from kvfs_usrbio.queue import Operation, Queue
from kvfs_usrbio.remote import InProcess
from kvfs_usrbio.session import RING_ENTRIES, Session

MISS: Final = -errno.ENOENT
SCAN_PAGE: Final = 1024
SCAN_END: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class ScanEntry:
    """`hashed`: the block's key was longer than 32 bytes, and `key` is its hash."""

    key: bytes
    length: int
    mtime: int
    hashed: bool


class BlockStore:
    """Safe to use from several threads. A forked child opens its own store: this one's calls raise ForkError there."""

    def __init__(self, session: Session, namespace: int, node: InProcess | None = None) -> None:
        self._session: Session | None = session
        self._namespace = namespace
        self._node = node

    @classmethod
    def open(
        cls,
        where: str | os.PathLike[str],
        namespace: str = "default",
        *,
        read_only: bool = False,
        ring_entries: int = RING_ENTRIES,
        timeout: float | None = 30.0,
        token: str | os.PathLike[str] | bytes | None = None,
        lanes: int = 0,
    ) -> BlockStore:
        """`where`: a mount point, the daemon's socket, its data directory, or kvfs:///any of them. `namespace`:
        "tenant/name", or a name of the tenant "default". `timeout`: seconds per call; None waits as long as the daemon
        lives. `lanes`: rings made at once, so that as many threads find one later without asking the daemon.

        Or `where`: kvfs://HOST:PORT,HOST:PORT/TENANT/NAMESPACE, any of a cluster's chunk servers; this process talks to them
        itself. `token`: the file of what gives the right to it, or the line in it."""
        if remote.is_remote(where):
            if namespace != "default":
                raise ValueError(f"{os.fspath(where)} names the namespace already")
            node = remote.start(os.fspath(where), token, timeout)
            try:
                session = Session(node.socket, ring_entries, timeout, lanes)
                handle = session.client.open_namespace(node.tenant, node.name, read_only=read_only)
            except BaseException:
                node.stop()
                raise
            return cls(session, handle, node)
        if token is not None:
            raise ValueError("a token is for kvfs://HOST:PORT/TENANT/NAMESPACE")
        tenant, slash, name = namespace.partition("/")
        if not slash:
            tenant, name = "default", namespace
        session = Session(where, ring_entries, timeout, lanes)
        return cls(session, session.client.open_namespace(tenant, name, read_only=read_only))

    def close(self) -> None:
        """Buffers and views of them stay valid; the connection ends with the last of them, or with this process's own
        node."""
        self._session = None
        node, self._node = self._node, None
        if node is not None:
            node.stop()

    def abandon(self) -> None:
        """For a daemon that does not answer: nothing waits for it any more, `close` and the end of buffers included; calls
        under way and later ones raise OSError EREMOTEIO. A daemon that goes on later may still carry out what was under way:
        give it no `register`ed memory of which the rest of the program takes the ends of its calls for the end of that."""
        if self._session is not None:
            self._session.client.abandon()

    @property
    def alive(self) -> bool:
        """False once the daemon is gone, or given up; it may be there and not answer."""
        return self._session is not None and self._session.client.alive

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- memory

    def alloc(self, size: int, *, huge: bool = False) -> Buffer:
        """Memory shared with the daemon, zeroed. `huge`: on 2 MiB pages if there are any."""
        return self._open().client.alloc(size, huge=huge)

    def register(self, data: Data) -> Buffer:
        """Makes the caller's own writable memory known: a buffer, NumPy array, mmap, or CPU tensor.

        Memory in a MAP_SHARED mapping of a memfd or of a file on tmpfs (multiprocessing.shared_memory, torch's
        share_memory_, /dev/shm) is shared: `shared` is True and transfers go straight into and out of it, also through
        other views of the same bytes. The file must not be made shorter meanwhile: operations return -EFAULT then.
        Any other memory is copied once per transfer (`shared` is False). The object stays exported until `unregister`.
        """
        return self._open().client.register(data)

    def unregister(self, buffer: Buffer) -> None:
        """Ends `register`, after transfers under way. `buffer` and its view must not be used any more."""
        self._open().client.unregister(buffer)

    # -- blocking

    def exists(self, keys: Sequence[bytes]) -> list[int]:
        return self._open().call(lib.KVFS_OP_EXISTS, 0, self._namespace, keys)

    def evict(self, keys: Sequence[bytes]) -> list[int]:
        return self._open().call(lib.KVFS_OP_EVICT, 0, self._namespace, keys)

    def match_prefix(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys are all there. Asks for a ring full at a time, and no further than the first miss; an
        empty key behind that may go unnoticed."""
        start, step = 0, 256  # packing what lies behind the first miss costs more than asking
        while start < len(keys):
            part = keys[start : start + step]
            found = self._match(part)
            start += found
            if found < len(part):
                break
            step = min(step * 8, jobs.MAX_BATCH)
        return start

    def _match(self, keys: Sequence[bytes]) -> int:
        session = self._open()
        count = len(keys)
        blob, lens, length = jobs.pack(keys)
        lane = session.take()
        if count > lane.size:
            lane.grow(count)
        packed = ffi.from_buffer(blob)
        lib.kvfs_py_fill(lane.blocks, count, packed, lens, length, 0, 0, 0)
        result: int = lib.kvfs_match_prefix(lane.ring.handle, self._namespace, lane.blocks, count, session.timeout)
        if result < 0:
            session.lose()
            check(result, "match_prefix")
        session.give(lane)
        return result

    def get(self, keys: Sequence[bytes], dests: Sequence[Data], offsets: Sequence[int] | None = None) -> list[int]:
        """Reads each value, as far as it fits, into the writable buffer beside its key; from byte `offsets[i]` on."""
        return self._open().run(self._transfer(lib.KVFS_OP_GET, keys, dests, offsets))

    def put(self, keys: Sequence[bytes], srcs: Sequence[Data], *, durable: bool = False) -> list[int]:
        """Stores each value unless its key is there. `durable`: returns once it would survive a loss of power."""
        return self._open().run(self._transfer(lib.KVFS_OP_PUT, keys, srcs, None, durable))

    def get_into(
        self, keys: Sequence[bytes], buffer: Buffer, stride: int, *, offset: int = 0, length: int | None = None
    ) -> list[int]:
        """As get, the i-th value into `length` (default `stride`) bytes at offset + i * stride. The quickest form: one
        native call and no Python object per key."""
        at, size = self._slots(len(keys), buffer, stride, offset, length)
        return self._open().call(lib.KVFS_OP_GET, 0, self._namespace, keys, buffer.iov, at, stride, size)

    def put_from(
        self,
        keys: Sequence[bytes],
        buffer: Buffer,
        stride: int,
        *,
        offset: int = 0,
        length: int | None = None,
        durable: bool = False,
    ) -> list[int]:
        """As put, the i-th value from `length` (default `stride`) bytes at offset + i * stride."""
        at, size = self._slots(len(keys), buffer, stride, offset, length)
        flags = lib.KVFS_SQE_DURABLE if durable else 0
        return self._open().call(lib.KVFS_OP_PUT, flags, self._namespace, keys, buffer.iov, at, stride, size)

    def scan(self) -> Iterator[ScanEntry]:
        """Every block of the namespace that is there all the while, once; others perhaps. In no order."""
        session = self._open()
        seen: set[bytes] = set()  # of one page and the next: a page may repeat entries of the one before
        cursor = 0
        while cursor != SCAN_END:
            found: list[bytes] = []
            session.run(self._page(cursor, found))
            entries, following = _entries(found[0])
            for entry in entries:
                if entry.key not in seen:
                    yield entry
            if following is None or following == cursor:
                return
            seen = {entry.key for entry in entries}
            cursor = following

    # -- awaitable

    async def aexists(self, keys: Sequence[bytes]) -> list[int]:
        return await self._open().arun(self._plain(lib.KVFS_OP_EXISTS, keys))

    async def aevict(self, keys: Sequence[bytes]) -> list[int]:
        return await self._open().arun(self._plain(lib.KVFS_OP_EVICT, keys))

    async def amatch_prefix(self, keys: Sequence[bytes]) -> int:
        """As match_prefix, in steps that grow: the first miss is mostly near."""
        start, step = 0, 64
        while start < len(keys):
            for i, status in enumerate(await self.aexists(keys[start : start + step])):
                if status < 0:
                    return start + i
            start += step
            step = min(step * 4, 4096)
        return len(keys)

    async def aget(
        self, keys: Sequence[bytes], dests: Sequence[Data], offsets: Sequence[int] | None = None
    ) -> list[int]:
        return await self._open().arun(self._transfer(lib.KVFS_OP_GET, keys, dests, offsets))

    async def aput(self, keys: Sequence[bytes], srcs: Sequence[Data], *, durable: bool = False) -> list[int]:
        return await self._open().arun(self._transfer(lib.KVFS_OP_PUT, keys, srcs, None, durable))

    async def aget_into(
        self, keys: Sequence[bytes], buffer: Buffer, stride: int, *, offset: int = 0, length: int | None = None
    ) -> list[int]:
        return await self._open().arun(self._at(lib.KVFS_OP_GET, keys, buffer, stride, offset, length, False))

    async def aput_from(
        self,
        keys: Sequence[bytes],
        buffer: Buffer,
        stride: int,
        *,
        offset: int = 0,
        length: int | None = None,
        durable: bool = False,
    ) -> list[int]:
        return await self._open().arun(self._at(lib.KVFS_OP_PUT, keys, buffer, stride, offset, length, durable))

    async def ascan(self) -> AsyncIterator[ScanEntry]:
        seen: set[bytes] = set()
        cursor = 0
        while cursor != SCAN_END:
            found: list[bytes] = []
            await self._open().arun(self._page(cursor, found))
            entries, following = _entries(found[0])
            for entry in entries:
                if entry.key not in seen:
                    yield entry
            if following is None or following == cursor:
                return
            seen = {entry.key for entry in entries}
            cursor = following

    # -- submit and poll

    def queue(self) -> Queue:
        """For the submit_ calls: a ring of its own, of which a session has few. Made once, not per call."""
        return self._open().queue()

    def submit_exists(self, queue: Queue, keys: Sequence[bytes]) -> Operation:
        return queue.submit(self._plain(lib.KVFS_OP_EXISTS, keys)(queue.lane))

    def submit_evict(self, queue: Queue, keys: Sequence[bytes]) -> Operation:
        return queue.submit(self._plain(lib.KVFS_OP_EVICT, keys)(queue.lane))

    def submit_get(
        self, queue: Queue, keys: Sequence[bytes], dests: Sequence[Data], offsets: Sequence[int] | None = None
    ) -> Operation:
        """Buffers that are not shared take turns at the queue's staging memory."""
        return queue.submit(self._transfer(lib.KVFS_OP_GET, keys, dests, offsets)(queue.lane))

    def submit_put(
        self, queue: Queue, keys: Sequence[bytes], srcs: Sequence[Data], *, durable: bool = False
    ) -> Operation:
        return queue.submit(self._transfer(lib.KVFS_OP_PUT, keys, srcs, None, durable)(queue.lane))

    def submit_get_into(
        self,
        queue: Queue,
        keys: Sequence[bytes],
        buffer: Buffer,
        stride: int,
        *,
        offset: int = 0,
        length: int | None = None,
    ) -> Operation:
        return queue.submit(self._at(lib.KVFS_OP_GET, keys, buffer, stride, offset, length, False)(queue.lane))

    def submit_put_from(
        self,
        queue: Queue,
        keys: Sequence[bytes],
        buffer: Buffer,
        stride: int,
        *,
        offset: int = 0,
        length: int | None = None,
        durable: bool = False,
    ) -> Operation:
        return queue.submit(self._at(lib.KVFS_OP_PUT, keys, buffer, stride, offset, length, durable)(queue.lane))

    # -- files

    def file(self, fd: int) -> File:
        """An open file of the mount over this store's connection; the descriptor's access mode is the File's."""
        return File(self._open(), fd)

    # -- inside

    def _open(self) -> Session:
        if self._session is None:
            raise ValueError("the store is closed")
        return self._session

    def _plain(self, opcode: int, keys: Sequence[bytes]) -> Maker:
        return lambda lane: jobs.plain(opcode, self._namespace, keys)

    def _transfer(
        self,
        opcode: int,
        keys: Sequence[bytes],
        values: Sequence[Data],
        offsets: Sequence[int] | None,
        durable: bool = False,
    ) -> Maker:
        client = self._open().client
        flags = lib.KVFS_SQE_DURABLE if durable else 0
        return lambda lane: jobs.transfer(client, lane, opcode, flags, self._namespace, keys, values, offsets)

    def _slots(self, count: int, buffer: Buffer, stride: int, offset: int, length: int | None) -> tuple[int, int]:
        """(place in the iov, bytes of each)"""
        size = stride if length is None else length
        if not buffer.shared:
            raise ValueError("this buffer is not shared with the daemon: use get and put")
        if stride < 0 or offset < 0 or size < 0 or (count and offset + (count - 1) * stride + size > len(buffer)):
            raise ValueError(f"{count} values of {size} bytes, {stride} apart from {offset}, exceed the buffer")
        return buffer.offset + offset, size

    def _at(
        self,
        opcode: int,
        keys: Sequence[bytes],
        buffer: Buffer,
        stride: int,
        offset: int,
        length: int | None,
        durable: bool,
    ) -> Maker:
        _, size = self._slots(len(keys), buffer, stride, offset, length)
        flags = lib.KVFS_SQE_DURABLE if durable else 0
        return lambda lane: jobs.slots(opcode, flags, self._namespace, keys, buffer, stride, offset, size)

    def _page(self, cursor: int, found: list[bytes]) -> Maker:
        return lambda lane: jobs.scan_page(lane, self._namespace, cursor, SCAN_PAGE, found)


def _entries(raw: bytes) -> tuple[list[ScanEntry], int | None]:
    """The entries and the cursor behind the last of them, if there are any."""
    entries: list[ScanEntry] = []
    following: int | None = None
    if raw:
        native = ffi.cast("struct kvfs_scan_entry*", ffi.from_buffer(raw))
        for i in range(len(raw) // jobs.SCAN_ENTRY):
            one = native[i]
            size = int(one.key_len)
            key = bytes(ffi.buffer(one.key)[: min(size, jobs.KEY_MAX)])
            entries.append(ScanEntry(key, int(one.length), int(one.mtime), size > jobs.KEY_MAX))
            following = int(one.cursor)
    return entries, following
