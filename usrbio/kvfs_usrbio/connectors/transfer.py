"""Loader and Saver: blocks between an engine's pages and kvfs, through memory that is shared with kvfs.

The engine's own memory is never given to kvfs: a daemon that hung, was given up and goes on later writes into staging memory
that nobody looks at any more, not into pages that belong to another request by then. What that costs is one copy, which runs
beside the transfer of the next blocks.
"""

from __future__ import annotations

import ctypes
import errno
import queue as queues
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvfs_usrbio._native import ffi, lib
from kvfs_usrbio.blocks import BlockStore
from kvfs_usrbio.client import Buffer
from kvfs_usrbio.connectors.keys import parts_of
from kvfs_usrbio.connectors.link import Link
from kvfs_usrbio.queue import Operation, Queue

ALIGN: Final = 4096
BATCH_BYTES: Final = 6 << 20  # of one operation: small enough that copying begins early
TIMEOUT: Final = 10.0  # seconds without progress, after which kvfs is given up
RENEWAL: Final = 1.0  # seconds that a load waits for another connection if its own has gone before it began
GAP: Final = 1.0  # of the seconds between two looks at what is being stored, as many count: between steps nobody looks
MAX_LOADS: Final = 4096


class Pages:
    """An engine's KV memory on the host: `layers` are (address of block 0, bytes of a block in it), one after the other in a stored
    block; blocks lie next to each other, or `stride` bytes apart. `keep` is what owns the memory. `parts`: of a stored block, or
    as few as will do."""

    def __init__(
        self,
        layers: Sequence[tuple[int, int]],
        keep: object,
        stride: int | None = None,
        parts: int | None = None,
    ) -> None:
        placed = [(base, size, stride or size) for base, size in layers]
        self.parts = [[placed[i] for i in run] for run in parts_of([size for _, size in layers], parts)]
        self._native = [ffi.new("struct kvfs_py_layer[]", part) for part in self.parts]
        self.sizes = [sum(size for _, size, _ in part) for part in self.parts]
        self.block_bytes = sum(self.sizes)
        self._keep = keep

    def room(self, size: int) -> int:
        """Bytes of staging memory, at least for one block."""
        return max(size, len(self.sizes) * (max(self.sizes) + ALIGN))

    def gather(self, blocks: Sequence[int], part: int, to: Sequence[int]) -> None:
        self._copy(blocks, part, to, False)

    def scatter(self, blocks: Sequence[int], part: int, sources: Sequence[int]) -> None:
        self._copy(blocks, part, sources, True)

    def _copy(self, blocks: Sequence[int], part: int, whole: Sequence[int], scatter: bool) -> None:
        """In one native call, during which other threads run: a call per layer costs as much as copying it."""
        count, layers = len(blocks), self._native[part]
        numbers, places = ffi.new("uint32_t[]", list(blocks)), ffi.new("uintptr_t[]", list(whole))
        lib.kvfs_py_copy(layers, len(layers), numbers, places, count, scatter)


