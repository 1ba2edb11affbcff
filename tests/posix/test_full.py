"""A full store seen through the mount: what programs get, that nothing breaks, and that deletions make room."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mount_process import fails

from commands import kvfs, running

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
LARGE = 4 * MIB


def data_of(name: str, size: int) -> bytes:
    pattern = random.Random(name).randbytes(65_537)  # of no length that the store cuts data into
    return (pattern * (size // len(pattern) + 1))[:size]


def put(path: Path, size: int) -> bool:
    """Writes and syncs a new file; whether there was room."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            left = memoryview(data_of(path.name, size))
            while left:
                left = left[os.write(fd, left) :]
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        return False
    return True


def fill(root: Path) -> dict[str, int]:
    """Files of ever smaller sizes until there is no room for one byte; those that were written whole."""
    whole: dict[str, int] = {}
    for size in (LARGE, 256 << 10, 4096, 1):
        for i in range(10_000):
            name = f"{size}-{i}"
            if not put(root / name, size):
                (root / name).unlink()
                break
            whole[name] = size
        else:
            pytest.fail(f"10,000 files of {size} bytes, and still room")
    return whole


def check(root: Path, whole: dict[str, int]) -> None:
    for name, size in whole.items():
        assert (root / name).read_bytes() == data_of(name, size), name


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    with running(tmp_path / "kv", "--size", "128M") as place:
        yield place


def test_a_full_store(directory: Path) -> None:
    root = directory / "mnt"
    total = os.statvfs(root).f_blocks
    whole = fill(root)
    numbers = os.statvfs(root)
    assert numbers.f_bavail <= numbers.f_bfree <= total // 50
    assert sum(whole.values()) > total * numbers.f_frsize * 0.9
    check(root, whole)

    # No write goes in, not even in place or far behind the end; what was there stays.
    large = [name for name, size in whole.items() if size == LARGE]
    with (root / large[0]).open("r+b", buffering=0) as file:
        for off in (0, LARGE - 5, 1 << 40):
            with fails(errno.ENOSPC):
                os.pwrite(file.fileno(), b"x" * 1000, off)
                os.fsync(file.fileno())
        with mmap.mmap(file.fileno(), 0) as memory, fails(errno.ENOSPC):
            memory[5:6] = b"x"
            memory.flush()
        del whole[large[0]]  # the kernel's copy keeps the change, as on ext4
    check(root, whole)

    # What needs no room for data works, and so does every way to make room.
    (root / "d").mkdir()
    (root / "d/empty").touch()
    os.symlink("nowhere", root / "d/link")
    os.setxattr(root / "d/empty", b"user.k", b"v")
    os.truncate(root / "d/empty", 1 << 30)
    ways: list[Callable[[Path], object]] = [os.unlink, lambda path: os.truncate(path, 0), (root / "d/empty").rename]
    for way, name in zip(ways, large[1:], strict=False):
        way(root / name)
        del whole[name]
        assert put(root / f"instead-of-{name}", LARGE - MIB)
        whole[f"instead-of-{name}"] = LARGE - MIB
    check(root, whole)
    kvfs("down", "--dir", directory)
    assert kvfs("fsck", directory, "--data").endswith("clean\n")
    kvfs("up", "--dir", directory, "--detach")
    check(root, whole)
