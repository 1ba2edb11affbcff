"""The mount through the kernel: POSIX behaviour of the tree, and what survives a stop and a kill."""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import time
from pathlib import Path

import pytest
import trio
from mount_process import Mounted, fails

from kvfs.dataplane import DataPlane
from kvfs.mount import service
from kvfs.node import Node, NodeConfig

pytestmark = pytest.mark.timeout(60)


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("size", [0, 1, 511, 4096, 4097, 131_072, 1_048_577, 5_000_003])
def test_reads_back_what_was_written(mounted: Mounted, size: int) -> None:
    path = mounted.root / "f"
    data = content(size)
    path.write_bytes(data)
    assert path.stat().st_size == size
    assert path.read_bytes() == data


def test_random_writes_and_truncations_match_a_model(mounted: Mounted) -> None:
    rng = random.Random(7)
    model = bytearray()
    with (mounted.root / "f").open("w+b", buffering=0) as file:
        for step in range(150):
            off = rng.randrange(0, 600_000)
            if rng.random() < 0.2:
                file.truncate(off)
                model = model[:off].ljust(off, b"\0")
            else:
                data = rng.randbytes(rng.choice([1, 100, 4096, 70_001]))
                assert os.pwrite(file.fileno(), data, off) == len(data)
                model = model.ljust(off, b"\0")
                model[off : off + len(data)] = data
            assert os.fstat(file.fileno()).st_size == len(model), step
    assert (mounted.root / "f").read_bytes() == model


@pytest.mark.parametrize("size", [10, 5_000_003])
def test_opening_with_o_trunc_empties_the_file(mounted: Mounted, size: int) -> None:
    path = mounted.root / "f"
    path.write_bytes(content(size))
    with path.open("rb") as other:
        before = path.stat()
        os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
        after = path.stat()
        assert (after.st_size, after.st_blocks, other.read()) == (0, 0, b"")
        assert after.st_mtime_ns > before.st_mtime_ns
        assert after.st_ctime_ns > before.st_ctime_ns
        path.write_bytes(b"short")
        other.seek(0)
        assert other.read() == b"short"
    path.write_bytes(b"")
    os.truncate(path, size)
    assert path.read_bytes() == bytes(size)  # nothing of what was there comes back


def test_sparse_file_reads_zeros(mounted: Mounted) -> None:
    path = mounted.root / "f"
    with path.open("wb") as file:
        file.seek(3_000_001)
        file.write(b"end")
    assert path.read_bytes() == bytes(3_000_001) + b"end"
    os.truncate(path, 10)
    os.truncate(path, 3_000_001)
    assert path.read_bytes() == bytes(3_000_001)


def test_append(mounted: Mounted) -> None:
    path = mounted.root / "f"
    path.write_bytes(b"1")
    with path.open("ab", buffering=0) as one, path.open("ab", buffering=0) as two:
        for i in range(50):
            (one, two)[i % 2].write(b"%d," % i)
    assert path.read_bytes() == b"1" + b"".join(b"%d," % i for i in range(50))


def test_mmap_shared(mounted: Mounted) -> None:
    path = mounted.root / "f"
    path.write_bytes(content(100_000))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        assert memory[:] == content(100_000)
        memory[70_000:70_005] = b"hello"
        memory.flush()
    expected = bytearray(content(100_000))
    expected[70_000:70_005] = b"hello"
    assert path.read_bytes() == expected


def test_unlinked_file_stays_readable(mounted: Mounted) -> None:
    path = mounted.root / "f"
    with path.open("w+b", buffering=0) as file:
        file.write(b"before")
        path.unlink()
        assert not path.exists()
        file.write(b" after")
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.pread(file.fileno(), 100, 0) == b"before after"
    assert os.listdir(mounted.root) == []


def test_rename_over_open_file(mounted: Mounted) -> None:
    (mounted.root / "a").write_bytes(b"new")
    (mounted.root / "b").write_bytes(b"old")
    with (mounted.root / "b").open("rb") as old:
        os.rename(mounted.root / "a", mounted.root / "b")
        assert (mounted.root / "b").read_bytes() == b"new"
        assert old.read() == b"old"
    assert os.listdir(mounted.root) == ["b"]


def test_directories(mounted: Mounted) -> None:
    top = mounted.root / "d"
    top.mkdir(0o750)
    assert stat.S_IMODE(top.stat().st_mode) == 0o750
    names = {f"file-{i:04}" for i in range(600)}
    for name in names:
        (top / name).touch()
    assert set(os.listdir(top)) == names
    assert top.stat().st_nlink == 2
    with fails(errno.ENOTEMPTY):
        top.rmdir()
    for name in names:
        (top / name).unlink()
    top.rmdir()
    with fails(errno.ENOENT):
        top.stat()


def test_links(mounted: Mounted) -> None:
    path = mounted.root / "f"
    path.write_bytes(b"x")
    os.link(path, mounted.root / "hard")
    os.symlink("f", mounted.root / "soft")
    assert path.stat().st_nlink == 2
    assert (mounted.root / "hard").stat().st_ino == path.stat().st_ino
    assert os.readlink(mounted.root / "soft") == "f"
    path.unlink()
    assert (mounted.root / "hard").read_bytes() == b"x"
    assert (mounted.root / "hard").stat().st_nlink == 1
    with fails(errno.ENOENT):
        (mounted.root / "soft").read_bytes()


