"""`kvfs put`, `get`, `ls`, `mount`, `replay --capacity` against real daemons, and what they say when it goes wrong."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import attempt_kvfs, kvfs
from kvfs.mount import service
from kvfs_usrbio import MISS, BlockStore

pytestmark = pytest.mark.timeout(120)


def refused(*args: str, code: int = 1, data: bytes | None = None) -> str:
    """The one sentence that a command says instead of doing anything."""
    done = attempt_kvfs(*args, data=data)
    assert (done.returncode, done.stdout) == (code, b""), (args, done.stdout, done.stderr)
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("kvfs: ")
    return lines[0]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running kvfs that several tests use; mounted elsewhere than in its directory."""
    root = tmp_path_factory.mktemp("shared")
    place, point = root / "a, b", root / "mnt point"
    try:
        kvfs("up", "--dir", str(place), "--mount", str(point), "--size", "128M", "--detach")
        yield root
    finally:
        attempt_kvfs("down", "--dir", str(place))
        service.unmount(point)


@pytest.fixture
def where(shared: Path) -> tuple[str, str]:
    return "--dir", str(shared / "a, b")


def test_ls_shows_namespaces_and_blocks(where: tuple[str, str]) -> None:
    long_key = "ab" * 40
    for key, size in (("01", 10), ("0102", 5000), (long_key, 7)):
        kvfs("put", *where, "ls/one", key, "-", data=b"x" * size)
    assert "ls/one" in kvfs("ls", *where).splitlines()
    names = kvfs("ls", *where, "ls/one").split()
    assert names[:2] == ["01", "0102"]
    assert len(names) == 3
    assert names[2].endswith(".long")
    found = json.loads(kvfs("ls", *where, "ls/one", "--json"))
    assert [(b["key"], b["size"]) for b in found] == [(names[0], 10), (names[1], 5000), (names[2], 7)]
    summaries = json.loads(kvfs("ls", *where, "--long", "--json"))
    assert {"namespace": "ls/one", "blocks": 3, "bytes": 5017} in summaries
    assert "5000" in kvfs("ls", *where, "ls/one", "-l")


def test_ls_of_many_blocks_is_complete(where: tuple[str, str]) -> None:
    from kvfs_usrbio import BlockStore

    keys = [i.to_bytes(4, "big") for i in range(3000)]
    with BlockStore.open(where[1], "ls/many") as store:
        assert set(store.put(keys, [b"value"] * len(keys))) == {1}
    assert kvfs("ls", *where, "ls/many").split() == [key.hex() for key in keys]


def test_a_mount_point_stands_for_its_data_directory(shared: Path, where: tuple[str, str]) -> None:
    point = shared / "mnt point"
    kvfs("put", "--dir", str(point), "by/mount", "0a", "-", data=b"abc")
    assert kvfs("get", *where, "by/mount", "0a") == "abc"
    (point / "folder").mkdir()
    assert kvfs("stat", "--dir", str(point / "folder"), "by/mount", "0a") == "3\n"
    assert json.loads(kvfs("status", "--dir", str(point), "--json"))["directory"] == where[1]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["ls", "no/such"], 1, "no namespace no/such"),
        (["get", "no/such", "01"], 1, "no namespace no/such"),
        (["rm", "no/such", "01"], 1, "no namespace no/such"),
        (["stat", "no/such", "01"], 1, "no namespace no/such"),
        (["ls", "../x"], 2, "no tenant or namespace name"),
        (["put", "a/b/c", "01", "/dev/null"], 1, "no bytes"),
        (["put", "a/.b", "01", "/proc/self/comm"], 2, "no tenant or namespace name"),
        (["put", "a/b", "0x1", "/proc/self/comm"], 2, "not a key in hexadecimal"),
        (["put", "a/b", "", "/proc/self/comm"], 2, "at least one byte"),
        (["put", "a/b", "01", "/no/such/file"], 1, "No such file"),
        (["put", "a/b", "01", "/"], 1, "Is a directory"),
        (["put", "a/b", "01", "/dev/zero"], 1, "more than 16 MiB"),
        (["replay", "/no/such/trace"], 1, "/no/such/trace: No such file"),
        (["replay", "/proc/self/comm"], 1, "line 1"),
        (["replay", "/proc/self/comm", "--block-bytes", "7"], 2, "8 bytes to 16M"),
        (["replay", "/proc/self/comm", "--block-bytes", "many"], 2, "'many' is not a size"),
        (["replay", "/proc/self/comm", "--capacity", "1K"], 2, "at least 64M"),
        (["replay", "/proc/self/comm", "--namespace", "a b"], 2, "no tenant or namespace name"),
    ],
)
def test_wrong_input_gets_one_sentence(where: tuple[str, str], arguments: list[str], code: int, says: str) -> None:
    assert says in refused(arguments[0], *where, *arguments[1:], code=code)


