"""`kvfs up` to `kvfs down` through the command line: what a person does first, and again after a kill."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import attempt_kvfs, kill_daemon
from kvfs.mount import service
from kvfs_usrbio import File
from waiting import wait_for


def kvfs(*args: str, data: bytes | None = None, code: int = 0) -> bytes:
    done = attempt_kvfs(*args, data=data)
    assert done.returncode == code, (args, done.returncode, done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "kv"
    yield place
    attempt_kvfs("down", "--dir", place)
    service.unmount(place / "mnt")


def test_a_first_session(directory: Path, tmp_path: Path) -> None:
    where = ("--dir", str(directory))
    kvfs("up", *where, "--size", "256M", "--detach")
    block = os.urandom(100_000)
    assert kvfs("put", *where, "me/cache", "0a1b2c", "-", data=block) == b"stored\n"
    assert kvfs("put", *where, "me/cache", "0a1b2c", "-", data=block) == b"was there\n"
    assert kvfs("get", *where, "me/cache", "0a1b2c") == block
    assert kvfs("stat", *where, "me/cache", "0a1b2c") == b"100000\n"
    seen = directory / "mnt/.kvfs/blocks/me/cache/0a/0a1b2c"
    assert hashlib.sha256(seen.read_bytes()).digest() == hashlib.sha256(block).digest()
    (directory / "mnt/note").write_text("kept")
    status = json.loads(kvfs("status", *where, "--json"))
    assert status["namespaces"] == ["me/cache"]
    assert status["stats"]["block_chunks"] == 1
    kvfs("rm", *where, "me/cache", "0a1b2c")
    assert b"no such block" in kvfs("get", *where, "me/cache", "0a1b2c", code=1)
    assert b"in use" in kvfs("up", *where, "--detach", code=1)
    kvfs("down", *where)
    assert b"no kvfs runs" in kvfs("status", *where, code=1)
    assert not service.is_mounted(directory / "mnt")
    kvfs("up", *where, "--detach")
    assert (directory / "mnt/note").read_text() == "kept"


def test_a_data_directory_deeper_than_a_socket_address(tmp_path: Path) -> None:
    """The directory's sockets (control, file, admin) work although their paths are above sockaddr_un's 108 bytes."""
    directory = tmp_path.joinpath(*["deeper" * 8] * 4)
    directory.mkdir(parents=True)
    where = ("--dir", str(directory))
    mountpoint = tmp_path / "mnt"
    block = os.urandom(5000)
    try:
        kvfs("up", *where, "--mount", str(mountpoint), "--size", "256M", "--detach")
        kvfs("put", *where, "me/cache", "0a1b2c", "-", data=block)
        assert kvfs("get", *where, "me/cache", "0a1b2c") == block
        with open(mountpoint / "file", "w+b") as opened, File.open(mountpoint, opened.fileno()) as file:
            assert file.write([0], [block]) == [len(block)]
            assert opened.read() == block
        kvfs("down", *where)
    finally:
        attempt_kvfs("down", *where)
        service.unmount(mountpoint)


def test_what_was_durable_is_there_after_a_kill(directory: Path) -> None:
    where = ("--dir", str(directory))
    kvfs("up", *where, "--size", "256M", "--detach")
    block = os.urandom(70_000)
    kvfs("put", *where, "me/cache", "0a1b2c", "-", data=block)
    with open(directory / "mnt/file", "wb") as f:
        f.write(block)
        f.flush()
        os.fsync(f.fileno())
    kill_daemon(directory)
    kvfs("up", *where, "--detach")
    assert kvfs("get", *where, "me/cache", "0a1b2c") == block
    assert (directory / "mnt/file").read_bytes() == block


def test_replay_verifies_and_counts_hits(directory: Path, tmp_path: Path) -> None:
    where = ("--dir", str(directory))
    kvfs("up", *where, "--size", "256M", "--detach")
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 0, "hash_ids": list(range(n))} for n in (10, 20, 20, 5)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = json.loads(kvfs("replay", *where, str(trace), "--block-bytes", "8K", "--json"))
    assert (report["references"], report["prefix_hits"], report["stored"]) == (55, 35, 20)
    assert report["wrong"] == report["refused"] == report["vanished"] == 0
    trace.write_text("not json\n")
    assert b"line 1" in kvfs("replay", *where, str(trace), code=1)


@pytest.mark.parametrize("native", ["true", "false"])
def test_ends_when_someone_else_unmounts(directory: Path, native: str) -> None:
    """With and without the node in the mount; what was written before is stored."""
    where = ("--dir", str(directory))
    environment = {**os.environ, "KVFS_FUSE_NATIVE": native}
    data = os.urandom(300_000)
    up = subprocess.Popen(
        [sys.executable, "-m", "kvfs", "up", *where, "--size", "128M"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
    )
    try:
        wait_for(lambda: service.is_mounted(directory / "mnt"), 30)
        file = directory / "mnt/file"
        file.write_bytes(data)
        kvfs("put", *where, "me/cache", "0a", "-", data=data)
        seen = directory / "mnt/.kvfs/blocks/me/cache/0a/0a"
        assert seen.read_bytes() == file.read_bytes() == data
        subprocess.run(["fusermount3", "-u", str(directory / "mnt")], check=True, timeout=20)
        _, said = up.communicate(timeout=30)
        assert up.returncode == 0, said
        assert b"Traceback" not in said
    finally:
        if up.poll() is None:
            up.kill()
        up.wait()
        assert up.stderr is not None
        up.stderr.close()
    assert b"no kvfs runs" in kvfs("status", *where, code=1)
    kvfs("up", *where, "--detach")
    assert file.read_bytes() == data
    assert seen.read_bytes() == data
