"""One file through the mount and through a ring of another process: what one has written the other reads."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_process import Mounted

from kvfs_usrbio._native import ffi, lib

pytestmark = pytest.mark.timeout(60)

ROOM = 1 << 20
WAIT_NS = 20_000_000_000


class RingClient:
    """One ring with one area, one operation at a time."""

    def __init__(self, socket: Path) -> None:
        client = ffi.new("kvfs_client**")
        assert lib.kvfs_open(os.fsencode(socket), client) == 0
        self.client = client[0]
        ring = ffi.new("kvfs_ring**")
        assert lib.kvfs_ring_create(self.client, 8, ring) == 0
        self.ring = ring[0]
        self.iov = ffi.new("struct kvfs_iov*")
        assert lib.kvfs_iov_alloc(self.client, ROOM, 0, self.iov) == 0
        self.memory = ffi.buffer(self.iov.base, ROOM)

    def register(self, fd: int) -> int:
        handle: int = lib.kvfs_file_register(self.client, fd)
        assert handle >= 0, os.strerror(-handle)
        return handle

    def call(self, opcode: int, handle: int, off: int = 0, size: int = 0) -> int:
        sqe = lib.kvfs_prep(self.ring)
        sqe.opcode, sqe.handle, sqe.iov, sqe.off, sqe.len = opcode, handle, self.iov.id, off, size
        assert lib.kvfs_submit(self.ring) == 1
        cqe = ffi.new("struct kvfs_cqe*")
        assert lib.kvfs_wait(self.ring, cqe, 1, 1, WAIT_NS) == 1
        return cqe.result

    def write(self, handle: int, off: int, data: bytes) -> None:
        self.memory[: len(data)] = data
        assert self.call(lib.KVFS_OP_WRITE, handle, off, len(data)) == len(data)

    def read(self, handle: int, off: int, size: int) -> bytes:
        n = self.call(lib.KVFS_OP_READ, handle, off, size)
        assert n >= 0, os.strerror(-n)
        return bytes(self.memory[:n])

    def fsync(self, handle: int) -> int:
        return self.call(lib.KVFS_OP_FSYNC, handle)

    def close(self) -> None:
        if self.client != ffi.NULL:
            lib.kvfs_close(self.client)
            self.client = ffi.NULL


@pytest.fixture
def ring(mounted: Mounted) -> Iterator[RingClient]:
    client = RingClient(mounted.data / "sock")
    yield client
    client.close()


def test_random_operations_of_both_match_a_model(mounted: Mounted, ring: RingClient) -> None:
    rng = random.Random(11)
    model = bytearray()
    with (mounted.root / "f").open("w+b", buffering=0) as file:
        fd = file.fileno()
        handle = ring.register(fd)
        for step in range(600):
            off = rng.randrange(0, 300_000)
            size = rng.choice([1, 100, 4096, 70_001])
            match rng.randrange(7):
                case 0 | 1:
                    data = rng.randbytes(size)
                    if step % 2:
                        ring.write(handle, off, data)
                    else:
                        assert os.pwrite(fd, data, off) == size
                    model = model.ljust(off, b"\0")
                    model[off : off + size] = data
                case 2 | 3:
                    assert os.pread(fd, size, off) == model[off : off + size], step
                case 4:
                    assert ring.read(handle, off, size) == model[off : off + size], step
                case 5:
                    assert os.fstat(fd).st_size == len(model), step
                case _:
                    if step % 5 == 0:
                        os.ftruncate(fd, off)
                        model = model[:off].ljust(off, b"\0")
    assert (mounted.root / "f").read_bytes() == model


def test_mapped_pages_show_what_the_ring_wrote(mounted: Mounted, ring: RingClient) -> None:
    path = mounted.root / "f"
    path.write_bytes(bytes(300_000))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        handle = ring.register(file.fileno())
        for i in range(100):
            assert memory[4096 * (i % 70)] == (0 if i < 70 else i - 69)
            ring.write(handle, 4096 * (i % 70), bytes([i + 1]))
            assert memory[4096 * (i % 70)] == i + 1


def test_readers_beside_a_ring_writer_see_only_what_is_new(mounted: Mounted, ring: RingClient) -> None:
    """Each page holds a counter; a reader that starts after a write has completed sees it or a later one."""
    path = mounted.root / "f"
    path.write_bytes(bytes(64 << 10))
    done = [0] * 16
    stop = threading.Event()
    wrong: list[tuple[int, int, int]] = []

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            rng = random.Random(3)
            while not stop.is_set():
                page = rng.randrange(16)
                least = done[page]
                seen = int.from_bytes(os.pread(file.fileno(), 8, page * 4096), "little")
                if seen < least:
                    wrong.append((page, least, seen))

    with path.open("r+b") as file:
        handle = ring.register(file.fileno())
        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        try:
            for i in range(1, 800):
                ring.write(handle, (i % 16) * 4096, i.to_bytes(8, "little") * 512)
                done[i % 16] = i
        finally:
            stop.set()
            for reader in readers:
                reader.join()
    assert not wrong


def test_stat_shows_growth_and_time_at_once(mounted: Mounted, ring: RingClient) -> None:
    path = mounted.root / "f"
    path.touch()
    os.utime(path, ns=(1, 1))
    with path.open("r+b") as file:
        handle = ring.register(file.fileno())
        for i in range(1, 30):
            assert path.stat().st_size == (i - 1) * 1000
            ring.write(handle, (i - 1) * 1000, b"x" * 1000)
            now = path.stat()
            assert now.st_size == i * 1000
            assert now.st_mtime > 1


def test_ring_fsync_makes_the_size_durable(mounted: Mounted, ring: RingClient) -> None:
    path = mounted.root / "f"
    data = os.urandom(200_000)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    handle = ring.register(fd)
    ring.write(handle, 0, data)
    assert ring.fsync(handle) == 0
    mounted.kill()
    ring.close()
    with contextlib.suppress(OSError):
        os.close(fd)
    mounted.start()
    assert path.read_bytes() == data


def test_a_file_that_only_the_ring_holds(mounted: Mounted, ring: RingClient) -> None:
    """Closed in the mount, then grown; unlinked, then let go: its data goes with the last handle."""
    path = mounted.root / "f"
    with path.open("w+b") as file:
        handle = ring.register(file.fileno())
    ring.write(handle, 0, b"x" * 500_000)
    assert path.stat().st_size == 500_000
    assert path.read_bytes() == b"x" * 500_000
    ring.write(handle, 250_000, b"y" * 500_000)
    assert path.read_bytes() == b"x" * 250_000 + b"y" * 500_000
    free = os.statvfs(mounted.root).f_bfree
    path.unlink()
    assert ring.read(handle, 249_999, 2) == b"xy"
    ring.close()
    until = time.monotonic() + 10
    while os.statvfs(mounted.root).f_bfree <= free + 100 and time.monotonic() < until:
        time.sleep(0.05)
    assert os.statvfs(mounted.root).f_bfree > free + 100
    assert mounted.stop() == 0


def test_size_of_a_file_that_only_the_ring_holds_is_kept(mounted: Mounted, ring: RingClient) -> None:
    path = mounted.root / "f"
    with path.open("w+b") as file:
        handle = ring.register(file.fileno())
    time.sleep(1.5)
    ring.write(handle, 0, b"z" * 300_000)
    ring.close()
    assert mounted.stop() == 0
    mounted.start()
    assert path.read_bytes() == b"z" * 300_000


def test_info_says_where_the_node_is(mounted: Mounted) -> None:
    path = mounted.root / ".kvfs" / "info"
    info = json.loads(path.read_bytes())
    assert info == {"socket": str(mounted.data / "sock"), "directory": str(mounted.data), "format": 1}
    assert path.stat().st_size == len(path.read_bytes())
    assert sorted(os.listdir(path.parent)) == ["blocks", "info"]
    with pytest.raises(PermissionError):
        path.open("r+b")
    with pytest.raises(OSError, match="Errno") as raised:
        path.unlink()
    assert raised.value.errno == errno.EPERM