def test_a_namespace_that_was_only_asked_for_is_not_made(where: tuple[str, str]) -> None:
    refused("get", *where, "only/asked", "01")
    assert "only/asked" not in kvfs("ls", *where)


def test_get_that_cannot_write_says_so(where: tuple[str, str]) -> None:
    kvfs("put", *where, "full/disk", "01", "-", data=b"x" * 100_000)
    assert "cannot write /no/such/dir/f" in refused("get", *where, "full/disk", "01", "-o", "/no/such/dir/f")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvfs", "get", *where, "full/disk", "01"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == b"kvfs: cannot write standard output: No space left on device\n"


def test_another_length_under_the_same_key_is_refused(where: tuple[str, str]) -> None:
    kvfs("put", *where, "same/key", "01", "-", data=b"abc")
    assert "File exists" in refused("put", *where, "same/key", "01", "-", data=b"abcd")
    assert kvfs("get", *where, "same/key", "01") == "abc"


def test_blocks_of_a_durable_namespace_are_never_evicted(tmp_path: Path) -> None:
    where = "--dir", str(tmp_path / "kv")
    size = 64 << 10
    keys = [i.to_bytes(4, "big") for i in range(3000)]
    try:
        kvfs("up", *where, "--size", "128M", "--detach")
        assert kvfs("namespace", *where, "me/kept", "--durable") == "me/kept: durable\n"
        assert "exists" in refused("namespace", *where, "me/kept")
        with BlockStore.open(where[1], "me/kept") as kept, BlockStore.open(where[1], "me/cache") as cache:
            buffer = cache.alloc(64 * size)
            buffer.view[:] = bytes(range(256)) * (len(buffer) // 256)
            parts = [buffer[i * size : (i + 1) * size] for i in range(64)]
            assert kept.put(keys[:64], parts) == [1] * 64
            for first in range(0, len(keys), 60):
                assert cache.put(keys[first : first + 60], parts[:60]) == [1] * 60
            assert cache.exists(keys[:1]) == [MISS]
            buffer.view[:] = bytes(len(buffer))
            assert kept.get(keys[:64], parts) == [size] * 64
            assert bytes(parts[63]) == bytes(range(256)) * (size // 256)
        # It is still durable after a restart.
        kvfs("down", *where)
        kvfs("up", *where, "--detach")
        with BlockStore.open(where[1], "me/kept") as kept, BlockStore.open(where[1], "me/cache") as cache:
            more = [b"more" + key for key in keys[:1800]]
            for first in range(0, len(more), 60):
                assert cache.put(more[first : first + 60], [bytes(size)] * 60) == [1] * 60
            assert kept.exists(keys[:64]) == [size] * 64
    finally:
        attempt_kvfs("down", *where)
        service.unmount(tmp_path / "kv" / "mnt")


def test_nothing_runs_there(tmp_path: Path) -> None:
    for command in (["ls"], ["ls", "a/b"], ["get", "a/b", "01"], ["status"], ["down"]):
        assert "no kvfs runs in" in refused(command[0], "--dir", str(tmp_path), *command[1:])
    assert "no kvfs" in refused("put", "--dir", str(tmp_path), "a/b", "01", "-", data=b"x")
    assert list(tmp_path.iterdir()) == []


def test_mount_serves_an_existing_directory(tmp_path: Path) -> None:
    place, point = tmp_path / "data", tmp_path / "here"
    url = f"kvfs://{place}"
    assert "holds no kvfs" in refused("mount", url, str(point))
    assert not place.exists()
    try:
        kvfs("up", "--dir", str(place), "--size", "128M", "--detach")
        kvfs("put", "--dir", str(place), "a/b", "01", "-", data=b"abc")
        assert "runs already" in refused("mount", url, str(point))
        kvfs("down", "--dir", str(place))
        (tmp_path / "full").mkdir()
        (tmp_path / "full/file").touch()
        assert "is not empty" in refused("mount", url, str(tmp_path / "full"))
        assert "not a directory" in refused("mount", url, str(tmp_path / "full/file"))
        kvfs("mount", url, str(point), "--detach")
        assert (point / ".kvfs/blocks/a/b/01/01").read_bytes() == b"abc"
        kvfs("down", "--dir", str(point))
        assert not service.is_mounted(point)
    finally:
        attempt_kvfs("down", "--dir", str(place))
        service.unmount(point)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://x/y", "is not kvfs:///PATH"),
        ("kvfs://host/data", "is not kvfs://HOST:PORT,HOST:PORT/TENANT/NAME"),
        ("kvfs://", "names no data directory"),
        ("kvfs:///data?x=1", "is not kvfs:///PATH"),
    ],
)
def test_mount_of_a_wrong_url(tmp_path: Path, url: str, says: str) -> None:
    assert says in refused("mount", url, str(tmp_path / "point"), code=2)
    assert list(tmp_path.iterdir()) == []