def test_attributes(mounted: Mounted) -> None:
    path = mounted.root / "f"
    with path.open("wb", buffering=0) as file:
        file.write(b"12345")
        os.utime(path, ns=(1_000_000_001, 2_000_000_002))
        os.chmod(path, 0o640)
    time.sleep(1.2)
    now = path.stat()
    assert (now.st_atime_ns, now.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    assert stat.S_IMODE(now.st_mode) == 0o640
    path.write_bytes(b"again")
    assert abs(path.stat().st_mtime - time.time()) < 5


def test_xattrs(mounted: Mounted) -> None:
    path = mounted.root / "f"
    path.touch()
    os.setxattr(path, "user.a", b"1")
    with fails(errno.EEXIST):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    with fails(errno.ENODATA):
        os.setxattr(path, "user.b", b"2", os.XATTR_REPLACE)
    os.setxattr(path, "user.b", b"")
    assert os.getxattr(path, "user.a") == b"1"
    assert sorted(os.listxattr(path)) == ["user.a", "user.b"]
    os.removexattr(path, "user.a")
    with fails(errno.ENODATA):
        os.getxattr(path, "user.a")


def test_statfs(mounted: Mounted) -> None:
    before = os.statvfs(mounted.root)
    assert 64 << 20 < before.f_blocks * before.f_frsize <= 256 << 20
    assert 0 < before.f_bavail <= before.f_blocks
    assert before.f_namemax == 255


def test_stop_and_start_keep_everything(mounted: Mounted) -> None:
    (mounted.root / "d").mkdir()
    (mounted.root / "d" / "f").write_bytes(content(3_000_000))
    os.symlink("d/f", mounted.root / "s")
    assert mounted.stop() == 0, mounted.log.read_text()
    assert not service.is_mounted(mounted.root)
    mounted.start()
    assert (mounted.root / "s").read_bytes() == content(3_000_000)


def test_fsynced_file_survives_a_kill(mounted: Mounted) -> None:
    kept = os.open(mounted.root / "f", os.O_RDWR | os.O_CREAT)
    os.write(kept, content(1_500_001))
    os.fsync(kept)
    gone = os.open(mounted.root / "gone", os.O_RDWR | os.O_CREAT)
    os.write(gone, b"x" * 100_000)
    os.unlink(mounted.root / "gone")
    mounted.kill()
    for fd in (kept, gone):
        with fails(errno.ENOTCONN):
            os.close(fd)
    mounted.start()  # over the dead mount
    assert (mounted.root / "f").read_bytes() == content(1_500_001)
    assert os.listdir(mounted.root) == ["f"]


def test_data_whose_size_was_lost_does_not_come_back(mounted: Mounted) -> None:
    lost = os.open(mounted.root / "lost", os.O_RDWR | os.O_CREAT)
    other = os.open(mounted.root / "other", os.O_RDWR | os.O_CREAT)
    os.write(lost, b"x" * 3_000_000)
    os.write(other, b"y")
    os.fsync(other)
    mounted.kill()
    for fd in (lost, other):
        with fails(errno.ENOTCONN):
            os.close(fd)
    mounted.start()
    size = (mounted.root / "lost").stat().st_size
    os.truncate(mounted.root / "lost", 4_000_000)
    assert (mounted.root / "lost").read_bytes() == (b"x" * size).ljust(4_000_000, b"\0")


def test_stops_while_a_file_is_open(mounted: Mounted) -> None:
    fd = os.open(mounted.root / "f", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"kept")
    assert mounted.stop() == 0, mounted.log.read_text()
    with fails(errno.ENOTCONN):
        os.write(fd, b"lost")
    with fails(errno.ENOTCONN):
        os.close(fd)
    mounted.start()
    assert (mounted.root / "f").read_bytes() == b"kept"


def test_refuses_bad_mount_points(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(service.MountError, match="not empty"):
        service.prepare(tmp_path / "full")
    with pytest.raises(service.MountError, match="not a directory"):
        service.prepare(tmp_path / "full" / "file")


def test_data_of_no_file_is_dropped_at_start(mounted: Mounted) -> None:
    """A removed file's data may be back after a crash: its removal from the store is recorded a moment later."""

    async def leave() -> None:
        async with Node.open(NodeConfig(mounted.data / "store.kvfs")) as node, DataPlane.open(node) as data:
            data.inode_open(987_654, 0)
            await data.write(987_654, 0, content(200_000))
            data.inode_close(987_654)

    async def left() -> list[int]:
        async with Node.open(NodeConfig(mounted.data / "store.kvfs")) as node, DataPlane.open(node) as data:
            return [ino async for ino, _, _ in data.file_scan()]

    (mounted.root / "f").write_bytes(content(1000))
    ino = (mounted.root / "f").stat().st_ino
    assert mounted.stop() == 0
    trio.run(leave)
    assert 987_654 in trio.run(left)
    mounted.start()
    assert (mounted.root / "f").read_bytes() == content(1000)
    assert mounted.stop() == 0
    assert trio.run(left) == [ino]


def test_a_file_opened_again_while_it_is_stored_keeps_its_size(mounted: Mounted) -> None:
    piece = content(70_001)
    for number in range(60):
        with open(
            mounted.root / f"f{number % 3}", "ab"
        ) as file:  # the last close of the same file may still be under way
            file.write(piece)
    assert mounted.stop() == 0, mounted.log.read_text()
    mounted.start()
    assert [(mounted.root / f"f{i}").read_bytes() == piece * 20 for i in range(3)] == [True] * 3
