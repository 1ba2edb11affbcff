"""O_DIRECT on the mount: every offset, length and address is allowed, and it sees and shows what cached I/O does."""

from __future__ import annotations

import mmap
import os
import random

import pytest
from mount_process import Mounted

pytestmark = pytest.mark.timeout(60)

SIZE = 3 << 20
PAGE = 4096


def test_any_alignment(mounted: Mounted) -> None:
    path = mounted.root / "f"
    data = random.Random(1).randbytes(300_001)
    path.write_bytes(data)
    memory = mmap.mmap(-1, 1 << 19)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        for off, length, address in ((0, PAGE, 0), (1, PAGE, 0), (0, 4097, 0), (0, PAGE, 1), (299_999, PAGE, 3)):
            there = memoryview(memory)[address : address + length]
            assert os.preadv(fd, [there], off) == min(length, len(data) - off)
            assert there[: len(data) - off] == data[off : off + length]
            new = os.urandom(length)
            there[:] = new
            assert os.pwritev(fd, [there], off) == length
            data = data[:off] + new + data[off + length :]
            there.release()
        assert os.pread(fd, 10, len(data)) == b""
        assert path.read_bytes() == data
    finally:
        os.close(fd)


def test_direct_and_cached_see_the_same(mounted: Mounted) -> None:
    """Random reads and writes of both kinds, truncations and a mapping that reads, against a bytearray."""
    path = mounted.root / "f"
    path.write_bytes(bytes(SIZE))
    rng = random.Random(4)
    model = bytearray(SIZE)
    memory = mmap.mmap(-1, 1 << 19)
    direct, cached = os.open(path, os.O_RDWR | os.O_DIRECT), os.open(path, os.O_RDWR)
    mapped = mmap.mmap(cached, SIZE, prot=mmap.PROT_READ)
    try:
        for step in range(600):
            fd = rng.choice((direct, cached))
            off = rng.randrange(SIZE - 1)
            length = min(rng.choice((1, 511, 512, PAGE, rng.randrange(1, 400_000))), SIZE - off)
            if rng.random() < 0.4:
                off -= off % PAGE
            address = rng.choice((0, 0, 1, 512))
            there = memoryview(memory)[address : address + length]
            action = rng.random()
            if action < 0.45:
                there[:] = rng.randbytes(length)
                assert os.pwritev(fd, [there], off) == length, step
                model[off : off + length] = there
            elif action < 0.9:
                assert os.preadv(fd, [there], off) == length, step
                assert there == model[off : off + length], (step, fd == direct, off, length)
            elif action < 0.95:
                assert mapped[off : off + length] == model[off : off + length], (step, off, length)
            else:
                os.ftruncate(fd, off)
                os.ftruncate(fd, SIZE)
                model[off:] = bytes(SIZE - off)
            there.release()
        assert path.read_bytes() == model
    finally:
        mapped.close()
        os.close(direct)
        os.close(cached)
