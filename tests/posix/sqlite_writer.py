"""A database writer for the tests: `python sqlite_writer.py FILE MODE` commits rows until it is killed or fails.

Each row's number is printed once its transaction is committed and synced. EXTRA, because in rollback mode FULL does not
sync the directory after the removal of the journal that commits.
"""

from __future__ import annotations

import itertools
import sqlite3
import sys


def main(path: str, mode: str) -> None:
    db = sqlite3.connect(path, isolation_level=None, timeout=10)
    db.execute(f"PRAGMA journal_mode={mode}")
    db.execute("PRAGMA synchronous=EXTRA")
    db.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, copy INTEGER, filler BLOB)")
    first = db.execute("SELECT coalesce(max(id), 0) FROM t").fetchone()[0] + 1
    for number in itertools.count(first):
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO t VALUES(?, ?, randomblob(?))", (number, number, number * 37 % 9000))
        db.execute("UPDATE t SET filler=randomblob(500) WHERE id=?", (number // 2,))
        db.execute("COMMIT")
        print(number, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
