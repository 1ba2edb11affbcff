"""LossyStore against a real kvfs that comes, goes and has little room: what an engine notices of that is a miss."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import kill_daemon, kvfs, running
from kvfs_usrbio.connectors.lossy import Keys, LossyStore
from kvfs_usrbio.connectors.values import Values
from waiting import wait_for

KEYS = Keys({"test": "lossy"})
SIZE = 1 << 20


@pytest.fixture
def place() -> Iterator[Path]:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse here")
    root = Path(tempfile.mkdtemp(prefix="kvfs-", dir="/var/tmp"))
    try:
        yield root / "kv"
    finally:
        shutil.rmtree(root)


def shared_memory(size: int) -> mmap.mmap:
    fd = os.memfd_create("kvfs-test")
    try:
        os.ftruncate(fd, size)
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


def test_nothing_is_found_until_there_is_a_kvfs(place: Path) -> None:
    store = LossyStore(place, "test/lossy")
    key = KEYS.of(b"a")
    memory = shared_memory(SIZE)
    assert not store.share(memory)
    assert not store.up
    assert store.put([key], [memory])[0] < 0
    assert store.exists([key])[0] < 0
    assert store.match_prefix([key]) == 0
    assert store.get([key], [memory])[0] < 0
    with running(place, "--size", "64M"):
        wait_for(lambda: store.up, 30)
        assert store.put([key], [memory]) == [1]
        assert store.exists([key]) == [SIZE]
    store.close()


def test_a_killed_kvfs_is_missed_and_found_again(place: Path) -> None:
    """With the engine's memory shared with the new one too."""
    memory = shared_memory(2 * SIZE)
    memory[:SIZE] = value = os.urandom(SIZE)
    with running(place, "--size", "64M"):
        store = LossyStore(place, "test/lossy")
        assert store.share(memory)
        keys = [KEYS.of(b"a", part) for part in range(2)]
        assert store.put(keys[:1], [memoryview(memory)[:SIZE]]) == [1]
        kill_daemon(place)
        assert store.get(keys[:1], [memoryview(memory)[SIZE:]])[0] < 0
        assert store.match_prefix(keys) == 0
        assert store.lost == 1
        kvfs("up", "--dir", place, "--detach")
        wait_for(lambda: store.up, 30)
        assert store.match_prefix(keys) == 1
        assert store.get(keys[:1], [memoryview(memory)[SIZE:]]) == [SIZE]
        assert memory[SIZE:] == value
        store.close()


def test_memory_beyond_what_a_client_may_share_is_copied(place: Path) -> None:
    with running(place, "--size", "64M", "--shared", "64M"):
        store = LossyStore(place, "test/lossy")
        small, large = shared_memory(SIZE), shared_memory(128 << 20)
        assert store.share(small)
        assert not store.share(large)
        large[:SIZE] = value = os.urandom(SIZE)
        assert store.put([KEYS.of(b"a")], [memoryview(large)[:SIZE]]) == [1]
        assert store.get([KEYS.of(b"a")], [memoryview(large)[-SIZE:]]) == [SIZE]
        assert large[-SIZE:] == value
        store.close()


def test_values_longer_than_a_block(place: Path) -> None:
    """Are there whole or not at all, and only with their own length."""
    with running(place, "--size", "128M"):
        store = LossyStore(place, "test/lossy")
        values = Values(store, KEYS)
        long, short = bytearray(os.urandom((32 << 20) + 5)), bytearray(os.urandom(100))
        assert values.put([b"long", b"short"], [memoryview(long), memoryview(short)]) == [True, True]
        assert values.exists([b"long", b"short", b"none"]) == [True, True, False]
        assert values.match_prefix([b"long", b"none", b"short"]) == 1
        into = [bytearray(len(long)), bytearray(100), bytearray(99)]
        assert values.get([b"long", b"short", b"short"], [memoryview(x) for x in into]) == [True, True, False]
        assert (into[0], into[1]) == (long, short)
        assert store.evict([KEYS.of(b"long", 1)]) == [0]
        assert values.get([b"long"], [memoryview(into[0])]) == [False]
        assert store.evict_all([KEYS])
        assert values.exists([b"long", b"short"]) == [False, False]
        store.close()


def test_a_kvfs_that_hangs_answers_no_question(place: Path) -> None:
    """Within the caller's patience; once it goes on it is used again."""
    with running(place, "--size", "64M"):
        store = LossyStore(place, "test/lossy", patience=0.5)
        key = KEYS.of(b"a")
        assert store.put([key], [b"value"]) == [1]
        pid = int(json.loads(kvfs("status", "--dir", place, "--json"))["pid"])
        os.kill(pid, signal.SIGSTOP)
        try:
            assert store.exists([key])[0] < 0
            assert store.match_prefix([key]) == 0
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: store.up, 30)
        assert store.exists([key]) == [5]
        store.close()


def test_anonymous_shared_memory(place: Path) -> None:
    """As SGLang's own allocator makes it: in place for a process that may open its own mappings."""
    if os.geteuid() != 0:
        pytest.skip("needs CAP_CHECKPOINT_RESTORE")
    with running(place, "--size", "64M"):
        store = LossyStore(place, "test/lossy")
        assert store.share(mmap.mmap(-1, SIZE))
        store.close()