def test_replay_with_a_capacity_evicts_and_leaves_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    # 160 MiB of blocks, each asked for twice in a row: the second always hits, and most are pushed out later.
    lines = [json.dumps({"timestamp": 0, "hash_ids": list(range(n, n + 16))}) for n in range(0, 2560, 16) for _ in "ab"]
    trace.write_text("\n".join(lines) + "\n")
    report = json.loads(
        kvfs(
            "replay", str(trace), "--dir", str(tmp_path / "none"), "--capacity", "64M", "--block-bytes", "64K", "--json"
        )
    )
    assert (report["references"], report["prefix_hits"], report["stored"]) == (5120, 2560, 2560)
    assert report["wrong"] == report["refused"] == 0
    assert report["evictions"] > 1000
    assert os.listdir(tmp_path) == ["trace.jsonl"]


def test_a_directory_that_cannot_be_used_is_left_as_it_is(tmp_path: Path) -> None:
    """Another version, damage, something else's: one sentence; put right again, everything is there."""
    place = tmp_path / "data"
    store, metadata = place / "store.kvfs", place / "meta.db"
    try:
        kvfs("up", "--dir", str(place), "--size", "64M", "--detach")
        kvfs("put", "--dir", str(place), "a/b", "01", "-", data=b"abc")
        kvfs("down", "--dir", str(place))
        for side in ("-wal", "-shm"):
            metadata.with_name(metadata.name + side).unlink(missing_ok=True)
        good = metadata.read_bytes()

        with contextlib.closing(sqlite3.connect(metadata)) as other:
            other.execute("PRAGMA user_version=77")
            other.commit()
        assert "has format version 77; this kvfs reads version 1" in refused("up", "--dir", str(place))
        metadata.write_bytes(os.urandom(100) + good[100:])
        assert "is not a kvfs metadata store" in refused("up", "--dir", str(place))
        metadata.write_bytes(good)

        head = store.read_bytes()[: 2 << 20]
        with store.open("r+b") as image:
            image.write(os.urandom(len(head)))
        assert f"{place}: no valid superblock" in refused("up", "--dir", str(place))
        with store.open("r+b") as image:
            image.write(head)

        store.rename(tmp_path / "away")
        assert "is missing" in refused("up", "--dir", str(place))
        (tmp_path / "away").rename(store)

        kvfs("up", "--dir", str(place), "--detach")
        assert kvfs("get", "--dir", str(place), "a/b", "01") == "abc"
        assert "in use by another kvfs" in refused("up", "--dir", str(place))
    finally:
        attempt_kvfs("down", "--dir", str(place))
        service.unmount(place / "mnt")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small tmpfs")
def test_a_full_and_a_read_only_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M", "none", str(disk)], check=False, timeout=20)
    if made.returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    try:
        assert "No space left on device" in refused("up", "--dir", str(disk / "kv"), "--size", "64M")
        assert os.listdir(disk / "kv") == ["lock"]
        assert "GB free, the bench needs" in refused("bench", "--dir", str(disk / "kv"), "--quick")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=20)
        assert f"{disk}/kv/lock: Read-only file system" in refused("up", "--dir", str(disk / "kv"))
        assert f"{disk}/new cannot be made: Read-only" in refused("up", "--dir", str(disk / "new"))
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=20)
