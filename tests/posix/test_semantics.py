"""POSIX semantics through the kernel that suites miss: several processes, huge and sparse files, odd names, locks, and
what the calls give that pyfuse3 does not carry. docs/posix.md says the same in words."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mount_process import Mounted, fails

from kvfs.meta import fsck
from kvfs.meta.sqlite import SqliteStore

pytestmark = pytest.mark.timeout(60)

MAX_SIZE = (1 << 63) - 1
CHILD_S = 30
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 1, 2, 8, 16, 32
FICLONE, FS_IOC_GETFLAGS, FS_IOC_FIEMAP, UNKNOWN_IOCTL = 0x40049409, 0x80086601, 0xC020660B, 0x5566


@contextmanager
def child(code: str, *arguments: str, cwd: Path) -> Generator[subprocess.Popen[bytes]]:
    """Another process, that has printed a line; it is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=CHILD_S)


def as_other_user(code: str, cwd: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    prefix = "import mmap, os; os.setgroups([]); os.setgid(1234); os.setuid(1234); "
    subprocess.run([sys.executable, "-c", prefix + code], cwd=cwd, check=True, timeout=CHILD_S)


# -- data


APPENDER = """
import os, sys
fd = os.open("f", os.O_WRONLY | os.O_APPEND)
print("ready", flush=True)
sys.stdin.readline()
for i in range(400):
    record = b"%s%06d:" % (sys.argv[1].encode(), i)
    record += record[:1].lower() * (50 + i * 37 % 9000) + b"\\n"
    assert os.write(fd, record) == len(record)
"""


def test_appends_of_two_processes_lose_and_tear_nothing(mounted: Mounted) -> None:
    path = mounted.root / "f"
    path.touch()
    with child(APPENDER, "A", cwd=mounted.root) as one, child(APPENDER, "B", cwd=mounted.root) as two:
        for process in (one, two):
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert (one.wait(CHILD_S), two.wait(CHILD_S)) == (0, 0)
    seen: dict[bytes, list[int]] = {b"A": [], b"B": []}
    for record in path.read_bytes().splitlines():
        who, i = record[:1], int(record[1:7])
        assert record[7:] == b":" + who.lower() * (50 + i * 37 % 9000)
        seen[who].append(i)
    assert seen == {b"A": list(range(400)), b"B": list(range(400))}


def test_reads_that_race_with_truncations_see_old_bytes_or_zeros(mounted: Mounted) -> None:
    size = 400_000
    path = mounted.root / "f"
    other = mounted.root / "other"
    other.write_bytes(b"\xee" * size)  # what must never be seen
    path.write_bytes(b"\x11" * size)
    stop = threading.Event()
    wrong: list[bytes] = []
    reads = 0

    def read() -> None:
        nonlocal reads
        with path.open("rb", buffering=0) as file:
            while not stop.is_set():
                data = os.pread(file.fileno(), size, 0)
                reads += 1
                if data.strip(b"\x11\0"):
                    wrong.append(data.strip(b"\x11\0")[:16])
                    return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with path.open("r+b", buffering=0) as file:
            for i in range(300):
                file.truncate(i * 1371 % size)
                other.write_bytes(b"\xee" * (size // 4))
                file.truncate(size)
                os.pwrite(file.fileno(), b"\x11" * 70_000, i * 911 % (size - 70_000))
    finally:
        stop.set()
        reader.join(CHILD_S)
    assert not wrong
    assert reads > 0


def test_data_past_4_gib_and_a_sparse_file_of_1_tib(mounted: Mounted) -> None:
    path = mounted.root / "f"
    places = {(4 << 30) - 2: b"over the edge", (5 << 30) + 1: b"Q" * 100_000, (1 << 40) - 3: b"end"}
    with path.open("w+b", buffering=0) as file:
        for off, data in places.items():
            assert os.pwrite(file.fileno(), data, off) == len(data)
        os.fsync(file.fileno())
    with path.open("rb") as file:
        assert os.fstat(file.fileno()).st_size == 1 << 40
        for off, data in places.items():
            assert os.pread(file.fileno(), len(data) + 4, off - 4)[4:] == data
            assert os.pread(file.fileno(), 4, off - 4) == bytes(4)
        assert os.pread(file.fileno(), 10, 1 << 40) == b""
    os.truncate(path, (4 << 30) + 1)
    os.truncate(path, 1 << 40)
    with path.open("rb") as file:
        assert os.pread(file.fileno(), 8, (4 << 30) - 2) == b"ove" + bytes(5)
        assert os.pread(file.fileno(), 100, (5 << 30) + 1) == bytes(100)


def test_sizes_that_add_up_to_more_than_64_bits_hurt_nobody(mounted: Mounted) -> None:
    for name in ("a", "b", "c"):
        with (mounted.root / name).open("w+b", buffering=0) as file:
            os.truncate(file.fileno(), MAX_SIZE)
            os.pwrite(file.fileno(), b"!", MAX_SIZE - 1)
    (mounted.root / "d").write_bytes(b"works")
    os.statvfs(mounted.root)
    for name in ("a", "b"):
        (mounted.root / name).unlink()
    assert mounted.stop() == 0, mounted.log.read_text()
    store = SqliteStore(mounted.data / "meta.db")
    try:
        assert fsck.check(store).findings == []
    finally:
        store.close()


def test_mmap_and_read_see_the_same(mounted: Mounted) -> None:
    path = mounted.root / "f"
    path.write_bytes(b"." * 10_000)
    with path.open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[5000:5005] = b"mmap!"
        assert os.pread(file.fileno(), 5, 5000) == b"mmap!"  # before any msync
        code = 'import sys; f = open("f", "rb"); f.seek(5000); sys.exit(f.read(5) != b"mmap!")'
        subprocess.run([sys.executable, "-c", code], cwd=mounted.root, check=True, timeout=CHILD_S)
        os.pwrite(file.fileno(), b"write", 5002)
        assert memory[5000:5007] == b"mmwrite"
    assert path.read_bytes() == b"." * 5000 + b"mmwrite" + b"." * 4993


# -- names and directories


def test_names(mounted: Mounted) -> None:
    root = os.fsencode(mounted.root)
    names = [b"n" * 255, b"\xff\xfe\x80", "\u00e9".encode("latin-1"), b"\xc3\xa9" * 127, b"\n", b"\\ ", b"...", b"-"]
    for name in names:
        fd = os.open(root + b"/" + name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(fd, name)
        os.close(fd)
    assert sorted(os.listdir(root)) == sorted(names)
    for name in names:
        with open(root + b"/" + name, "rb") as file:
            assert file.read() == name
    there = root + b"/-"
    calls: list[Callable[[bytes], object]] = [
        lambda path: os.open(path, os.O_CREAT | os.O_WRONLY),
        os.mkdir,
        os.stat,
        os.unlink,
        lambda path: os.symlink(b"x", path),
        lambda path: os.link(there, path),
        lambda path: os.rename(there, path),
    ]
    for call in calls:
        with fails(errno.ENAMETOOLONG):
            call(root + b"/" + b"n" * 256)


CHANGER = """
import itertools, os
print("ready", flush=True)
for i in itertools.count():
    name = "d/change-%d" % (i % 700)
    try:
        os.unlink(name)
    except FileNotFoundError:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
"""


def test_readdir_with_changes_loses_and_doubles_nothing_untouched(mounted: Mounted) -> None:
    directory = mounted.root / "d"
    directory.mkdir()
    kept = [f"kept-{i:04}" for i in range(5000)]
    for name in kept:
        os.close(os.open(directory / name, os.O_CREAT | os.O_WRONLY))
    with child(CHANGER, cwd=mounted.root) as changer:
        for _ in range(15):
            assert sorted(name for name in os.listdir(directory) if name[0] == "k") == kept
        assert changer.poll() is None


# -- locks


LOCKER = """
import fcntl, os, struct, sys
fd = os.open("f", os.O_RDWR)
if sys.argv[1] == "flock":
    fcntl.flock(fd, fcntl.LOCK_EX)
elif sys.argv[1] == "ofd":
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 50, 0))
else:
    fcntl.lockf(fd, fcntl.LOCK_EX, 50, 100)  # bytes 100 to 149
print("ready", flush=True)
sys.stdin.readline()
os.close(fd)
print("closed", flush=True)
sys.stdin.readline()
"""


def lock_ofd(fd: int, how: int, off: int, length: int = 10) -> None:
    """A lock of the open file description, with `how` as fcntl.lockf takes it."""
    kinds = {fcntl.LOCK_EX: fcntl.F_WRLCK, fcntl.LOCK_SH: fcntl.F_RDLCK, fcntl.LOCK_UN: fcntl.F_UNLCK}
    request = struct.pack("hhqqi4x", kinds[how & ~fcntl.LOCK_NB], os.SEEK_SET, off, length, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK if how & fcntl.LOCK_NB else fcntl.F_OFD_SETLKW, request)


@pytest.mark.parametrize("kind", ["flock", "range", "ofd"])
@pytest.mark.parametrize("end", ["close", "kill"])
def test_locks_between_processes(mounted: Mounted, kind: str, end: str) -> None:
    path = mounted.root / "f"
    path.write_bytes(bytes(1000))

    def lock(fd: int, how: int, off: int = 120) -> None:
        if kind == "flock":
            fcntl.flock(fd, how)
        elif kind == "ofd":
            lock_ofd(fd, how, off)
        else:
            fcntl.lockf(fd, how, 10, off)

    with path.open("r+b") as file, child(LOCKER, kind, cwd=mounted.root) as locker:
        fd = file.fileno()
        for how in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            with fails(errno.EAGAIN):
                lock(fd, how | fcntl.LOCK_NB)
        if kind != "flock":
            lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 90)
            lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 150)
        if end == "kill":
            locker.kill()
        else:
            assert locker.stdin is not None
            assert locker.stdout is not None
            locker.stdin.write(b"\n")
            locker.stdin.flush()
            assert locker.stdout.readline() == b"closed\n"
        lock(fd, fcntl.LOCK_EX)  # waits for the lock; the test's time limit ends a wait for ever


def test_locks_of_open_file_descriptions(mounted: Mounted) -> None:
    """They belong to one open(): another one of the same process conflicts, and closing another one ends nothing."""
    path = mounted.root / "f"
    path.write_bytes(bytes(1000))
    exclusive, shared = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB
    with path.open("r+b") as one, path.open("r+b") as other:
        lock_ofd(one.fileno(), exclusive, 0, 100)
        with fails(errno.EAGAIN):
            lock_ofd(other.fileno(), shared, 99)
        with fails(errno.EAGAIN):  # and with the locks of processes
            fcntl.lockf(other, exclusive, 10, 99)
        lock_ofd(other.fileno(), exclusive, 100)
        path.open("r+b").close()
        copy = os.dup(one.fileno())
        os.close(copy)
        with fails(errno.EAGAIN):
            lock_ofd(other.fileno(), shared, 0)
        lock_ofd(one.fileno(), fcntl.LOCK_UN | fcntl.LOCK_NB, 0, 50)
        lock_ofd(other.fileno(), exclusive, 40)
        with fails(errno.EAGAIN):
            lock_ofd(other.fileno(), exclusive, 41)


# -- calls that pyfuse3 does not carry


def fallocate(fd: int, mode: int, off: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, mode, ctypes.c_int64(off), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def test_fallocate_is_not_supported_and_posix_fallocate_falls_back(mounted: Mounted) -> None:
    with (mounted.root / "f").open("w+b", buffering=0) as file:
        file.write(b"x" * 200_000)
        for mode in (0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE):
            with fails(errno.EOPNOTSUPP):
                fallocate(file.fileno(), mode, 65536, 65536)
        os.posix_fallocate(file.fileno(), 100_000, 300_000)  # glibc writes to every block
        assert os.pread(file.fileno(), 500_000, 0) == b"x" * 200_000 + bytes(200_000)


def test_copy_file_range_copies(mounted: Mounted) -> None:
    data = os.urandom(300_000)
    (mounted.root / "f").write_bytes(data)
    with (mounted.root / "f").open("rb") as source, (mounted.root / "g").open("w+b", buffering=0) as target:
        copied = os.copy_file_range(source.fileno(), target.fileno(), 100_000, 7, 5)
        assert 0 < copied <= 100_000
        assert (mounted.root / "g").read_bytes() == bytes(5) + data[7 : 7 + copied]
        with tempfile.TemporaryFile(dir=mounted.directory) as outside, fails(errno.EXDEV):
            os.copy_file_range(source.fileno(), outside.fileno(), 100, 0, 0)


def test_seek_data_and_hole_take_a_file_for_data_all_through(mounted: Mounted) -> None:
    with (mounted.root / "f").open("w+b", buffering=0) as file:
        os.truncate(file.fileno(), 1 << 20)
        for off in (0, 500_000, (1 << 20) - 1):
            assert os.lseek(file.fileno(), off, os.SEEK_DATA) == off
            assert os.lseek(file.fileno(), off, os.SEEK_HOLE) == 1 << 20
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with fails(errno.ENXIO):
                os.lseek(file.fileno(), 1 << 20, whence)


def test_o_tmpfile_is_not_supported_and_tempfile_falls_back(mounted: Mounted) -> None:
    with fails(errno.EOPNOTSUPP):
        os.open(mounted.root, os.O_TMPFILE | os.O_RDWR, 0o600)
    with tempfile.TemporaryFile(dir=mounted.root) as file:
        file.write(b"temporary")
        file.seek(0)
        assert file.read() == b"temporary"
        assert os.listdir(mounted.root) == []


def test_ioctls_are_not_supported(mounted: Mounted) -> None:
    (mounted.root / "g").write_bytes(b"x")
    with (mounted.root / "f").open("w+b") as file, (mounted.root / "g").open("rb") as other:
        for request in (UNKNOWN_IOCTL, FS_IOC_GETFLAGS):
            with fails(errno.ENOTTY):
                fcntl.ioctl(file, request, bytes(8))
        with fails(errno.EOPNOTSUPP):
            fcntl.ioctl(file, FICLONE, other.fileno())
        with fails(errno.EOPNOTSUPP):
            fcntl.ioctl(file, FS_IOC_FIEMAP, bytearray(32))


# -- the rest


def test_statfs_follows_what_is_written(mounted: Mounted) -> None:
    def free() -> int:
        numbers = os.statvfs(mounted.root)
        assert 0 < numbers.f_bavail <= numbers.f_bfree <= numbers.f_blocks
        assert 0 < numbers.f_ffree <= numbers.f_files
        return numbers.f_bfree * numbers.f_frsize

    before = free()
    with (mounted.root / "f").open("wb", buffering=0) as file:
        file.write(os.urandom(10 << 20))
        os.fsync(file.fileno())
    assert 10 << 20 <= before - free() <= 12 << 20


def test_a_dead_mount_answers_with_an_error(mounted: Mounted) -> None:
    path = mounted.root / "f"
    path.write_bytes(b"x" * 10_000)
    fd = os.open(path, os.O_RDWR)
    mounted.kill()
    calls: list[Callable[[], object]] = [
        lambda: os.pread(fd, 10, 0),
        lambda: os.pwrite(fd, b"x", 0),
        lambda: os.fsync(fd),
        lambda: os.stat(path),
        lambda: os.listdir(mounted.root),
        lambda: os.statvfs(mounted.root),
        lambda: os.open(mounted.root / "new", os.O_CREAT),
        lambda: os.unlink(path),
        lambda: os.close(fd),
    ]
    for call in calls:
        with fails(errno.ENOTCONN):
            call()


@pytest.mark.parametrize(
    "change",
    [
        'os.write(os.open("f", os.O_WRONLY), b"x")',
        'os.truncate("f", 1)',
        'os.close(os.open("f", os.O_WRONLY | os.O_TRUNC))',
    ],
    ids=["write", "truncate", "o_trunc"],
)
def test_a_change_by_another_user_clears_the_set_id_bits(mounted: Mounted, change: str) -> None:
    path = mounted.root / "f"
    path.write_bytes(b"program")
    os.chmod(mounted.root, 0o777)
    os.chmod(path, 0o6777)
    as_other_user(change, mounted.root)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777
    os.chmod(path, 0o6766)  # without group execution set-gid is no right to give away
    as_other_user(change, mounted.root)
    assert stat.S_IMODE(path.stat().st_mode) == 0o2766


def test_a_change_through_a_mapping_keeps_the_set_id_bits(mounted: Mounted) -> None:
    """As on ext4: the kernel clears them in write(), not in a page fault."""
    path = mounted.root / "f"
    path.write_bytes(b"program")
    os.chmod(path, 0o6777)
    as_other_user('m = mmap.mmap(os.open("f", os.O_RDWR), 0); m[3:4] = b"!"; m.flush()', mounted.root)
    assert path.read_bytes() == b"pro!ram"
    assert stat.S_IMODE(path.stat().st_mode) == 0o6777
