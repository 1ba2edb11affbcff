"""The ordered transactional key-value interface on which all metadata stands; owns no engine.

Every engine (embedded SQLite, later a replicated one) implements `Store`, `Txn` and `Watch` and passes the one
conformance suite in `tests/unit/meta_conformance.py`. Nothing here assumes a single process: several processes may
have the same store open, and a transaction that lost a race raises `Conflict` at commit.

Why `Txn` is synchronous and only `watch` is asynchronous: one mount request costs about 60 us in the FUSE dispatch
alone and makes three to six calls here, each of which takes the embedded engine a few microseconds; a coroutine
per call would cost as much again. A networked engine runs the transaction function in a worker thread, whose
calls wait for the event loop; that hand-over is small beside its network round trip.

Isolation: all reads of one transaction come from one snapshot (plus its own writes), and a transaction that wrote
something commits only if every key and range it read would still read the same: strict serializability. So a
function may trust what it read, even if it gives up without committing.
"""

from __future__ import annotations

import contextlib
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Final, Self, TypeVar

MAX_KEY: Final = 4096
MAX_VALUE: Final = 1 << 20
MAX_RANGE: Final = 10_000
"""The most pairs one `range` call returns; page on with the last key + b'\\0'."""
MAX_WRITES: Final = 10_000
"""The most distinct keys one transaction writes. A portable caller keeps to a few dozen."""
DEFAULT_RETRIES: Final = 32

T = TypeVar("T")


class StoreError(Exception):
    """The store cannot do what was asked; the message is one sentence for a person."""


class Conflict(StoreError):
    """Something this transaction read was changed before it committed; nothing was written, run it again."""


class LimitError(StoreError, ValueError):
    """A key, value, range or transaction beyond the stated limits."""


class ClosedError(StoreError):
    """The store or transaction is already finished."""


class BusyError(StoreError):
    """Another process held the store for longer than the engine waits."""


class FullError(StoreError):
    """No space (or no more allowed) where the store lives; nothing was written."""


class FormatError(StoreError):
    """The file is not a kvfs metadata store, or one of another format version."""


class DamagedError(StoreError):
    """What is on disk contradicts itself."""


def check_key(key: bytes) -> None:
    if not 0 < len(key) <= MAX_KEY:
        raise LimitError(f"a key must have 1 to {MAX_KEY} bytes, this one has {len(key)}")


def check_value(value: bytes) -> None:
    if len(value) > MAX_VALUE:
        raise LimitError(f"a value must have at most {MAX_VALUE} bytes, this one has {len(value)}")


def check_range(begin: bytes, end: bytes, limit: int) -> None:
    if len(begin) > MAX_KEY + 1 or len(end) > MAX_KEY + 1:
        raise LimitError(f"a range bound must have at most {MAX_KEY + 1} bytes")
    if not 0 < limit <= MAX_RANGE:
        raise LimitError(f"a range limit must be 1 to {MAX_RANGE}, not {limit}")


def prefix_end(prefix: bytes) -> bytes:
    """The smallest key above every key that starts with `prefix` (which must have a byte below 0xff)."""
    stem = prefix.rstrip(b"\xff")
    if not stem:
        raise LimitError("this prefix has no upper bound")
    return stem[:-1] + bytes((stem[-1] + 1,))


def overlaid(
    rows: Iterable[tuple[bytes, bytes]], over: Mapping[bytes, bytes | None], limit: int, *, reverse: bool
) -> list[tuple[bytes, bytes]]:
    """A range's first `limit` pairs once `over` is written (None: deleted). `rows` has as many more as `over` deletes."""
    merged = dict(rows)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return sorted(merged.items(), reverse=reverse)[:limit]


def _nobody() -> None:
    return None


