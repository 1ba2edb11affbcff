"""LossyStore against a real kvfs that comes, goes and has little room: what an engine notices of that is a miss."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from commands import kill_daemon, kvfs, running, stopped
from kvfs_usrbio import BlockStore
from kvfs_usrbio.connectors import lossy, workers
from kvfs_usrbio.connectors.lmcache_l2 import KvfsL2
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
        with stopped(place):
            begun = time.monotonic()
            assert store.exists([key])[0] < 0
            assert store.match_prefix([key]) == 0
            assert store.evict([key])[0] < 0
            assert time.monotonic() - begun < 5
        wait_for(lambda: store.up, 30)
        assert store.exists([key]) == [5]
        store.close()


def test_a_transfer_goes_on_with_the_kvfs_that_hung(place: Path) -> None:
    """Nobody may think it had ended while the daemon can still write to the engine's memory."""
    with running(place, "--size", "64M"):
        store = LossyStore(place, "test/lossy", patience=0.5)
        memory = shared_memory(SIZE)
        assert store.share(memory)
        value = os.urandom(SIZE)
        assert store.put([KEYS.of(b"a")], [value]) == [1]
        done: list[list[int]] = []
        thread = threading.Thread(target=lambda: done.append(store.get([KEYS.of(b"a")], [memory])), daemon=True)
        with stopped(place):
            thread.start()
            time.sleep(0.2)
            assert store.exists([KEYS.of(b"a")])[0] < 0
            assert store.lost == 1
            begun = time.monotonic()
            store.close()
            assert time.monotonic() - begun < 2
            thread.join(1)
            assert not done
        thread.join(30)
        assert done == [[SIZE]]
        assert memory[:] == value


def test_all_of_a_kind_goes_in_slices(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: one call has an upper bound."""
    monkeypatch.setattr(lossy, "SWEEP", 100)
    most = 0
    evict = BlockStore.evict

    def counted(self: BlockStore, keys: Sequence[bytes]) -> list[int]:
        nonlocal most
        most = max(most, len(keys))
        return evict(self, keys)

    monkeypatch.setattr(BlockStore, "evict", counted)
    with running(place, "--size", "64M"):
        store = LossyStore(place, "test/lossy")
        other = Keys({"test": "another"})
        keys = [KEYS.of(b"%d" % i) for i in range(1500)]
        assert store.put([*keys, other.of(b"a")], [b"value"] * 1501) == [1] * 1501
        assert store.evict_all([KEYS])
        assert store.match_prefix([other.of(b"a")]) == 1
        assert not any(found > 0 for found in store.exists(keys))
        assert most == 100
        store.close()


def test_lmcache_is_answered_while_transfers_hang(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lookups, and the end."""
    monkeypatch.setattr(workers, "CLOSE_S", 0.5)
    with running(place, "--size", "64M"):
        adapter = KvfsL2(str(place), "test/lossy", workers=2)

        def answers(wanted: int, seconds: float) -> dict[int, tuple[bool, list[bool]]]:
            found: dict[int, tuple[bool, list[bool]]] = {}
            until = time.monotonic() + seconds
            while len(found) < wanted and time.monotonic() < until:
                found.update({number: (ok, each) for number, ok, _, each in adapter.drain_completions()})
                time.sleep(0.01)
            return found

        value, into = bytearray(os.urandom(SIZE)), [bytearray(SIZE) for _ in range(4)]
        put = adapter.submit_batch_set(["a"], [memoryview(value)])
        assert answers(1, 30) == {put: (True, [True])}
        with stopped(place):
            for one in into:
                adapter.submit_batch_get(["a"], [memoryview(one)])
            asked = adapter.submit_batch_exists(["a"])
            assert answers(1, 5) == {asked: (True, [False])}
            begun = time.monotonic()
            adapter.close()
            assert time.monotonic() - begun < 5


def test_what_can_never_be_opened_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="names the namespace already"):
        LossyStore("kvfs://127.0.0.1:1/t/n", "t/n")
    with pytest.raises(ValueError, match="HOST:PORT"):
        LossyStore("kvfs://127.0.0.1/t/n")


def test_anonymous_shared_memory(place: Path) -> None:
    """As SGLang's own allocator makes it: in place for a process that may open its own mappings."""
    if os.geteuid() != 0:
        pytest.skip("needs CAP_CHECKPOINT_RESTORE")
    with running(place, "--size", "64M"):
        store = LossyStore(place, "test/lossy")
        assert store.share(mmap.mmap(-1, SIZE))
        store.close()
