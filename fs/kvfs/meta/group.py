"""Group commit: a `kv.Store` of which this process is the only user, whose transactions end in memory and reach the
engine together, a few milliseconds later, as one transaction.

What is committed here is seen by every later transaction here at once. A kill of the process before the next `flush`
loses the last transactions, never one without all that came after it. Who waits for `flush` or `sync` loses nothing.

Someone has to call `flush` soon after `on_pending`: the mount does every `STORE_S`. Values read or written stay in
memory, so that most reads need no engine.

Transactions that run at the same time in several threads are serializable in the simplest way: whatever is committed
ends all others with `Conflict`, which `run` and `read` repeat. The tree's owner is one thread, where it never happens.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from typing import Final

from kvfs.meta.kv import (
    MAX_RANGE,
    BufferedTxn,
    ClosedError,
    Conflict,
    Store,
    Txn,
    Watch,
    check_range,
    overlaid,
    run,
)

MAX_PENDING: Final = 1024
"""Keys that wait for the engine; the transaction that would exceed it stores the others first."""
MAX_CACHED: Final = 32768
"""Keys whose values are remembered, a few hundred bytes each."""

_Pairs = list[tuple[bytes, bytes]]


class GroupTxn(BufferedTxn):
    def __init__(self, store: GroupStore, version: int, read_only: bool) -> None:
        super().__init__(read_only)
        self._store: GroupStore | None = store
        self._version = version

    def _live(self) -> GroupStore:
        if self._store is None:
            raise ClosedError("this transaction has ended")
        return self._store

    def get(self, key: bytes) -> bytes | None:
        store = self._live()
        if key in self._writes:
            return self._writes[key]
        return store.get(self._version, key)

    def range(self, begin: bytes, end: bytes, limit: int = 1000, *, reverse: bool = False) -> _Pairs:
        check_range(begin, end, limit)
        store = self._live()
        return store.range(self._version, begin, end, limit, reverse, self._written(begin, end))

    def _check_live(self) -> None:
        self._live()

    def commit(self) -> None:
        store = self._live()
        self._store = None
        if self._writes:
            store.accept(self._version, self._writes)

    def abort(self) -> None:
        self._store = None


class GroupStore(Store):
    """Groups the commits of `engine`, which belongs to it from now on."""

    def __init__(self, engine: Store) -> None:
        self.engine = engine
        self._lock = threading.RLock()
        self._version = 0
        self._pending: dict[bytes, bytes | None] = {}
        self._order: list[bytes] = []
        """The keys in `_pending`, sorted."""
        self._cache: dict[bytes, bytes | None] = {}
        self._view: Txn | None = None
        """The engine as it is since the last flush; nobody else changes it."""
        self._failed = False
        self._closed = False

    def transact(self, *, read_only: bool = False) -> GroupTxn:
        if self._closed:
            raise ClosedError("the metadata store is closed")
        return GroupTxn(self, self._version, read_only)

    def watch(self, prefix: bytes) -> Watch:
        """Sees a change when it is flushed."""
        return self.engine.watch(prefix)

    # -- for transactions

    def _engine_view(self, version: int) -> Txn:
        if version != self._version:
            raise Conflict("another transaction has been committed since this one began")
        if self._closed:
            raise ClosedError("the metadata store is closed")
        if self._view is None:
            self._view = self.engine.transact(read_only=True)
        return self._view

    def get(self, version: int, key: bytes) -> bytes | None:
        with self._lock:
            view = self._engine_view(version)
            if key in self._pending:
                return self._pending[key]
            if key in self._cache:
                return self._cache[key]
            value = view.get(key)
            self._remember({key: value})
            return value

    def range(
        self, version: int, begin: bytes, end: bytes, limit: int, reverse: bool, own: dict[bytes, bytes | None]
    ) -> _Pairs:
        with self._lock:
            view = self._engine_view(version)
            first, last = bisect_left(self._order, begin), bisect_left(self._order, end)
            if first >= last and not own:
                return view.range(begin, end, limit, reverse=reverse)
            over = {key: self._pending[key] for key in self._order[first:last]} | own
            rows: _Pairs = []
            left = limit + sum(value is None for value in over.values())
            while left:
                page = view.range(begin, end, min(left, MAX_RANGE), reverse=reverse)
                rows += page
                if len(page) < min(left, MAX_RANGE):
                    break
                left -= len(page)
                if reverse:
                    end = page[-1][0]
                else:
                    begin = page[-1][0] + b"\0"
        return overlaid(rows, over, limit, reverse=reverse)

    def accept(self, version: int, writes: dict[bytes, bytes | None]) -> None:
        """A transaction's writes; raises what the engine says when it must be asked first."""
        with self._lock:
            if self._closed:
                raise ClosedError("the metadata store is closed")
            if version != self._version:
                raise Conflict("another transaction has been committed since this one began")
            if self._failed or len(self._pending) + len(writes) > MAX_PENDING:
                self.flush()
            idle = not self._pending
            for key, value in writes.items():
                if key not in self._pending:
                    insort(self._order, key)
                self._pending[key] = value
            self._version += 1
        if idle:
            self.on_pending()

    def _remember(self, values: dict[bytes, bytes | None]) -> None:
        if len(self._cache) + len(values) > MAX_CACHED:
            self._cache.clear()
        self._cache.update(values)

    # -- storing

    def flush(self) -> None:
        with self._lock:
            if not self._pending:
                return
            writes = [(key, self._pending[key]) for key in self._order]
            if self._view is not None:  # an open snapshot keeps the engine from folding its log
                self._view.abort()
                self._view = None

            def body(txn: Txn) -> None:
                for key, value in writes:
                    if value is None:
                        txn.delete(key)
                    else:
                        txn.put(key, value)

            self._failed = True
            run(self.engine, body)
            self._failed = False
            self._remember(self._pending)
            self._pending = {}
            self._order = []

    def sync(self) -> None:
        self.flush()
        self.engine.sync()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            try:
                self.flush()
            finally:
                self._closed = True
                if self._view is not None:
                    self._view.abort()
                self.engine.close()
