"""BlockStore against a node in another process, over a real store in a temporary file."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
import time

import numpy as np
import pytest
from node_process import Daemon, end, python

pytest.importorskip("kvfs._node", reason="the native modules are not built")
pytest.importorskip("kvfs_usrbio._native", reason="the native modules are not built")

from kvfs_usrbio import MISS, BlockStore, ForkError

pytestmark = pytest.mark.timeout(60)

CLIENT = """
import sys, time
from kvfs_usrbio import BlockStore

store = BlockStore.open(sys.argv[1])
value = bytes(range(256)) * 4096
buffer = store.alloc(len(value))
buffer.view[:] = value
i = 0
while True:
    store.put([b"%d-%d" % (i, k) for k in range(8)], [buffer.view] * 8)
    store.evict([b"%d-%d" % (i, k) for k in range(8)])
    i += 1
    if i == 3:
        print("busy", flush=True)
"""


def test_round_trip(daemon: Daemon) -> None:
    with BlockStore.open(daemon.directory) as store:
        values = [os.urandom(size) for size in (1, 4095, 4096, 70_001, 3 << 20)]
        keys = [b"k%d" % i for i in range(len(values))]
        assert store.exists(keys) == [MISS] * 5
        assert store.put(keys, values) == [1] * 5
        assert store.put(keys, values) == [0] * 5
        assert store.put(keys[:1], [b"other length"]) == [-errno.EEXIST]
        assert store.exists([*keys, b"no"]) == [*map(len, values), MISS]
        dests = [bytearray(len(value) + 5) for value in values]
        assert store.get([*keys, b"no"], [*dests, bytearray(9)]) == [*map(len, values), MISS]
        assert [bytes(d[:-5]) for d in dests] == values
        assert all(d[-5:] == bytes(5) for d in dests)
        assert store.evict([keys[1], b"no"]) == [0, MISS]
        assert store.match_prefix(keys) == 1
        assert store.match_prefix([]) == 0
        short = bytearray(10)
        assert store.get([keys[4]], [short]) == [10]
        assert short == values[4][:10]


def test_shared_memory_without_a_copy(daemon: Daemon) -> None:
    store = BlockStore.open(daemon.directory)
    buffer = store.alloc(8 << 20)
    array = np.frombuffer(buffer.view, dtype=np.float32)
    array[:] = np.random.default_rng(1).random(len(array), dtype=np.float32)
    parts = [buffer[i << 20 : (i + 1) << 20] for i in range(4)]
    keys = [bytes([i]) * 16 for i in range(4)]
    assert store.put(keys, parts, durable=True) == [1] * 4
    dests = np.frombuffer(buffer.view, dtype=np.uint8).reshape(8, 1 << 20)[4:]
    assert store.get(keys, list(dests)) == [1 << 20] * 4
    assert bytes(buffer[: 4 << 20]) == bytes(buffer[4 << 20 :])
    store.close()
    del buffer, parts, store
    assert array[0] == array[1 << 20]  # the memory outlives the store


def test_many_in_one_batch(daemon: Daemon) -> None:
    """More keys than ring entries, more bytes than staging."""
    with BlockStore.open(daemon.directory, ring_entries=8) as store:
        keys = [i.to_bytes(4, "big") for i in range(500)]
        values = [os.urandom(100_000) for _ in keys]
        assert store.put(keys, values) == [1] * 500
        dests = [bytearray(100_000) for _ in keys]
        assert store.get(keys, dests) == [100_000] * 500
        assert dests == values
        assert store.match_prefix([*keys[:300], b"no", *keys[300:]]) == 300


def test_limits(daemon: Daemon) -> None:
    with BlockStore.open(daemon.directory) as store:
        assert store.put([b"e", b"big"], [b"", bytes((16 << 20) + 1)]) == [-errno.EINVAL] * 2
        biggest = os.urandom(16 << 20)
        assert store.put([b"16"], [biggest]) == [1]
        dest = bytearray(17 << 20)
        assert store.get([b"16"], [dest]) == [16 << 20]
        assert dest[: 16 << 20] == biggest
        with pytest.raises(ValueError, match="empty"):
            store.exists([b""])
        with pytest.raises(ValueError, match="2 keys and 1 buffers"):
            store.put([b"a", b"b"], [b"x"])
        with pytest.raises((BufferError, TypeError)):
            store.get([b"16"], [b"read-only"])
    with pytest.raises(ValueError, match="closed"):
        store.exists([b"a"])


def test_namespaces(daemon: Daemon) -> None:
    socket = daemon.directory / "kvfs.sock"
    with BlockStore.open(socket) as a, BlockStore.open(f"kvfs://{socket}", "acme/llama") as b:
        assert a.put([b"k"], [b"a"]) == [1]
        assert b.exists([b"k"]) == [MISS]
    with BlockStore.open(socket, "default/asked") as asked, BlockStore.open(socket, read_only=True) as reader:
        assert asked.put([b"k"], [b"asked"]) == [1]
        assert reader.exists([b"k"]) == [1]
        assert reader.put([b"l"], [b"x"]) == [-errno.EACCES]
    with pytest.raises(OSError, match="default/unknown") as e:
        BlockStore.open(socket, "unknown")
    assert e.value.errno == errno.ENOENT
    with pytest.raises(OSError, match="no kvfs at"):
        BlockStore.open(daemon.directory / "nothing")
    with pytest.raises(ValueError, match="is not kvfs://HOST:PORT"):
        BlockStore.open("kvfs://elsewhere/x")


def test_long_keys(daemon: Daemon) -> None:
    with BlockStore.open(daemon.directory) as store:
        keys = [b"x" * 32, b"x" * 33, b"x" * 1000]
        assert store.put(keys, [b"1", b"22", b"333"]) == [1, 1, 1]
        assert store.exists(keys) == [1, 2, 3]


def test_threads(daemon: Daemon) -> None:
    wrong: list[int] = []
    with BlockStore.open(daemon.directory) as store:

        def one(number: int) -> None:
            for i in range(20):
                value = os.urandom(50_000)
                dest = bytearray(50_000)
                key = b"%d-%d" % (number, i)
                if store.put([key], [value]) != [1] or store.get([key], [dest]) != [50_000] or bytes(dest) != value:
                    wrong.append(number)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_fork(daemon: Daemon) -> None:
    with BlockStore.open(daemon.directory) as store:
        store.put([b"k"], [b"v"])
        child = os.fork()
        if child == 0:
            try:
                store.exists([b"k"])
            except ForkError:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert store.exists([b"k"]) == [1]


def test_killed_client_leaves_the_daemon_well(daemon: Daemon) -> None:
    for _ in range(3):
        client = python(CLIENT, daemon.directory)
        client.send_signal(signal.SIGKILL)
        assert end(client) == -signal.SIGKILL
    with BlockStore.open(daemon.directory) as store:
        assert store.put([b"after"], [b"x"]) == [1]
        assert store.exists([b"after"]) == [1]
    assert end(daemon.process) == 0


def test_killed_daemon_is_an_error_in_bounded_time(daemon: Daemon) -> None:
    with BlockStore.open(daemon.directory) as store:
        buffer = store.alloc(1 << 20)
        store.put([b"k"], [buffer.view])
        killer = threading.Timer(0.3, daemon.process.kill)
        killer.start()
        start = time.monotonic()

        def until_error() -> None:
            while time.monotonic() < start + 20:
                store.get([b"k"] * 16, [buffer.view] * 16)

        with pytest.raises(OSError, match="daemon is gone") as e:
            until_error()
        assert e.value.errno == errno.EREMOTEIO
        assert time.monotonic() - start < 3
        with pytest.raises(OSError, match=r"\w"):
            store.exists([b"k"])


def test_a_daemon_that_hangs_can_be_given_up(daemon: Daemon) -> None:
    """Nothing waits for it then, and what was shared with it stays readable."""
    store = BlockStore.open(daemon.directory, lanes=3, timeout=None)
    buffer = store.alloc(1 << 20)
    buffer.view[:] = b"x" * len(buffer)
    queue = store.queue()
    assert store.alive
    errors: list[OSError] = []

    def ask(store: BlockStore) -> None:
        try:
            store.exists([b"k"])
        except OSError as error:
            errors.append(error)

    daemon.process.send_signal(signal.SIGSTOP)
    os.waitpid(daemon.process.pid, os.WUNTRACED)  # until it has
    try:
        threads = [threading.Thread(target=ask, args=(store,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        waiting = store.submit_exists(queue, [b"k"])
        time.sleep(0.1)
        begun = time.monotonic()
        store.abandon()
        for thread in threads:
            thread.join(20)
        assert [error.errno for error in errors] == [errno.EREMOTEIO] * 3
        queue.wait(20)
        with pytest.raises(OSError, match="daemon is gone"):
            waiting.result()
        assert not store.alive
        with pytest.raises(OSError, match="daemon is gone"):
            store.alloc(4096)
        store.close()
        del queue, waiting, threads
        assert bytes(buffer.view[:3]) == b"xxx"
        del buffer, store
        gc.collect()
        assert time.monotonic() - begun < 5
    finally:
        daemon.process.send_signal(signal.SIGCONT)


def test_garbage_in_a_cycle_is_freed_in_any_order(daemon: Daemon) -> None:
    for _ in range(50):
        store = BlockStore.open(daemon.directory)
        buffers = [store.alloc(4096) for _ in range(3)]
        store.put([b"k"], [buffers[0].view])
        cycle: list[object] = [store, *buffers]
        cycle.append(cycle)
        del store, buffers, cycle
        gc.collect()
    with BlockStore.open(daemon.directory) as store:
        assert store.exists([b"k"]) == [4096]
