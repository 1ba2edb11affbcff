"""The embedded engine of `kv.Store`: one SQLite table, several processes, one machine.

How the interface maps to SQLite in WAL mode: a transaction takes a pooled connection, its first read begins a
SQLite read transaction (the snapshot), writes wait in memory. At commit the writes go into that same SQLite
transaction: SQLite allows that only when nobody has committed since the snapshot, in which case there is nothing to
validate. Otherwise it answers "busy"; then the commit takes the write lock with a fresh snapshot, repeats every
recorded read, and raises `Conflict` if one differs. The pool is last-in-first-out, so that a single-threaded caller
keeps using one connection, whose page cache its own commits do not invalidate.

synchronous=NORMAL: a commit is written, not flushed; a killed process loses nothing, power loss may lose the latest
commits but never breaks the file. `sync` makes one commit with synchronous=FULL, which flushes the log with
everything before it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import Final, cast

import apsw
import trio

from kvfs.meta.kv import (
    MAX_RANGE,
    BufferedTxn,
    BusyError,
    ClosedError,
    Conflict,
    DamagedError,
    FormatError,
    FullError,
    LimitError,
    Store,
    StoreError,
    Watch,
    check_key,
    check_range,
    overlaid,
    prefix_end,
)

APPLICATION_ID: Final = 0x6B766673  # "kvfs"
FORMAT_VERSION: Final = 1
MAX_OPEN: Final = 64
"""The most transactions and watches open at once in one process."""
BUSY_MS: Final = 10_000
WATCH_POLL_S: Final = 0.02
CHECKPOINT_PAGES: Final = 8192
"""The log is folded into the file about every 32 MiB: fewer flushes, and a bounded recovery."""

_GET: Final = "SELECT v FROM kv WHERE k=?"
_ASC: Final = "SELECT k,v FROM kv WHERE k>=? AND k<? ORDER BY k LIMIT ?"
_DESC: Final = "SELECT k,v FROM kv WHERE k>=? AND k<? ORDER BY k DESC LIMIT ?"
_PUT: Final = "INSERT INTO kv(k,v) VALUES(?,?) ON CONFLICT(k) DO UPDATE SET v=excluded.v"
_DELETE: Final = "DELETE FROM kv WHERE k=?"

_Pairs = list[tuple[bytes, bytes]]
_RangeKey = tuple[bytes, bytes, int, bool]


def _translate(path: Path, error: apsw.Error) -> StoreError:
    if isinstance(error, apsw.NotADBError):
        return FormatError(f"{path} is not a kvfs metadata store (no SQLite file).")
    if isinstance(error, apsw.CorruptError):
        return DamagedError(f"the metadata store {path} is damaged: {error}.")
    if isinstance(error, apsw.FullError):
        return FullError(f"no space left for the metadata store {path}.")
    if isinstance(error, apsw.BusyError | apsw.LockedError):
        return BusyError(f"the metadata store {path} was held by another process for {BUSY_MS / 1000:g} s.")
    if isinstance(error, apsw.ReadOnlyError):
        return StoreError(f"the metadata store {path} is read-only.")
    if isinstance(error, apsw.CantOpenError):
        return StoreError(f"the metadata store {path} cannot be opened.")
    return StoreError(f"the metadata store {path} failed: {error}.")


@contextlib.contextmanager
def _errors(path: Path) -> Generator[None]:
    try:
        yield
    except apsw.Error as error:
        raise _translate(path, error) from error


def _select(con: apsw.Connection, key: _RangeKey) -> _Pairs:
    begin, end, limit, reverse = key
    return cast("_Pairs", con.execute(_DESC if reverse else _ASC, (begin, end, limit)).fetchall())


def _number(con: apsw.Connection, query: str) -> int:
    return int(cast("int", con.execute(query).fetchall()[0][0]))


class SqliteTxn(BufferedTxn):
    def __init__(self, store: SqliteStore, con: apsw.Connection, read_only: bool) -> None:
        super().__init__(read_only)
        self._store = store
        self._con: apsw.Connection | None = con
        self._begun = False
        self._gets: dict[bytes, bytes | None] = {}
        self._ranges: dict[_RangeKey, _Pairs] = {}

    def _check_live(self) -> None:
        if self._con is None:
            raise ClosedError("this transaction has ended")

    def _connection(self) -> apsw.Connection:
        con = self._con
        if con is None:
            raise ClosedError("this transaction has ended")
        if not self._begun:
            con.execute("BEGIN")
            self._begun = True
        return con

    def get(self, key: bytes) -> bytes | None:
        check_key(key)
        if key in self._writes and self._con is not None:
            return self._writes[key]
        try:
            row = self._connection().execute(_GET, (key,)).fetchone()
        except apsw.Error as error:
            raise _translate(self._store.path, error) from error
        value: bytes | None = None if row is None else row[0]
        if not self._read_only:
            self._gets[key] = value
        return value

    def range(self, begin: bytes, end: bytes, limit: int = 1000, *, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        check_range(begin, end, limit)
        own = self._written(begin, end)
        query = (begin, end, limit + sum(v is None for v in own.values()), reverse)
        try:
            rows = _select(self._connection(), query)
        except apsw.Error as error:
            raise _translate(self._store.path, error) from error
        if not self._read_only:
            self._ranges[query] = rows
        if not own:
            return list(rows)
        return overlaid(rows, own, limit, reverse=reverse)

    def commit(self) -> None:
        con = self._con
        if con is None:
            raise ClosedError("this transaction has ended")
        try:
            if self._writes:
                self._commit_writes(con)
        except apsw.Error as error:
            raise _translate(self._store.path, error) from error
        finally:
            self.abort()

    def _commit_writes(self, con: apsw.Connection) -> None:
        if self._begun:
            try:
                self._apply(con)
                con.execute("COMMIT")
                self._begun = False
                return
            except apsw.BusyError:  # somebody committed since our snapshot, or is about to
                con.execute("ROLLBACK")
                self._begun = False
        con.execute("BEGIN IMMEDIATE")
        self._begun = True
        for key, value in self._gets.items():
            row = con.execute(_GET, (key,)).fetchone()
            if (None if row is None else row[0]) != value:
                raise Conflict("a key read by this transaction was changed")
        for query, rows in self._ranges.items():
            if _select(con, query) != rows:
                raise Conflict("a range read by this transaction was changed")
        self._apply(con)
        con.execute("COMMIT")
        self._begun = False

    def _apply(self, con: apsw.Connection) -> None:
        for key, value in self._writes.items():
            if value is None:
                con.execute(_DELETE, (key,))
            else:
                con.execute(_PUT, (key, value))

    def abort(self) -> None:
        con, self._con = self._con, None
        if con is None:
            return
        if self._begun:
            self._begun = False
            with contextlib.suppress(apsw.Error):
                if con.in_transaction:
                    con.execute("ROLLBACK")
        self._store.give_back(con)


class SqliteWatch(Watch):
    """Looks every 20 ms whether anyone has committed and, if so, compares the prefix with the last look.

    Meant for small prefixes (configuration, cluster state): it keeps a copy, of at most 10,000 pairs.
    """

    def __init__(self, store: SqliteStore, con: apsw.Connection, prefix: bytes) -> None:
        self._store = store
        self._con: apsw.Connection | None = con
        self._begin, self._end = prefix, prefix_end(prefix)
        self._pending: deque[bytes] = deque()
        self._version = -1
        self._seen: dict[bytes, bytes] = {}
        self._look()
        self._pending.clear()

    def _look(self) -> None:
        con = self._con
        if con is None or self._store.closed:
            raise StopAsyncIteration
        with _errors(self._store.path):
            version = _number(con, "PRAGMA data_version")
            if version == self._version:
                return
            rows = _select(con, (self._begin, self._end, MAX_RANGE + 1, False))
        if len(rows) > MAX_RANGE:
            raise LimitError(f"more than {MAX_RANGE} keys under a watched prefix")
        now = dict(rows)
        self._version = version
        self._pending.extend(sorted(k for k in now.keys() | self._seen.keys() if now.get(k) != self._seen.get(k)))
        self._seen = now

    async def __anext__(self) -> bytes:
        if not self._pending:
            self._look()
        while not self._pending:
            await trio.sleep(WATCH_POLL_S)
            self._look()
        return self._pending.popleft()

    def close(self) -> None:
        con, self._con = self._con, None
        if con is not None:
            self._store.give_back(con)


class SqliteStore(Store):
    """Opens (or creates, when `create`) the store in the file `path`."""

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        self.path = Path(path)
        self.closed = False
        self._pid = os.getpid()
        self._free: list[apsw.Connection] = []
        self._all: list[apsw.Connection] = []
        self._lock = threading.Lock()
        if not create and not self.path.is_file():
            raise FormatError(f"there is no metadata store at {self.path}.")
        with _errors(self.path):
            con = self._connect()
            try:
                self._check_format(con, create)
            except BaseException:
                con.close()
                raise
        self._all.append(con)
        self._free.append(con)

    def _connect(self) -> apsw.Connection:
        con = apsw.Connection(str(self.path))
        try:
            con.set_busy_timeout(BUSY_MS)
            con.execute("PRAGMA cache_size=-32768")
            con.execute("PRAGMA synchronous=NORMAL")
            con.wal_autocheckpoint(CHECKPOINT_PAGES)
        except BaseException:
            con.close()
            raise
        return con

    def _check_format(self, con: apsw.Connection, create: bool) -> None:
        ids = self._ids(con)
        if ids[0] == (0, 0, 0) and create:
            con.execute("PRAGMA journal_mode=WAL")
            con.execute("BEGIN IMMEDIATE")
            if self._ids(con)[0] == (0, 0, 0):
                con.execute("CREATE TABLE kv(k BLOB PRIMARY KEY, v BLOB NOT NULL) WITHOUT ROWID")
                con.execute("CREATE TABLE sync(id INTEGER PRIMARY KEY, n INTEGER NOT NULL)")
                con.execute("INSERT INTO sync VALUES(1, 0)")
                con.execute(f"PRAGMA application_id={APPLICATION_ID}")
                con.execute(f"PRAGMA user_version={FORMAT_VERSION}")
            con.execute("COMMIT")
            self._sync(con)
            directory = os.open(self.path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
            ids = self._ids(con)
        (application, version, _), mode = ids
        if application != APPLICATION_ID:
            raise FormatError(f"{self.path} is not a kvfs metadata store.")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"the metadata store {self.path} has format version {version}; this kvfs reads version {FORMAT_VERSION}."
            )
        if mode != "wal":
            raise DamagedError(f"the metadata store {self.path} has lost its write-ahead mode ({mode}).")
        tables = {row[0] for row in con.execute("SELECT name FROM sqlite_schema WHERE type='table'")}
        if not {"kv", "sync"} <= tables:
            raise DamagedError(f"the metadata store {self.path} is damaged: a table is missing.")

    @staticmethod
    def _ids(con: apsw.Connection) -> tuple[tuple[int, int, int], str]:
        application = _number(con, "PRAGMA application_id")
        version = _number(con, "PRAGMA user_version")
        tables = _number(con, "SELECT count(*) FROM sqlite_schema")
        mode = str(con.execute("PRAGMA journal_mode").fetchall()[0][0])
        return (application, version, tables), mode

    def _take(self) -> apsw.Connection:
        if self.closed:
            raise ClosedError(f"the metadata store {self.path} is closed")
        if self._pid != os.getpid():
            raise StoreError("a metadata store cannot be used after fork; open it again in the child")
        with self._lock:
            if self._free:
                return self._free.pop()
            if len(self._all) >= MAX_OPEN:
                raise LimitError(f"more than {MAX_OPEN} transactions and watches open at once")
            with _errors(self.path):
                con = self._connect()
            self._all.append(con)
            return con

    def give_back(self, con: apsw.Connection) -> None:
        """For this module's transactions and watches only."""
        if not self.closed:
            self._free.append(con)

    def transact(self, *, read_only: bool = False) -> SqliteTxn:
        return SqliteTxn(self, self._take(), read_only)

    def watch(self, prefix: bytes) -> SqliteWatch:
        check_key(prefix)
        prefix_end(prefix)
        return SqliteWatch(self, self._take(), prefix)

    @staticmethod
    def _sync(con: apsw.Connection) -> None:
        con.execute("PRAGMA synchronous=FULL")
        try:
            con.execute("UPDATE sync SET n=n+1 WHERE id=1")
        finally:
            con.execute("PRAGMA synchronous=NORMAL")

    def sync(self) -> None:
        con = self._take()
        try:
            with _errors(self.path):
                self._sync(con)
        finally:
            self.give_back(con)

    def verify(self) -> list[str]:
        """Reads the whole file and says what contradicts itself in it; empty when sound."""
        con = self._take()
        try:
            rows = [str(row[0]) for row in con.execute("PRAGMA integrity_check(100)")]
        except apsw.Error as error:
            return [str(_translate(self.path, error))]
        finally:
            self.give_back(con)
        return [] if rows == ["ok"] else rows

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for con in self._all:
            with contextlib.suppress(apsw.Error):
                con.close(True)
        self._all.clear()
        self._free.clear()
