"""The embedded engine: the conformance suite, and what is its own (format, damage, fork)."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from meta_conformance import StoreConformance

import kvfs.meta
from kvfs.meta import kv
from kvfs.meta.kv import DamagedError, FormatError, LimitError, Store, StoreError
from kvfs.meta.sqlite import MAX_OPEN, SqliteStore

HERE = Path(__file__).parent


def open_sqlite(directory: str) -> Store:
    return SqliteStore(Path(directory) / "meta.db")


class TestSqlite(StoreConformance):
    opener = "test_meta_sqlite:open_sqlite"

    def child_path(self) -> str:
        package = Path(kvfs.meta.__file__).parents[2]
        return f"{package}:{HERE}"


def test_other_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "meta.db"
    SqliteStore(path).close()
    with sqlite3.connect(path) as con:
        con.execute("PRAGMA user_version=7")
    con.close()
    with pytest.raises(FormatError, match=r"has format version 7; this kvfs reads version 1\.$"):
        SqliteStore(path)


def test_other_files_are_refused_and_kept(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"not a database at all, but long enough to have a header " * 100)
    before = text.read_bytes()
    with pytest.raises(FormatError):
        SqliteStore(text)
    assert text.read_bytes() == before
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as con:
        con.execute("CREATE TABLE mine(x)")
    con.close()
    with pytest.raises(FormatError, match="not a kvfs metadata store"):
        SqliteStore(foreign)
    with pytest.raises(FormatError, match="no metadata store"):
        SqliteStore(tmp_path / "absent", create=False)
    assert not (tmp_path / "absent").exists()
    with pytest.raises(StoreError):
        SqliteStore(tmp_path / "no" / "such" / "directory")


def test_damage_is_an_error_never_wrong_data(tmp_path: Path) -> None:
    path = tmp_path / "meta.db"
    value = os.urandom(100)
    with SqliteStore(path) as store:
        for n in range(20):

            def fill(txn: kv.Txn, n: int = n) -> None:
                for m in range(100):
                    txn.put(b"%02d-%02d" % (n, m), value)

            kv.run(store, fill)
        assert store.verify() == []
    image = path.read_bytes()
    pages = len(image) // 4096
    for page in range(pages):
        (tmp_path / "meta.db-wal").unlink(missing_ok=True)
        (tmp_path / "meta.db-shm").unlink(missing_ok=True)
        path.write_bytes(image[: page * 4096] + b"\xa5" * 4096 + image[(page + 1) * 4096 :])
        try:
            with SqliteStore(path) as store:
                assert store.verify()
                found = kv.read(store, lambda t: t.range(b"", b"\xff", 10_000))
                assert len(found) == 2000  # the damaged page held none of them
                assert all(v == value for _, v in found)
        except (DamagedError, FormatError):
            continue


def test_fork_is_refused(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "meta.db") as store:
        pid = os.fork()
        if pid == 0:
            try:
                store.transact()
            except StoreError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_open_transactions_are_bounded(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "meta.db") as store:
        txns = [store.transact() for _ in range(MAX_OPEN)]
        with pytest.raises(LimitError):
            store.transact()
        for txn in txns:
            txn.abort()
        kv.run(store, lambda t: t.put(b"k", b""))
