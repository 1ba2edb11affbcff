"""BlockStore's other forms: memory of the caller's own, ranges, scan, awaitable, submit and poll."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import select
import signal
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import trio
from node_process import Daemon

from kvfs_usrbio import MISS, BlockStore, ForkError, Operation
from waiting import freeze

pytestmark = pytest.mark.timeout(60)
MIB = 1 << 20
Run = Callable[[Callable[[], Awaitable[None]]], None]


@pytest.fixture
def store(daemon: Daemon) -> Iterator[BlockStore]:
    with BlockStore.open(daemon.directory) as opened:
        yield opened


class OnlyDlpack:
    """What a torch tensor on the CPU shows of itself: no buffer."""

    def __init__(self, array: Any, device: int = 1) -> None:
        self.array = array
        self.device = device

    def __dlpack__(self) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0


class OnlyInterface:
    def __init__(self, array: Any) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__


def fill(memory: Any) -> bytes:
    data = os.urandom(len(memory))
    memory[:] = data
    return data


def round_trip(store: BlockStore, name: bytes, source: Any, dest: Any, size: int) -> None:
    assert store.put([name], [source]) == [1]
    assert store.get([name], [dest]) == [size]


# -- registered memory


def test_shared_memory_of_the_callers_own_is_used_in_place(store: BlockStore) -> None:
    shm = shared_memory.SharedMemory(create=True, size=4 * MIB)
    memory = cast(memoryview, shm.buf)
    try:
        buffer = store.register(memory)
        assert buffer.shared
        data = fill(memory)
        keys = [b"%d" % i for i in range(16)]
        assert store.put_from(keys, buffer, 128 << 10) == [1] * 16
        assert store.get_into(keys, buffer, 128 << 10, offset=2 * MIB) == [128 << 10] * 16
        assert bytes(memory[2 * MIB :]) == data[: 2 * MIB]
        array = np.frombuffer(memory, dtype=np.uint8)  # another view of the same bytes, at an odd address
        assert store.get(keys[:1], [array[7 : 7 + 1000]]) == [1000]
        assert array[7:1007].tobytes() == data[:1000]
        with pytest.raises(ValueError, match="already"):
            store.register(memory)
        del array
        store.unregister(buffer)
        del buffer
        with pytest.raises(KeyError):
            store.unregister(store.alloc(4096))
        assert store.get(keys[:1], [memory[: 128 << 10]]) == [128 << 10]
    finally:
        memory.release()
        shm.close()
        shm.unlink()


def test_memfd_with_an_offset(store: BlockStore) -> None:
    fd = os.memfd_create("engine")
    os.ftruncate(fd, MIB)
    area = mmap.mmap(fd, MIB - 65536, offset=65536)
    os.close(fd)  # mmap has its own
    data = fill(area)
    part = np.frombuffer(area, dtype=np.uint8)[100:300_100]
    buffer = store.register(part)
    assert buffer.shared
    assert len(buffer) == 300_000
    assert store.put_from([b"a", b"b"], buffer, 150_000) == [1, 1]
    dest = bytearray(150_000)
    assert store.get([b"b"], [dest]) == [150_000]
    assert dest == data[150_100:300_100]
    with pytest.raises(ValueError, match="exceed"):
        store.get_into([b"a"], buffer, 300_001)


@pytest.mark.parametrize("kind", ["bytearray", "numpy", "private", "disk", "dlpack", "interface"])
def test_other_memory_is_copied(store: BlockStore, tmp_path: Path, kind: str) -> None:
    size = 70_000
    memory: Any
    if kind == "bytearray":
        memory = bytearray(size)
    elif kind == "private":
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    elif kind == "disk":
        with open(tmp_path / "file", "w+b") as file:
            file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
    else:
        memory = np.zeros(size, dtype=np.uint8)
    data = fill(memory) if kind in ("bytearray", "private", "disk") else os.urandom(size)
    if kind in ("numpy", "dlpack", "interface"):
        memory[:] = np.frombuffer(data, dtype=np.uint8)

    def wrap(array: Any) -> Any:
        return OnlyDlpack(array) if kind == "dlpack" else OnlyInterface(array) if kind == "interface" else array

    buffer = store.register(wrap(memory))
    assert not buffer.shared
    dest = np.zeros(size, dtype=np.uint8)
    round_trip(store, b"k", wrap(memory), wrap(dest) if kind != "disk" else dest, size)
    assert dest.tobytes() == data
    with pytest.raises(ValueError, match="not shared"):
        store.get_into([b"k"], buffer, 10)
    store.unregister(buffer)


def test_dlpack_over_shared_memory(store: BlockStore) -> None:
    shm = shared_memory.SharedMemory(create=True, size=MIB)
    memory: Any = shm.buf
    try:
        tensor = OnlyDlpack(np.frombuffer(memory, dtype=np.float16).reshape(2, -1))
        buffer = store.register(tensor)
        assert buffer.shared
        data = fill(memory)
        assert store.put([b"t"], [tensor]) == [1]
        dest = bytearray(MIB)
        assert store.get([b"t"], [dest]) == [MIB]
        assert dest == data
        store.unregister(buffer)
        del tensor, buffer
    finally:
        memory.release()
        shm.close()
        shm.unlink()


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda: b"read-only", BufferError),
        (lambda: np.zeros((8, 8), dtype=np.uint8)[:, :4], (BufferError, ValueError)),
        (lambda: OnlyDlpack(np.zeros((8, 8), dtype=np.uint8)[:, :4]), BufferError),
        (lambda: OnlyDlpack(np.zeros(8, dtype=np.uint8), device=2), BufferError),
        (lambda: OnlyInterface(np.zeros((8, 8), dtype=np.uint8)[:, :4]), BufferError),
        (lambda: "text", TypeError),
        (bytearray, ValueError),
    ],
)
def test_memory_that_cannot_be_used(store: BlockStore, bad: Callable[[], Any], error: Any) -> None:
    with pytest.raises(error):
        store.register(bad())


def test_the_daemon_survives_memory_that_is_made_shorter(store: BlockStore, daemon: Daemon) -> None:
    fd = os.memfd_create("engine")
    os.ftruncate(fd, 4 * MIB)
    buffer = store.register(mmap.mmap(fd, 4 * MIB))
    assert buffer.shared
    keys = [bytes([i]) * 8 for i in range(4)]
    source = store.alloc(4 * MIB)
    fill(source.view)
    assert store.put_from(keys, source, MIB) == [1] * 4
    os.ftruncate(fd, 0)
    assert set(store.get_into(keys, buffer, MIB)) <= {MIB, -errno.EFAULT, -errno.EIO}
    assert set(store.put_from([b"new"], buffer, MIB)) <= {1, -errno.EFAULT, -errno.EIO}
    assert store.get_into(keys, buffer, MIB) == [-errno.EFAULT] * 4
    dest = store.alloc(4 * MIB)
    assert store.get_into(keys, dest, MIB) == [MIB] * 4
    assert dest.view == source.view
    assert daemon.process.poll() is None
    store.unregister(buffer)


# -- ranges, packed keys, scan


def test_ranges(store: BlockStore) -> None:
    value = os.urandom(200_000)
    assert store.put([b"v"], [value]) == [1]
    starts = [0, 1, 65_535, 65_536, 199_999, 200_000, 1 << 40]
    dests = [bytearray(5000) for _ in starts]
    lengths = [max(0, min(5000, 200_000 - start)) for start in starts]
    assert store.get([b"v"] * 7, dests, starts) == lengths
    assert [bytes(d[:n]) for d, n in zip(dests, lengths, strict=True)] == [value[s : s + 5000] for s in starts]
    with pytest.raises(ValueError, match="1 offsets and 2 buffers"):
        store.get([b"v", b"v"], dests[:2], [0])


def test_keys_of_every_length(store: BlockStore) -> None:
    keys = [os.urandom(n) for n in range(1, 70)]
    buffer = store.alloc(len(keys) * 64)
    assert store.put_from(keys, buffer, 64) == [1] * 69
    assert store.exists([keys[40], b"no", keys[3]]) == [64, MISS, 64]
    assert store.get_into(keys[::-1], buffer, 64, length=10) == [10] * 69
    assert store.match_prefix([*keys[:33], b"no", *keys]) == 33
    assert store.match_prefix(keys) == 69
    many = [i.to_bytes(4, "big") for i in range(3000)]
    assert store.put_from(many, buffer, 0, length=4) == [1] * 3000
    for first in (0, 1, 63, 64, 255, 256, 700, 2999):
        assert store.match_prefix([*many[:first], b"missing", *many[first:]]) == first
    for wrong in ([b""], [b"a", b""], [b"", b"a", b"bc"]):
        with pytest.raises(ValueError, match=r"key \d is empty"):
            store.exists(wrong)


def test_scan(store: BlockStore) -> None:
    keys = {os.urandom(20) for _ in range(3000)}
    buffer = store.alloc(4096)
    store.put_from(list(keys), buffer, 0, length=100)
    store.put([b"l" * 50], [b"long"])
    entries = list(store.scan())
    assert {e.key for e in entries if not e.hashed} == keys
    assert {e.length for e in entries if not e.hashed} == {100}
    assert [(e.length, len(e.key)) for e in entries if e.hashed] == [(4, 32)]

    async def all_of_them() -> set[bytes]:
        return {e.key async for e in store.ascan()}

    assert asyncio.run(all_of_them()) == {e.key for e in entries}


# -- awaitable


def on_asyncio(main: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await main()

    asyncio.run(run())


def on_trio(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main)


@pytest.mark.parametrize("run", [on_asyncio, on_trio])
def test_awaitable(store: BlockStore, run: Run) -> None:
    async def main() -> None:
        keys = [b"%d" % i for i in range(100)]
        values = [os.urandom(50_000) for _ in keys]
        assert await store.aput(keys, values, durable=True) == [1] * 100
        assert await store.aexists([*keys, b"no"]) == [50_000] * 100 + [MISS]
        dests = [bytearray(50_000) for _ in keys]
        assert await store.aget(keys, dests) == [50_000] * 100
        assert dests == values
        buffer = store.alloc(100 * 50_000)
        assert await store.aget_into(keys, buffer, 50_000) == [50_000] * 100
        assert bytes(buffer.view) == b"".join(values)
        assert await store.aput_from([b"new"], buffer, 4096) == [1]
        assert await store.amatch_prefix([*keys, b"no", b"new"]) == 100
        assert await store.aevict([b"new", b"no"]) == [0, MISS]
        with pytest.raises(ValueError, match="1 keys and 2 buffers"):
            await store.aget([b"a"], dests[:2])

    for _ in range(2):  # a second event loop gets a queue of its own
        run(main)
        store.evict([b"%d" % i for i in range(100)])


def test_many_tasks_asyncio(store: BlockStore) -> None:
    buffer = store.alloc(64 << 12)
    store.put_from([b"%d" % i for i in range(64)], buffer, 4096)

    async def one(i: int) -> None:
        for _ in range(20):
            assert await store.aget([b"%d" % i], [bytearray(4096)]) == [4096]

    async def main() -> None:
        await asyncio.gather(*(one(i) for i in range(64)))

    asyncio.run(main())


def test_many_tasks_trio(store: BlockStore) -> None:
    buffer = store.alloc(64 << 12)
    store.put_from([b"%d" % i for i in range(64)], buffer, 4096)

    async def one(i: int) -> None:
        for _ in range(20):
            assert await store.aget_into([b"%d" % i], buffer, 4096, offset=i << 12) == [4096]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for i in range(64):
                nursery.start_soon(one, i)

    trio.run(main)


def test_cancelled_in_the_middle_ends_when_the_operation_has_trio(store: BlockStore) -> None:
    value = os.urandom(16 * MIB)
    dest = store.alloc(16 * MIB)
    store.put([b"v"], [value])

    async def main() -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.aget, [b"v"] * 4, [dest.view] * 4)
                await trio.lowlevel.checkpoint()
                scope.cancel()
        assert scope.cancelled_caught
        before = bytes(dest.view)
        await trio.sleep(0.05)
        assert bytes(dest.view) == before  # nothing writes any more
        assert await store.aexists([b"v"]) == [16 * MIB]

    trio.run(main)


def test_cancelled_in_the_middle_ends_when_the_operation_has_asyncio(store: BlockStore) -> None:
    dest = store.alloc(16 * MIB)
    store.put([b"v"], [os.urandom(16 * MIB)])

    async def main() -> None:
        task = asyncio.create_task(store.aget([b"v"] * 4, [dest.view] * 4))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        before = bytes(dest.view)
        await asyncio.sleep(0.05)
        assert bytes(dest.view) == before
        assert await store.aexists([b"v"]) == [16 * MIB]

    asyncio.run(main())


@pytest.mark.parametrize("run", [on_asyncio, on_trio])
def test_awaiting_a_daemon_that_dies(store: BlockStore, daemon: Daemon, run: Run) -> None:
    dest = store.alloc(16 * MIB)
    store.put([b"v"], [os.urandom(16 * MIB)])

    async def main() -> None:
        assert await store.aexists([b"v"]) == [16 * MIB]
        freeze(daemon.process.pid)
        threading_kill = daemon.process.kill
        if run is on_asyncio:
            asyncio.get_running_loop().call_later(0.2, threading_kill)
        else:

            async def later() -> None:
                await trio.sleep(0.2)
                threading_kill()

            trio.lowlevel.spawn_system_task(later)
        with pytest.raises(OSError, match="daemon is gone"):
            await store.aget([b"v"] * 8, [dest.view] * 8)

    run(main)


@pytest.mark.parametrize("run", [on_asyncio, on_trio])
def test_awaiting_a_daemon_that_hangs(daemon: Daemon, run: Run) -> None:
    with BlockStore.open(daemon.directory, timeout=0.3) as store:

        async def main() -> None:
            assert await store.aexists([b"v"]) == [MISS]
            freeze(daemon.process.pid)
            try:
                with pytest.raises(OSError, match="in time"):
                    await store.aexists([b"v"])
            finally:
                daemon.process.send_signal(signal.SIGCONT)
            assert await store.aexists([b"v"]) == [MISS]  # over a new queue

        run(main)


# -- submit and poll


def test_submit_and_poll(store: BlockStore) -> None:
    queue = store.queue()
    buffer = store.alloc(8 * MIB)
    data = fill(buffer.view)
    keys = [b"%d" % i for i in range(2048)]
    puts = [store.submit_put_from(queue, keys[i : i + 8], buffer, 4096, offset=i << 12) for i in range(0, 2048, 8)]
    more = [store.submit_put(queue, [b"staged%d" % i], [os.urandom(5 * MIB)]) for i in range(9)]
    assert queue.pending == 256 + 9
    ended: list[Operation] = []
    while queue.pending:
        if queue.arm():
            assert select.select([queue], [], [], 20)[0]
        ended += queue.poll()
    assert set(map(id, ended)) == set(map(id, puts + more))
    assert [put.result() for put in puts] == [[1] * 8] * 256
    assert [put.result() for put in more] == [[1]] * 9
    dest = bytearray(8 * MIB)
    read = store.submit_get(queue, keys, [memoryview(dest)[i << 12 : (i + 1) << 12] for i in range(2048)])
    with pytest.raises(BlockingIOError):
        read.result()
    assert queue.wait(20) == [read]
    assert read.result() == [4096] * 2048
    assert dest == data
    there = store.submit_exists(queue, [b"7", b"no"])
    gone = store.submit_evict(queue, [b"8", b"no"])
    while not (there.done and gone.done):
        queue.wait(20)
    assert (there.result(), gone.result()) == ([4096, MISS], [0, MISS])
    assert queue.wait(1) == []
    with pytest.raises(ValueError, match="empty"):
        store.submit_exists(queue, [b""])
    assert queue.pending == 0


def test_values_are_read_into_places_of_a_shared_buffer(store: BlockStore) -> None:
    queue = store.queue()
    source, dest = store.alloc(MIB), store.alloc(MIB)
    data = fill(source.view)
    keys = [b"%d" % i for i in range(64)]
    assert store.put_from(keys, source, 8192) == [1] * 64
    whole = store.submit_get_into(queue, keys, dest, 8192)
    assert queue.wait(20) == [whole]
    assert whole.result() == [8192] * 64
    assert bytes(dest.view[: 64 * 8192]) == data[: 64 * 8192]
    dest.view[:] = bytes(MIB)
    parts = store.submit_get_into(queue, [*keys, b"no"], dest, 10_000, offset=100, length=5000)
    assert queue.wait(20) == [parts]
    assert parts.result() == [5000] * 64 + [MISS]
    expected = bytearray(MIB)
    for i in range(64):
        at = 100 + i * 10_000
        expected[at : at + 5000] = data[i * 8192 : i * 8192 + 5000]
    assert dest.view == expected
    with pytest.raises(ValueError, match="exceed the buffer"):
        store.submit_get_into(queue, keys, dest, 8192, offset=MIB // 2 + 1)
    assert queue.pending == 0


def test_a_queue_says_when_it_is_full(store: BlockStore, daemon: Daemon) -> None:
    queue = store.queue()
    freeze(daemon.process.pid)
    try:
        for _ in range(4096):
            store.submit_exists(queue, [b"k"])
        with pytest.raises(BlockingIOError):
            store.submit_exists(queue, [b"k"])
        with pytest.raises(TimeoutError):
            queue.wait(0.05)
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    results: list[list[int]] = []
    while queue.pending:
        results += [op.result() for op in queue.wait(20)]
    assert results == [[MISS]] * 4096


def test_a_queue_after_the_daemons_death(store: BlockStore, daemon: Daemon) -> None:
    queue = store.queue()
    freeze(daemon.process.pid)
    one = store.submit_exists(queue, [b"k"])
    assert queue.arm()
    daemon.process.kill()
    assert select.select([queue], [], [], 20)[0]
    assert queue.poll() == [one]
    with pytest.raises(OSError, match="daemon is gone"):
        one.result()
    with pytest.raises(OSError, match="daemon is gone"):
        store.submit_exists(queue, [b"k"])


def test_forked(store: BlockStore) -> None:
    queue = store.queue()
    calls: list[Callable[[], Any]] = [
        lambda: store.get_into([b"k"], buffer, 10),
        lambda: store.match_prefix([b"k"]),
        lambda: store.submit_exists(queue, [b"k"]),
        queue.poll,
        lambda: asyncio.run(store.aexists([b"k"])),
        lambda: store.alloc(4096),
        lambda: store.register(bytearray(10)),
    ]
    buffer = store.alloc(4096)
    child = os.fork()
    if child == 0:
        wrong = 0
        for call in calls:
            try:
                call()
                wrong += 1
            except ForkError:
                pass
            except BaseException:
                wrong += 1
        os._exit(wrong)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.exists([b"k"]) == [MISS]
