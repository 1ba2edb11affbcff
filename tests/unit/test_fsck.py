"""`kvfs fsck` on real data directories: what it finds, what it mends, what it refuses, and its exit codes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trio

pytest.importorskip("kvfs._node", reason="the native module is not built")

from kvfs.daemon import Layout
from kvfs.dataplane import DataPlane
from kvfs.meta import namespaces, schema
from kvfs.meta.kv import Txn, run
from kvfs.meta.sqlite import SqliteStore
from kvfs.meta.tree import Tree
from kvfs.node import Node, NodeConfig, format_store
from kvfs_tools.fsck import FsckError, FsckReport, fsck

pytestmark = pytest.mark.timeout(60)

SIZE = 64 << 20
CONTENT = {b"f": os.urandom(200_000), b"g": os.urandom(70_000)}
BLOCKS = {bytes([i]) * 8: os.urandom(100 + i * 9000) for i in range(1, 8)}


class Place:
    """A stopped data directory with /d/f, /d/g and seven blocks of default/cache."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        root.mkdir()
        format_store(self.layout.store, SIZE, segment_bytes=1 << 20, journal_bytes=4 << 20)
        self.inos: dict[bytes, int] = {}
        self.ns = 0
        trio.run(self._fill)

    async def _fill(self) -> None:
        with SqliteStore(self.layout.metadata) as store:
            tree = Tree(store)
            d = tree.mkdir(schema.ROOT_INO, b"d", 0o755, 0, 0).ino
            self.ns = namespaces.create(store, "default", "cache").id
            async with Node.open(NodeConfig(self.layout.store)) as node, DataPlane.open(node) as data:
                for name, content in CONTENT.items():
                    ino = self.inos[name] = tree.create(d, name, 0o644, 0, 0).ino
                    data.inode_open(ino, 0)
                    await data.write(ino, 0, content)
                    data.inode_close(ino)
                    tree.wrote(ino, len(content))
                for key, value in BLOCKS.items():
                    await data.block_put(self.ns, key, value)
                await data.sync()

    def change(self, body: Callable[[Txn], None]) -> None:
        with SqliteStore(self.layout.metadata) as store:
            run(store, body)

    def flip(self, content: bytes) -> None:
        """Damages the data that begins with these bytes."""
        raw = self.layout.store.read_bytes()
        at = raw.find(content[:512])
        assert at > 0
        assert raw.find(content[:512], at + 1) < 0
        self.poke(at + 3, bytes([raw[at + 3] ^ 1]))

    def poke(self, at: int, value: bytes) -> None:
        with open(self.layout.store, "r+b") as f:
            f.seek(at)
            f.write(value)

    async def contents(self) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        files: dict[bytes, bytes] = {}
        blocks: dict[bytes, bytes] = {}
        async with Node.open(NodeConfig(self.layout.store)) as node, DataPlane.open(node) as data:
            for name, ino in self.inos.items():
                data.inode_open(ino, len(CONTENT[name]))
                files[name] = await data.read(ino, 0, len(CONTENT[name]))
                data.inode_close(ino)
            for key, value in BLOCKS.items():
                if await data.block_exists(self.ns, key) is not None:
                    blocks[key] = await data.block_get(self.ns, key, 0, len(value))
        return files, blocks

    def mend(self) -> FsckReport:
        """Repairs; afterwards all is clean."""
        report = fsck(self.layout.root, data=True, repair=True)
        assert report.exit_code == 1, report
        assert fsck(self.layout.root, data=True).exit_code == 0
        return report


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "data")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvfs", "fsck", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_sound(place: Place) -> None:
    report = fsck(place.layout.root, data=True)
    assert (report.exit_code, report.found, report.problems) == (0, 0, [])
    assert report.blocks == len(BLOCKS)
    assert report.verified_bytes == report.data_bytes == sum(map(len, [*CONTENT.values(), *BLOCKS.values()]))
    before = place.layout.store.read_bytes()
    assert fsck(place.layout.root, data=True, repair=True).exit_code == 0
    assert place.layout.store.read_bytes() == before
    assert trio.run(place.contents) == (CONTENT, BLOCKS)


def test_damaged_data_is_named_and_dropped(place: Place) -> None:
    key, value = list(BLOCKS.items())[4]
    place.flip(value)
    place.flip(CONTENT[b"f"][2 * 65536 :])
    assert fsck(place.layout.root).exit_code == 0  # structure only
    seen: list[tuple[int, int]] = []
    report = fsck(place.layout.root, data=True, progress=lambda done, total: seen.append((done, total)))
    assert report.exit_code == 4
    assert report.left == 2
    assert {(p.path, p.begin, p.end, p.block) for p in report.problems} == {
        ("/d/f", 2 * 65536, 3 * 65536, None),
        (None, None, None, f"default/cache {key.hex()}"),
    }
    assert place.mend().left == 0
    files, blocks = trio.run(place.contents)
    f = CONTENT[b"f"]
    assert files == CONTENT | {b"f": f[: 2 * 65536] + bytes(65536) + f[3 * 65536 :]}
    assert blocks == {k: v for k, v in BLOCKS.items() if k != key}


def test_superblock_copy(place: Place) -> None:
    before = place.layout.store.read_bytes()
    place.poke(64 << 10, b"x")
    assert fsck(place.layout.root).exit_code == 4
    place.mend()
    assert place.layout.store.read_bytes() == before


