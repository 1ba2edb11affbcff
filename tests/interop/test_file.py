"""File: descriptors of a real mount handed over to the daemon, read and written over the ring."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from running import Up

from kvfs_usrbio import BlockStore, File

pytestmark = pytest.mark.timeout(120)
RIGHTS = (-errno.EBADF, -errno.EACCES)


def test_ring_and_mount_see_each_others_writes(up: Up) -> None:
    data = os.urandom(300_000)
    fd = os.open(up.mount / "f", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with File.open(up.mount, fd) as file:
            assert file.read([0], [bytearray(10)]) == [0]
            assert file.write([0, 100_000], [data[:100_000], data[100_000:]]) == [100_000, 200_000]
            assert os.pread(fd, 400_000, 0) == data
            assert os.fstat(fd).st_size == 300_000
            for i in range(20):  # what the kernel has cached from the read before is not what it shows after
                mark = b"%06d" % i
                assert file.write([150_000], [mark]) == [6]
                assert os.pread(fd, 6, 150_000) == mark
                mark = b"%06d" % (i + 500_000)
                assert os.pwrite(fd, mark, 150_003) == 6
                dest = bytearray(6)
                assert file.read([150_003], [dest]) == [6]
                assert dest == mark
            assert file.write([1_000_000], [b"end"]) == [3]
            hole = bytearray(b"x" * 10)
            assert file.read([999_990], [hole]) == [10]
            assert hole == bytes(10)
            file.sync()
            os.fsync(fd)
    finally:
        os.close(fd)
    assert (up.mount / "f").stat().st_size == 1_000_003


def test_in_place_and_awaitable(up: Up) -> None:
    path = up.mount / "f"
    path.write_bytes(os.urandom(4 << 20))
    with BlockStore.open(up.mount) as store, open(path, "r+b") as opened:
        buffer = store.alloc(8 << 20)
        with store.file(opened.fileno()) as file:
            at = list(range(0, 4 << 20, 256 << 10))
            assert file.read(at, [buffer[i : i + (256 << 10)] for i in at]) == [256 << 10] * 16
            assert bytes(buffer[: 4 << 20]) == path.read_bytes()
            array = np.frombuffer(buffer.view, dtype=np.uint8)
            array[: 1 << 20] = 7

            async def main() -> None:
                assert await file.awrite([3], [array[: 1 << 20]], durable=True) == [1 << 20]
                assert await file.aread([0], [array[4 << 20 :]]) == [4 << 20]

            asyncio.run(main())
            assert array[(4 << 20) + 3 : (5 << 20) + 3].tobytes() == bytes([7]) * (1 << 20)
            assert path.read_bytes()[3 : 3 + (1 << 20)] == bytes([7]) * (1 << 20)
        with pytest.raises(ValueError, match="closed"):
            file.read([0], [bytearray(1)])


def test_the_descriptors_rights_are_the_files(up: Up) -> None:
    path = up.mount / "f"
    path.write_bytes(b"content")
    with BlockStore.open(up.mount) as store:
        fd = os.open(path, os.O_RDONLY)
        reader = store.file(fd)
        os.close(fd)
        dest = bytearray(7)
        assert reader.write([0], [b"changed"])[0] in RIGHTS
        assert reader.read([0], [dest]) == [7]
        assert dest == b"content"
        fd = os.open(path, os.O_WRONLY)
        writer = store.file(fd)
        os.close(fd)
        assert writer.read([0], [dest])[0] in RIGHTS
        assert writer.write([0], [b"CON"]) == [3]
        assert path.read_bytes() == b"CONtent"


def test_what_is_no_open_file_of_the_mount_is_refused(up: Up, tmp_path: Path) -> None:
    (up.mount / "f").write_bytes(b"x")
    foreign = tmp_path / "f"
    foreign.write_bytes(b"x")
    with BlockStore.open(up.mount) as store:
        for path, flags, wanted in (
            (up.mount / "f", os.O_PATH, errno.EBADF),
            (foreign, os.O_RDWR, errno.EXDEV),
            (up.mount, os.O_RDONLY | os.O_DIRECTORY, errno.EINVAL),
        ):
            fd = os.open(path, flags)
            try:
                with pytest.raises(OSError, match="register descriptor") as refused:
                    store.file(fd)
                assert refused.value.errno == wanted
            finally:
                os.close(fd)
        with pytest.raises(OSError, match="register descriptor"):
            store.file(999_999)


def test_a_removed_file_can_be_used_as_long_as_it_is_open(up: Up) -> None:
    fd = os.open(up.mount / "f", os.O_RDWR | os.O_CREAT, 0o644)
    with File.open(up.directory, fd) as file:
        os.unlink(up.mount / "f")
        assert file.write([0], [b"still here"]) == [10]
        assert os.pread(fd, 100, 0) == b"still here"
        os.close(fd)
        dest = bytearray(10)
        assert file.read([0], [dest]) == [10]
        assert dest == b"still here"