class Staging:
    """Shared memory in slots of one size, each for one part of a block. Slots that are taken together lie together if they
    can."""

    def __init__(self, buffer: Buffer, slot: int) -> None:
        self.buffer = buffer
        self.slot = slot
        self.count = len(buffer) // slot
        self._free = list(range(self.count - 1, -1, -1))

    @classmethod
    def of(cls, store: BlockStore, size: int, part: int) -> Staging:
        """At least one slot. Touched once, so that no page of it is missing when it matters."""
        slot = (part + ALIGN - 1) // ALIGN * ALIGN
        buffer = store.alloc(max(size // slot, 1) * slot)
        ctypes.memset(buffer.address, 0, len(buffer))
        return cls(buffer, slot)

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        return self._free.pop()

    def give(self, slots: Sequence[int]) -> None:
        self._free.extend(reversed(slots))

    def address(self, slot: int) -> int:
        return self.buffer.address + slot * self.slot

    def view(self, slot: int, size: int) -> memoryview:
        return self.buffer[slot * self.slot : slot * self.slot + size]


@dataclass(slots=True)
class Transfers:
    """A connection with staging memory."""

    store: BlockStore
    queue: Queue
    staging: Staging


@dataclass(eq=False, slots=True)
class Load:
    """One request's blocks: `keys` for each part of each block in turn. Whoever waits looks at `done`, then at `failed`."""

    name: str
    keys: Sequence[bytes]
    blocks: Sequence[int]
    failed: set[int] = field(default_factory=set[int])  # indices into blocks
    damaged: list[bytes] = field(default_factory=list[bytes])  # keys whose values are of no use
    done: threading.Event = field(default_factory=threading.Event)
    submitted: float = 0.0
    seconds: float = 0.0  # from submission to the end
    waited: float = 0.0  # of these, for kvfs
    copied: float = 0.0  # of these, copying
    bytes: int = 0


@dataclass(slots=True)
class _Flight:
    operation: Operation
    pieces: list[tuple[int, int]]  # (index of the block, part)
    slots: list[int]


class Loader:
    """A thread that loads one request after another, at most MAX_LOADS waiting. Every load ends: with its blocks in the pages,
    or with those marked that are not, at most TIMEOUT seconds after the last progress."""

    def __init__(self, link: Link[Transfers], pages: Pages) -> None:
        self.link = link
        self._pages = pages
        self._todo: queues.Queue[Load | None] = queues.Queue(MAX_LOADS)
        self._thread = threading.Thread(target=self._run, name="kvfs-load", daemon=True)
        self._thread.start()

    def submit(self, load: Load) -> None:
        load.submitted = time.monotonic()
        try:
            self._todo.put_nowait(load)
        except queues.Full:
            load.failed.update(range(len(load.blocks)))
            load.done.set()

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join(TIMEOUT)

    def _run(self) -> None:
        while (load := self._todo.get()) is not None:
            connection = self.link.renewed(RENEWAL)
            left = set(range(len(load.blocks)))
            try:
                if connection is not None:
                    self._transfer(load, connection, left)
            except Exception as error:  # the engine waits for the end of each load, whatever goes wrong
                assert connection is not None
                self.link.lose(connection, error)
            load.failed |= left
            load.seconds = time.monotonic() - load.submitted
            load.done.set()

    def _transfer(self, load: Load, connection: Transfers, left: set[int]) -> None:
        """Takes out of `left` the blocks that have arrived, or marks them as failed."""
        pages, staging, queue = self._pages, connection.staging, connection.queue
        parts = len(pages.sizes)
        pieces = deque((block, part) for block in range(len(load.blocks)) for part in range(parts))
        flights: deque[_Flight] = deque()
        missing = dict.fromkeys(range(len(load.blocks)), parts)
        while pieces or flights:
            while pieces and staging.free:
                flights.append(self._start(load, connection, pieces))
            flight = flights.popleft()
            begun = time.monotonic()
            while not flight.operation.done:
                queue.wait(TIMEOUT)
            got = flight.operation.result()
            self.link.worked()
            load.waited += time.monotonic() - begun
            begun = time.monotonic()
            arrived: list[tuple[list[int], list[int]]] = [([], []) for _ in range(parts)]
            for (block, part), slot, status in zip(flight.pieces, flight.slots, got, strict=True):
                if status == pages.sizes[part]:
                    arrived[part][0].append(load.blocks[block])
                    arrived[part][1].append(staging.address(slot))
                    load.bytes += status
                else:
                    load.failed.add(block)
                    if status >= 0 or status == -errno.EIO:
                        load.damaged.append(load.keys[block * parts + part])
            for part, (blocks, sources) in enumerate(arrived):
                pages.scatter(blocks, part, sources)
            for block, _ in flight.pieces:
                missing[block] -= 1
                if not missing[block]:
                    left.discard(block)
            staging.give(flight.slots)
            load.copied += time.monotonic() - begun

    def _start(self, load: Load, connection: Transfers, pieces: deque[tuple[int, int]]) -> _Flight:
        sizes, staging = self._pages.sizes, connection.staging
        taken: list[tuple[int, int]] = []
        slots: list[int] = []
        size = 0
        while pieces and staging.free and (not taken or size + sizes[pieces[0][1]] <= BATCH_BYTES):
            block, part = pieces.popleft()
            taken.append((block, part))
            slots.append(staging.take())
            size += sizes[part]
        keys = [load.keys[block * len(sizes) + part] for block, part in taken]
        dests = [staging.view(slot, sizes[part]) for slot, (_, part) in zip(slots, taken, strict=True)]
        return _Flight(connection.store.submit_get(connection.queue, keys, dests), taken, slots)


@dataclass(slots=True)
class Saved:
    """What one call of Saver.save did."""

    dropped: list[int] = field(default_factory=list[int])  # indices of the blocks that were not taken
    bytes: int = 0  # taken
    copied: float = 0.0  # seconds


@dataclass(eq=False, slots=True)
class _Put:
    operation: Operation
    slots: list[int]
    blocks: int


class Saver:
    """Stores blocks without waiting: they are copied to staging memory, which is the bounded queue. What finds no room is
    dropped: it will be computed again, which is all that a cache that is too slow may cost. Used by one thread."""

    def __init__(self, link: Link[Transfers], pages: Pages) -> None:
        self.link = link
        self._pages = pages
        self._puts: list[_Put] = []
        self._connection: Transfers | None = None
        self._looked = 0.0  # when it was last looked whether something has ended
        self._silent = 0.0  # seconds since something has
        self.stored = 0  # values that kvfs has taken, or had
        self.refused = 0  # values that it has not: no space, and the like
        self.lost = 0  # blocks that were taken, and went with their connection before kvfs had them

    def save(self, blocks: Sequence[int], keys: Callable[[int], Sequence[bytes]]) -> Saved:
        """`keys`: of the parts of the i-th of these blocks."""
        self.reap()
        saved = Saved()
        begun = time.monotonic()
        connection = self.link.renewed(0)
        parts, each = len(self._pages.sizes), self._pages.block_bytes
        if connection is None:
            saved.dropped.extend(range(len(blocks)))
            return saved
        if self._connection is not connection:
            self._forget()
            self._connection = connection
        staging = connection.staging
        batch: list[tuple[bytes, memoryview, int]] = []
        taken = submitted = 0  # blocks
        try:
            for i, block in enumerate(blocks):
                if staging.free < parts:
                    break
                for part, key in enumerate(keys(i)):
                    slot = staging.take()
                    self._pages.gather([block], part, [staging.address(slot)])
                    batch.append((key, staging.view(slot, self._pages.sizes[part]), slot))
                taken += 1
                if (taken - submitted) * each >= BATCH_BYTES:
                    self._submit(connection, batch, taken - submitted)
                    batch, submitted = [], taken
            if batch:
                self._submit(connection, batch, taken - submitted)
            submitted = taken
        except OSError as error:
            self._lose(error)
        saved.dropped.extend(range(submitted, len(blocks)))
        saved.bytes = submitted * each
        saved.copied = time.monotonic() - begun
        return saved

    def _submit(self, connection: Transfers, batch: Sequence[tuple[bytes, memoryview, int]], blocks: int) -> None:
        keys, values = [key for key, _, _ in batch], [value for _, value, _ in batch]
        operation = connection.store.submit_put(connection.queue, keys, values)
        if not self._puts:
            self._silent, self._looked = 0.0, time.monotonic()
        self._puts.append(_Put(operation, [slot for _, _, slot in batch], blocks))

    def evict(self, keys: Sequence[bytes]) -> None:
        """Values that are damaged make room for good ones."""
        connection = self.link.current()
        if connection is not None and keys:
            try:
                connection.queue.poll()  # nobody else asks for what has ended if nothing is stored
                connection.store.submit_evict(connection.queue, keys)
            except OSError as error:
                self.link.lose(connection, error)

    def reap(self) -> None:
        """Takes note of what has ended. Never waits."""
        connection = self._connection
        if connection is None or not self._puts:
            return
        try:
            while connection.queue.poll():  # which also hands over what had no room in the ring
                pass
            ended = [put for put in self._puts if put.operation.done]
            for put in ended:
                for status in put.operation.result():
                    self.stored += status >= 0
                    self.refused += status < 0
                connection.staging.give(put.slots)
                self._puts.remove(put)
            now = time.monotonic()
            self._silent += min(now - self._looked, GAP)
            self._looked = now
            if ended:
                self.link.worked()
                self._silent = 0.0
            elif not connection.store.alive:  # which polling does not notice
                raise OSError(errno.EREMOTEIO, "the kvfs daemon is gone")
            if self._puts and self._silent > TIMEOUT:
                raise TimeoutError(f"nothing was stored within {TIMEOUT:g} s")
        except OSError as error:
            self._lose(error)

    def drain(self, seconds: float) -> bool:
        """Waits for what is under way; whether kvfs has answered all of it."""
        until, lost = time.monotonic() + seconds, self.link.lost
        while self._puts and time.monotonic() < until:
            self.reap()
            time.sleep(0.001)
        return not self._puts and self.link.lost == lost

    def _lose(self, error: OSError) -> None:
        if self._connection is not None:
            self.link.lose(self._connection, error)
        self._connection = None
        self._forget()

    def _forget(self) -> None:
        self.lost += sum(put.blocks for put in self._puts)
        self._puts.clear()