def test_chunks_that_belong_to_nobody(place: Place) -> None:
    place.change(lambda txn: txn.delete(schema.namespace_key("default", "cache")))
    report = fsck(place.layout.root)
    assert report.exit_code == 4
    assert {p.block for p in report.problems} == {f"(namespace {place.ns}) {k.hex()}" for k in BLOCKS}
    place.mend()
    assert trio.run(place.contents) == (CONTENT, {})


def test_chunks_of_no_file_and_beyond_its_end(place: Place) -> None:
    with SqliteStore(place.layout.metadata) as store:
        tree = Tree(store)
        d = tree.lookup(schema.ROOT_INO, b"d").ino
        tree.unlink(d, b"g")
        tree.reclaim(place.inos[b"g"])
        tree.setattr(place.inos[b"f"], size=65536)
    # The truncation is still under way: what it has to remove is no error.
    assert fsck(place.layout.root).left == 2
    with SqliteStore(place.layout.metadata) as store:
        Tree(store).trimmed(place.inos[b"f"])
    report = place.mend()
    assert sorted((p.path or "", p.begin) for p in report.problems) == [
        (f"(inode {place.inos[b'g']})", 0),
        (f"(inode {place.inos[b'g']})", 65536),
        ("/d/f", 65536),
        ("/d/f", 131072),
        ("/d/f", 196608),
    ]


WRITER = """
import os, sys, trio
from pathlib import Path
from kvfs.dataplane import DataPlane
from kvfs.node import Node, NodeConfig

async def main():
    async with Node.open(NodeConfig(Path(sys.argv[1]))) as node, DataPlane.open(node) as data:
        for ino, offset in ((999, 0), (int(sys.argv[2]), 1 << 20)):
            data.inode_open(ino, 0)
            await data.write(ino, offset, bytes(65536))
            await data.fsync(ino)
        os._exit(0)

trio.run(main)
"""


def fsck_when_free(directory: Path) -> FsckReport:
    """The kernel may hold a killed process's store a little longer, until its I/O has ended."""
    until = time.monotonic() + 20
    while True:
        try:
            return fsck(directory, data=True)
        except FsckError as e:
            if "in use" not in str(e) or time.monotonic() > until:
                raise
        time.sleep(0.05)


def test_what_a_kill_leaves_behind_is_no_problem(place: Place) -> None:
    """Bytes whose name or size the killed daemon had not stored yet."""
    subprocess.run(
        [sys.executable, "-c", WRITER, str(place.layout.store), str(place.inos[b"f"])], check=True, timeout=30
    )
    report = fsck_when_free(place.layout.root)
    assert (report.exit_code, report.problems, report.closed_properly) == (0, [], False)
    assert report.unfinished_chunks == 2
    assert "2 chunks" in command(str(place.layout.root)).stdout
    # Damage still is one, and what the kill left goes with the repair.
    place.flip(CONTENT[b"g"])
    assert [p.path for p in place.mend().problems] == ["/d/g"]
    assert fsck(place.layout.root).unfinished_chunks == 0


def test_an_unreadable_inode_does_not_cost_its_data(place: Place) -> None:
    place.change(lambda txn: txn.put(schema.inode_key(place.inos[b"f"]), b"\xc1"))
    assert fsck(place.layout.root).exit_code == 4
    place.mend()
    assert trio.run(place.contents) == (CONTENT, BLOCKS)


def test_damaged_database_is_left_and_drops_nothing(place: Place) -> None:
    with open(place.layout.metadata, "r+b") as f:
        f.seek(4096)
        f.write(os.urandom(4096))
    report = fsck(place.layout.root, repair=True)
    assert report.exit_code == 4
    assert not report.orphans_compared
    place.layout.metadata.unlink()
    assert fsck(place.layout.root, repair=True).exit_code == 4
    assert trio.run(place.contents) == (CONTENT, BLOCKS)


def test_command(place: Place) -> None:
    root = str(place.layout.root)
    done = command(root)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("clean\n")
    place.poke(64 << 10, b"x")
    done = command(root, "--json")
    assert done.returncode == 4
    assert msgspec.json.decode(done.stdout, type=FsckReport).left == 1
    done = command(root, "--repair", "--data")
    assert done.returncode == 1
    assert "mended" in done.stdout


@pytest.mark.parametrize("arguments", [["--nonsense"], ["a", "b"]])
def test_wrong_usage_exits_16(arguments: list[str]) -> None:
    assert command(*arguments).returncode == 16


def refused(place: Place) -> str:
    before = place.layout.store.read_bytes() if place.layout.store.exists() else b""
    done = command(str(place.layout.root), "--repair")
    assert done.returncode == 8
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert (place.layout.store.read_bytes() if place.layout.store.exists() else b"") == before
    return done.stderr


def test_refuses_a_running_daemon(place: Place) -> None:
    with open(place.layout.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use" in refused(place)


def test_refuses_what_is_not_kvfs(place: Place) -> None:
    place.poke(0, bytes(1 << 20))
    assert "not a kvfs store" in refused(place)
    place.layout.store.unlink()
    assert "not a kvfs data directory" in refused(place)


def test_refuses_another_version(place: Place) -> None:
    def body(txn: Txn) -> None:
        found = schema.decode_super(txn.get(schema.SUPER_KEY) or b"")
        txn.put(schema.SUPER_KEY, schema.encode(msgspec.structs.replace(found, version=99)))

    place.change(body)
    assert "version" in refused(place)