class Txn(ABC):
    """One transaction, used by one thread. Leaving its `with` block without `commit` discards it."""

    @abstractmethod
    def get(self, key: bytes) -> bytes | None: ...

    @abstractmethod
    def range(self, begin: bytes, end: bytes, limit: int = 1000, *, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        """At most `limit` pairs with begin <= key < end, ascending, or descending from the end with `reverse`."""

    @abstractmethod
    def put(self, key: bytes, value: bytes) -> None: ...

    @abstractmethod
    def delete(self, key: bytes) -> None:
        """Removes the key; it need not exist."""

    @abstractmethod
    def commit(self) -> None:
        """Applies all writes or none. Once it has returned, a kill of this process loses nothing, except in a store that
        groups commits (`group`): there once `flush` has returned."""

    @abstractmethod
    def abort(self) -> None:
        """Ends the transaction without effect; harmless after commit."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class BufferedTxn(Txn):
    """A transaction whose writes wait in memory until it commits."""

    def __init__(self, read_only: bool) -> None:
        self._read_only = read_only
        self._writes: dict[bytes, bytes | None] = {}
        """By key; None: to be deleted."""

    @abstractmethod
    def _check_live(self) -> None:
        """ClosedError when it has ended."""

    def _written(self, begin: bytes, end: bytes) -> dict[bytes, bytes | None]:
        return {k: v for k, v in self._writes.items() if begin <= k < end} if self._writes else {}

    def _write(self, key: bytes, value: bytes | None) -> None:
        check_key(key)
        self._check_live()
        if self._read_only:
            raise StoreError("this transaction is read-only")
        if len(self._writes) >= MAX_WRITES and key not in self._writes:
            raise LimitError(f"a transaction writes at most {MAX_WRITES} keys")
        self._writes[key] = value

    def put(self, key: bytes, value: bytes) -> None:
        check_value(value)
        self._write(key, value)

    def delete(self, key: bytes) -> None:
        self._write(key, None)


class Watch(ABC):
    """Changed keys under a prefix, from the moment `Store.watch` returned.

    Level-triggered: a key is reported when its value differs from the last look (deletion included), so several
    changes in quick succession may come as one, and one that was undone at once may not come at all.
    """

    def __aiter__(self) -> Self:
        return self

    @abstractmethod
    async def __anext__(self) -> bytes: ...

    @abstractmethod
    def close(self) -> None: ...


class Store(ABC):
    """An open store. `transact` may be called from several threads; each transaction stays in one."""

    on_pending: Callable[[], None] = staticmethod(_nobody)
    """Called by whoever commits when something begins to wait for `flush`, which somebody should call soon."""

    @abstractmethod
    def transact(self, *, read_only: bool = False) -> Txn:
        """`read_only` records no reads, so that long scans cost no memory; put and delete are refused."""

    @abstractmethod
    def watch(self, prefix: bytes) -> Watch: ...

    def flush(self) -> None:  # noqa: B027 (an engine whose commits need no more has nothing to do)
        """On return a kill of this process loses nothing committed so far."""

    @abstractmethod
    def sync(self) -> None:
        """On return everything committed so far survives power loss. Blocks for a device flush."""

    @abstractmethod
    def close(self) -> None:
        """Ends the store; open transactions are discarded. Harmless when repeated."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run(store: Store, fn: Callable[[Txn], T], *, retries: int = DEFAULT_RETRIES) -> T:
    """Runs `fn` in a transaction and commits it, again after each conflict, at most 1 + `retries` times.

    `fn` must have no effect outside the transaction. The waits between attempts are random and at most 20 ms each.
    """
    attempt = 0
    while True:
        with store.transact() as txn:
            try:
                result = fn(txn)
                txn.commit()
            except Conflict:
                if attempt >= retries:
                    raise
            else:
                return result
        attempt += 1
        time.sleep(random.random() * min(0.02, 0.0002 * 2.0 ** min(attempt, 10)))


def read(store: Store, fn: Callable[[Txn], T]) -> T:
    """Runs `fn` on one snapshot, for functions that only read."""
    for _ in range(DEFAULT_RETRIES):
        with contextlib.suppress(Conflict), store.transact(read_only=True) as txn:
            return fn(txn)
    raise Conflict("others committed during each attempt to read")
