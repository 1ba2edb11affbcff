"""PostgreSQL on the mount: no transaction that pgbench saw committed is lost when the server or kvfs is killed."""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import attempt, attempt_kvfs, kill_daemon, kvfs, run, wait_gone
from kvfs.mount import service

pytestmark = pytest.mark.timeout(600)

USER = "postgres"
CLIENTS = 2
START_S = 60
SETTINGS = """
listen_addresses = ''
fsync = on
synchronous_commit = on
full_page_writes = on
shared_buffers = 16MB        # less than the tables: pages are written in between
checkpoint_timeout = 30s
max_wal_size = 64MB
"""
# pgbench's own transaction, with who did it in the filler.
TRANSACTION = r"""
\set aid random(1, 100000 * :scale)
\set bid random(1, 1 * :scale)
\set tid random(1, 10 * :scale)
\set delta random(-5000, 5000)
BEGIN;
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
SELECT abalance FROM pgbench_accounts WHERE aid = :aid;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;
UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = :bid;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime, filler)
  VALUES (:tid, :bid, :aid, :delta, CURRENT_TIMESTAMP, :round || ' ' || :client_id);
END;
"""


class Postgres:
    """A database cluster in `data`; its server is a child of this process."""

    def __init__(self, programs: Path, data: Path, outside: Path) -> None:
        self.programs, self.data, self.outside = programs, data, outside
        self.log = outside / "log"
        self.acknowledged: Counter[str] = Counter()
        self.rounds = 0
        self.server: subprocess.Popen[bytes] | None = None
        (outside / "transaction").write_text(TRANSACTION)

    def program(self, name: str, *options: str | Path, seconds: float = 120) -> str:
        return run(self.programs / name, *options, cwd=self.outside, user=USER, seconds=seconds)

    def query(self, sql: str) -> list[str]:
        return self.program("psql", "-h", self.outside, "-d", "postgres", "-XAtc", sql).splitlines()

    def create(self) -> None:
        self.program("initdb", "-D", self.data, "--data-checksums", "-A", "trust", "-E", "UTF8", "--no-locale")
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(SETTINGS + f"unix_socket_directories = '{self.outside}'\n")
        self.start()
        self.program("pgbench", "-h", self.outside, "-i", "-s", "3", "-q", "postgres")

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.server = subprocess.Popen(
                [self.programs / "postgres", "-D", self.data],
                cwd=self.outside, user=USER, group=USER, extra_groups=[],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        until = time.monotonic() + START_S
        while attempt(self.programs / "pg_isready", "-h", self.outside).returncode != 0:
            assert self.server.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < until, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """The postmaster and whatever it started: nothing of it holds the data directory afterwards."""
        if self.server is None:
            return
        children = children_of(self.server.pid)
        self.server.kill()
        self.server.wait(30)
        for child in children:  # those that wait for nothing end by themselves
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
            wait_gone(child)
        self.server = None

    def stop(self) -> None:
        assert self.server is not None
        self.server.send_signal(signal.SIGINT)  # fast shutdown
        assert self.server.wait(60) == 0, self.log.read_text()[-4000:]
        self.server = None

    def load(self, seconds: float) -> subprocess.Popen[bytes]:
        self.rounds += 1
        with (self.outside / f"pgbench-{self.rounds}").open("wb") as out:
            return subprocess.Popen(
                [
                    self.programs / "pgbench", "-h", self.outside, "-c", str(CLIENTS), "-T", str(int(seconds)), "-n",
                    "-f", "transaction", "-D", f"round={self.rounds}", "-l", f"--log-prefix=acknowledged-{self.rounds}",
                    "postgres",
                ],
                cwd=self.outside, user=USER, group=USER, extra_groups=[],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def collect(self, load: subprocess.Popen[bytes], least: int) -> None:
        """Once the server is dead: what each client of this round had seen committed."""
        assert load.wait(60) != 0, (self.outside / f"pgbench-{self.rounds}").read_text()
        before = self.acknowledged.total()
        for log in self.outside.glob(f"acknowledged-{self.rounds}.*"):
            for line in log.read_text().splitlines():
                client, _, latency, *_ = line.split()
                assert latency.isdigit(), line
                self.acknowledged[f"{self.rounds} {client}"] += 1
        print(f"{self.acknowledged.total() - before} transactions acknowledged")
        assert self.acknowledged.total() - before >= least, (self.outside / f"pgbench-{self.rounds}").read_text()

    def check(self) -> None:
        found = dict(
            row.rsplit("|", 1) for row in self.query("SELECT trim(filler), count(*) FROM pgbench_history GROUP BY 1")
        )
        assert found.keys() <= {f"{r} {c}" for r in range(1, self.rounds + 1) for c in range(CLIENTS)}
        for who, count in self.acknowledged.items():
            # The last one may have been committed without pgbench hearing of it.
            assert int(found.get(who, 0)) - count in (0, 1), (who, count, found)
        sums = self.query(
            "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),"
            " (SELECT sum(bbalance) FROM pgbench_branches), (SELECT sum(delta) FROM pgbench_history)"
        )
        assert len(set(sums[0].split("|"))) == 1, sums
        self.program("pg_amcheck", "-h", self.outside, "-d", "postgres", "--install-missing", "--heapallindexed")


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def postgres(directory: Path) -> Iterator[Postgres]:
    """A cluster on a new kvfs, with tables and a running server; afterwards kvfs is stopped and its data checked."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("this needs root and /dev/fuse")
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if not versions or not (versions[-1].parent / "pgbench").exists():
        pytest.skip("no PostgreSQL in /usr/lib/postgresql")
    uid = pwd.getpwnam(USER).pw_uid
    outside = Path(tempfile.mkdtemp(prefix="kvfs-pg-"))  # where its user may go, unlike pytest's directories
    server: Postgres | None = None
    try:
        (outside / "mnt").mkdir()
        kvfs("up", "--dir", directory, "--mount", outside / "mnt", "--size", "2G", "--detach")
        os.chown(outside, uid, -1)
        data = outside / "mnt" / "data"
        data.mkdir()
        os.chown(data, uid, -1)
        server = Postgres(versions[-1].parent, data, outside)
        server.create()
        yield server
        server.stop()
        server.program("pg_checksums", "--check", "-D", data)
        kvfs("down", "--dir", directory)
        assert kvfs("fsck", directory, "--data", seconds=300).endswith("clean\n")
    finally:
        if server is not None:
            server.kill()
        attempt_kvfs("down", "--dir", directory)
        service.unmount(outside / "mnt")
        shutil.rmtree(outside, ignore_errors=True)


def test_postmaster_killed_after_a_minute_of_pgbench(postgres: Postgres) -> None:
    load = postgres.load(600)
    time.sleep(60)
    postgres.kill()
    postgres.collect(load, least=1000)
    postgres.start()
    postgres.check()


def test_daemon_killed_under_pgbench(postgres: Postgres, directory: Path) -> None:
    rng = random.Random(8)
    for _ in range(3):
        load = postgres.load(600)
        time.sleep(rng.uniform(5, 15))
        kill_daemon(directory)
        postgres.collect(load, least=100)
        postgres.kill()
        kvfs("up", "--dir", directory, "--mount", postgres.outside / "mnt", "--detach")
        postgres.start()
        postgres.check()
