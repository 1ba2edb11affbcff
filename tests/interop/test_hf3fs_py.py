"""hf3fs_fuse.io, 3FS's Python interface, on a real mount: what programs written for 3FS rely on."""

from __future__ import annotations

import errno
import multiprocessing.shared_memory as shared_memory
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from running import Up

from commands import kill_daemon
from hf3fs_fuse import io

pytestmark = pytest.mark.timeout(120)

PAGE = 64 << 10
SECONDS = timedelta(seconds=20)  # more than any wait here takes
ALLOW_READ_UNCOMMITTED, FORBID_READ_HOLES = 1, 2


@contextmanager
def shared(size: int) -> Generator[memoryview]:
    """Shared memory of which the name is gone already."""
    shm = shared_memory.SharedMemory(size=size, create=True)
    shm.unlink()
    memory = shm.buf
    assert memory is not None
    try:
        yield memory
    finally:
        shm.close()


class Client:
    """A file with what a program of 3FS has around it: a ring for reads and one for writes, and memory of their own."""

    def __init__(self, path: Path, entries: int = 16, size: int = 1 << 20, *, flags: int = 0) -> None:
        mount = io.extract_mount_point(str(path))
        assert mount is not None
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        io.register_fd(self.fd)
        self._shm = shared_memory.SharedMemory(size=size, create=True)
        memory = self._shm.buf
        assert memory is not None
        self.memory = memory
        self.reads = io.make_ioring(mount, entries, for_read=True, timeout=1, flags=flags)
        self.writes = io.make_ioring(mount, entries, for_read=False, timeout=1)
        self.iov = io.make_iovec(self._shm, mount)
        self._shm.unlink()

    def write(self, off: int, data: bytes) -> int:
        self.memory[: len(data)] = data
        done = self.writes.prepare(self.iov[: len(data)], False, self.fd, off).submit()
        return done.wait(min_results=1, timeout=SECONDS)[0].result

    def read(self, off: int, size: int) -> bytes | int:
        """-errno if it failed."""
        self.memory[:size] = b"\xee" * size
        done = self.reads.prepare(self.iov[:size], True, self.fd, off).submit()
        result = done.wait(min_results=1, timeout=SECONDS)[0].result
        return bytes(self.memory[:result]) if result >= 0 else result

    def close(self) -> None:
        io.deregister_fd(self.fd)
        os.close(self.fd)
        del self.reads, self.writes, self.iov, self.memory
        self._shm.close()


@pytest.fixture
def client(up: Up) -> Iterator[Client]:
    client = Client(up.mount / "f")
    yield client
    client.close()


@contextmanager
def fails(code: int) -> Generator[None]:
    with pytest.raises(OSError, match="Errno") as raised:
        yield
    assert raised.value.errno == code


def test_round_trip_and_both_ways_in_see_each_other(up: Up, client: Client) -> None:
    data = os.urandom(1 << 20)
    client.memory[:] = data
    for at in range(0, 1 << 20, PAGE):
        client.writes.prepare(client.iov[at : at + PAGE], False, client.fd, at, userdata=("write", at))
    done = client.writes.submit().wait(min_results=16, timeout=SECONDS)
    assert [(iov.result, iov.userdata, iov.base_off) for iov in done] == [
        (PAGE, ("write", at), at) for at in range(0, 1 << 20, PAGE)
    ]
    assert (up.mount / "f").stat().st_size == 1 << 20
    assert (up.mount / "f").read_bytes() == data
    assert client.read(12345, 300_000) == data[12345:312345]
    assert os.pwrite(client.fd, b"through the mount", 100) == 17
    assert client.read(90, 40) == data[90:100] + b"through the mount" + data[117:130]


def test_short_reads_and_holes(client: Client) -> None:
    assert client.read(0, 10) == b""
    assert client.write(0, b"0123456789") == 10
    assert client.read(4, 100) == b"456789"
    assert client.read(10, 100) == b""
    assert client.read(1 << 40, 100) == b""
    assert client.write(3 << 20, b"end") == 3
    assert client.read(1 << 20, 1 << 20) == bytes(1 << 20)
    assert client.read((3 << 20) - 5, 100) == bytes(5) + b"end"
    os.ftruncate(client.fd, 4)
    assert client.read(0, 100) == b"0123"


def test_a_ring_that_forbids_holes(up: Up) -> None:
    client = Client(up.mount / "f", flags=FORBID_READ_HOLES)
    assert client.write(0, b"data") == 4
    assert client.write(64 << 20, b"more") == 4
    assert client.read(0, 4) == b"data"
    assert client.read(32 << 20, 4096) == -errno.ENODATA
    client.close()


def test_a_ring_that_allows_what_is_not_committed(up: Up) -> None:
    """It reads what a write that has ended has written, as any other ring does; so does one with both flags, and no third flag
    exists."""
    for flags in (ALLOW_READ_UNCOMMITTED, ALLOW_READ_UNCOMMITTED | FORBID_READ_HOLES):
        client = Client(up.mount / f"f{flags}", flags=flags)
        for turn in range(20):
            data = os.urandom(5000)
            assert client.write(turn * 3000, data) == 5000
            assert client.read(turn * 3000, 5000) == data
        client.close()
    with pytest.raises(OSError, match="Invalid argument"):
        io.make_ioring(str(up.mount), 8, flags=4)


def test_the_native_module_by_its_names(up: Up) -> None:
    """Programs reach it as hf3fs_fuse.io.h3fio, too."""
    assert io.h3fio.__name__ == "hf3fs_py_usrbio"
    ring = io.h3fio.ioring(str(up.mount), 8, True, 0, None, None, -1, 0)
    assert isinstance(ring, type(io.make_ioring(str(up.mount), 8)))
    sizes = [type(ring).size_for_entries(entries) for entries in (1, 64, 1024)]
    assert sizes == sorted(set(sizes))
    assert sizes[0] > 0


def test_results_come_in_the_order_of_preparation(client: Client) -> None:
    os.pwrite(client.fd, os.urandom(1 << 20), 0)
    rng = random.Random(5)
    for _ in range(50):
        sizes = [rng.choice((100, 4096, 200_000)) for _ in range(5)] + [100] * 11
        at = 0
        for i, size in enumerate(sizes):
            client.reads.prepare(client.iov[at : at + size], True, client.fd, rng.randrange(500_000), i)
            at = (at + size) % 500_000
        done = client.reads.submit().wait(min_results=len(sizes), timeout=SECONDS)
        assert [iov.userdata for iov in done] == list(range(len(sizes)))
        assert [iov.result for iov in done] == sizes


def test_results_may_be_taken_a_few_at_a_time(client: Client) -> None:
    os.pwrite(client.fd, bytes(100_000), 0)
    assert client.reads.wait() == []
    assert client.reads.wait(min_results=1, timeout=timedelta(milliseconds=5)) == []
    for i in range(10):
        client.reads.prepare(client.iov[i * 100 : i * 100 + 100], True, client.fd, 0, i)
    client.reads.submit()
    seen: list[int] = []
    for most, least in ((3, 3), (4, 1), (1, 1)):
        done = client.reads.wait(max_results=most, min_results=least, timeout=SECONDS)
        assert least <= len(done) <= most
        seen += [iov.userdata for iov in done]
    while len(seen) < 10:  # as many as are there, one at least
        seen += [iov.userdata for iov in client.reads.wait(max_results=100, min_results=1, timeout=SECONDS)]
    assert sorted(seen) == list(range(10))
    assert client.reads.wait(max_results=100, min_results=5, timeout=timedelta(milliseconds=5)) == []


def test_slices(client: Client) -> None:
    os.pwrite(client.fd, bytes(range(256)) * 4, 0)
    part = client.iov[100:300][10:60]
    assert part.base_off == 110
    assert client.iov.base_off == 0
    client.memory[:] = bytes(1 << 20)
    (done,) = client.reads.prepare(part, True, client.fd, 1).submit().wait(min_results=1, timeout=SECONDS)
    assert done is part
    assert done.result == 50
    assert bytes(client.memory[:200]) == bytes(110) + bytes(range(1, 51)) + bytes(40)
    with client.memory[5000:5010] as middle:
        again = client.iov.slice_by(middle)
        assert again.base_off == 5000
        with pytest.raises(IndexError):
            part.slice_by(middle)
    done = client.reads.prepare(again, True, client.fd, 0).submit().wait(min_results=1, timeout=SECONDS)
    assert [iov.result for iov in done] == [10]
    with pytest.raises(ValueError, match="step"):
        client.iov[0:10:2]
    with fails(errno.EINVAL):
        client.reads.prepare(client.iov[10:5], True, client.fd, 0)


def test_more_than_one_chunk_at_once(up: Up) -> None:
    client = Client(up.mount / "f", size=40 << 20)
    data = os.urandom(40 << 20)
    assert client.write(12345, data) == 40 << 20
    assert client.read(12345, 40 << 20) == data
    assert os.pread(client.fd, 1000, 30_000_000) == data[30_000_000 - 12345 : 30_001_000 - 12345]
    client.close()


@pytest.mark.parametrize("io_depth", [0, 4, -8])
def test_batches(up: Up, io_depth: int) -> None:
    """Eight operations, of which the last four may have to wait for the rest of their batch."""
    path = up.mount / "f"
    path.write_bytes(os.urandom(PAGE))
    mount = io.extract_mount_point(path)
    assert mount is not None
    fd = os.open(path, os.O_RDONLY)
    io.register_fd(fd)
    shm = shared_memory.SharedMemory(size=PAGE, create=True)
    ring = io.make_ioring(mount, 16, io_depth=io_depth, timeout=20)
    iov = io.make_iovec(shm, mount)
    shm.unlink()
    for i in range(6):
        ring.prepare(iov[i * 100 : i * 100 + 100], True, fd, 0)
    ring.submit()
    there = 4 if io_depth > 0 else 6
    assert len(ring.wait(min_results=there, timeout=SECONDS)) == there
    for i in range(2):
        ring.prepare(iov[i * 100 : i * 100 + 100], True, fd, 0)
    ring.submit()
    assert len(ring.wait(min_results=8 - there, timeout=SECONDS)) == 8 - there
    io.deregister_fd(fd)
    os.close(fd)
    del ring, iov
    shm.close()


def test_what_is_refused(up: Up, client: Client, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_bytes(b"x")
    with fails(errno.EINVAL):
        io.register_fd(client.fd)
    with fails(errno.EBADF):
        io.register_fd(987_654)
    foreign = os.open(tmp_path / "foreign", os.O_RDWR)
    with fails(errno.EBADF):
        io.register_fd(foreign)
    with fails(errno.EBADF):
        client.reads.prepare(client.iov[:10], True, foreign, 0)
    os.close(foreign)
    with fails(errno.EINVAL):
        client.reads.prepare(client.iov[:10], False, client.fd, 0)
    with fails(errno.EINVAL):
        client.writes.prepare(client.iov[:10], True, client.fd, 0)
    reader = os.open(up.mount / "f", os.O_RDONLY)
    io.register_fd(reader)
    with fails(errno.EACCES):
        client.writes.prepare(client.iov[:10], False, reader, 0)
    io.deregister_fd(reader)
    with fails(errno.EBADF):
        client.reads.prepare(client.iov[:10], True, reader, 0)
    os.close(reader)
    for i in range(client.reads.entries):
        client.reads.prepare(client.iov[i : i + 1], True, client.fd, 0)
    with fails(errno.EAGAIN):
        client.reads.prepare(client.iov[:1], True, client.fd, 0)
    done = client.reads.submit().wait(min_results=client.reads.entries, timeout=SECONDS)
    assert len(done) == client.reads.entries
    mount = str(up.mount)
    for entries, io_depth in ((0, 0), (-1, 0), (4, 5)):
        with fails(errno.EINVAL):
            io.make_ioring(mount, entries, io_depth=io_depth)
    with pytest.raises(OSError, match="Errno"):
        io.make_ioring(str(tmp_path), 4)
    ring = io.make_ioring(mount, 4)
    ring.destroy()
    ring.destroy()
    with fails(errno.EINVAL):
        ring.submit()


def test_mount_points(up: Up, tmp_path: Path) -> None:
    (up.mount / "d").mkdir()
    (up.mount / "d" / "f").write_bytes(b"x")
    for path in (up.mount, up.mount / "d", up.mount / "d" / "f"):
        assert io.extract_mount_point(str(path)) == str(up.mount)
    assert io.extract_mount_point(str(tmp_path)) is None
    assert io.extract_mount_point("/nowhere/at/all") is None


def test_hard_link_hole_and_sync(up: Up, client: Client) -> None:
    assert client.write(0, b"x" * (1 << 20)) == 1 << 20
    assert io.force_fsync(client.fd) == 0
    io.hardlink(up.mount / "f", up.mount / "g")
    assert os.path.samefile(up.mount / "f", up.mount / "g")
    with fails(errno.EEXIST):
        io.hardlink(up.mount / "f", up.mount / "g")
    io.punch_hole(client.fd, [4096, 1 << 19], [8192, (1 << 19) + (1 << 17)])
    io.punch_hole(str(up.mount / "g"), [1 << 18], [(1 << 18) + 100])
    wanted = bytearray(b"x" * (1 << 20))
    for start, end in ((4096, 8192), (1 << 19, (1 << 19) + (1 << 17)), (1 << 18, (1 << 18) + 100)):
        wanted[start:end] = bytes(end - start)
    assert client.read(0, 1 << 20) == wanted
    assert (up.mount / "g").read_bytes() == wanted
    with pytest.raises(RuntimeError, match="starts"):
        io.punch_hole(client.fd, [0], [])


def test_read_file(up: Up) -> None:
    data = os.urandom(300_000)
    path = up.mount / "f"
    path.write_bytes(data)
    assert io.read_file(str(path), block_size=1 << 20) == data
    assert io.read_file(path, up.mount, block_size=100_000, off=7, priority=io.IorPriority.HIGH) == data[7:]
    pieces: list[tuple[bytes, int]] = []

    def take(lent: memoryview, off: int) -> bool | int:
        pieces.append((bytes(lent), off))
        return 200_000 if off == 0 else len(pieces) == 3

    assert io.read_file(path, block_size=40_000, cb=take) is None
    assert pieces == [(data[at : at + 40_000], at) for at in (0, 200_000, 240_000)]
    with fails(errno.ENOENT):
        io.read_file(up.mount / "nothing")
    with pytest.raises(ValueError, match="not on a kvfs"):
        io.read_file(__file__)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_thousands_of_rings(up: Up, client: Client) -> None:
    """Nothing of a ring is left, here or in the daemon, when it has gone; one may go with operations under way."""
    os.pwrite(client.fd, bytes(PAGE), 0)
    mount = str(up.mount)
    before = 0
    for i in range(2000):
        if i == 100:
            before = descriptors()
        ring = io.make_ioring(mount, 8)
        ring.prepare(client.iov[:4096], True, client.fd, 0).submit()
        if i % 3 == 0:
            assert ring.wait(min_results=1, timeout=SECONDS)[0].result == 4096
        if i % 2:
            ring.destroy()
        else:
            del ring
    assert descriptors() <= before + 2
    assert client.read(0, 4096) == bytes(4096)


def test_memory_comes_and_goes(up: Up, client: Client) -> None:
    os.pwrite(client.fd, b"content", 0)
    before = 0
    for i in range(300):
        if i == 20:
            before = descriptors()
        shm = shared_memory.SharedMemory(size=PAGE, create=True)
        whole = io.make_iovec(shm, str(up.mount))
        shm.unlink()
        part = whole[10:17]
        del whole  # a part keeps it
        done = client.reads.prepare(part, True, client.fd, 0).submit().wait(min_results=1, timeout=SECONDS)
        assert done[0].result == 7
        memory = shm.buf
        assert memory is not None
        assert bytes(memory[10:17]) == b"content"
        del part, done, memory
        shm.close()
    assert descriptors() <= before + 2


def test_a_signal_ends_a_wait_and_loses_nothing(client: Client) -> None:
    os.pwrite(client.fd, bytes(100), 0)
    client.reads.prepare(client.iov[:100], True, client.fd, 0, "kept").submit()

    def interrupt(number: int, frame: object) -> None:
        del number, frame
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(InterruptedError):
            client.reads.wait(min_results=2)  # for ever
    finally:
        signal.signal(signal.SIGALRM, before)
    (done,) = client.reads.wait(min_results=1, timeout=SECONDS)
    assert (done.result, done.userdata) == (100, "kept")


def test_the_daemon_dies(up: Up) -> None:
    client = Client(up.mount / "f")
    assert client.write(0, b"x" * PAGE) == PAGE
    waiting = threading.Event()
    ended: list[int] = []

    def outcome(ring: io.ioring) -> int:
        """Of the next operation that is done: the errno, whichever way it comes."""
        try:
            return -ring.submit().wait(min_results=1)[0].result
        except OSError as error:
            return error.errno or 0

    def wait_for_ever() -> None:
        waiting.set()
        ended.append(outcome(client.reads))

    waiter = threading.Thread(target=wait_for_ever)
    waiter.start()
    waiting.wait()
    kill_daemon(up.directory)
    waiter.join(60)
    assert ended in ([errno.EREMOTEIO], [errno.EIO])
    with suppress(OSError):
        client.writes.prepare(client.iov[:100], False, client.fd, 0)
    assert outcome(client.writes) in (errno.EREMOTEIO, errno.EIO)
    with pytest.raises(OSError, match="Errno"):
        io.make_ioring(str(up.mount), 4)
    io.deregister_fd(client.fd)
    client.reads.destroy()
    client.writes.destroy()


CHILD = """
import errno, os, sys
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from hf3fs_fuse import io

LIMIT = timedelta(seconds=20)
path, mount = sys.argv[1:]
fd = os.open(path, os.O_RDWR)
io.register_fd(fd)
shm = SharedMemory(size=1 << 16, create=True)
ring, iov = io.make_ioring(mount, 8), io.make_iovec(shm, mount)
shm.unlink()

def read(ring, iov, fd, memory):
    memory[:7] = bytes(7)
    done = ring.prepare(iov[:7], True, fd, 0).submit().wait(min_results=1, timeout=LIMIT)
    return [r.result for r in done], bytes(memory[:7])

assert read(ring, iov, fd, shm.buf) == ([7], b"content")
child = os.fork()
if child == 0:
    code = 1
    try:
        try:
            read(ring, iov, fd, shm.buf)
            print("the parent's ring works in the child", flush=True)
        except OSError:
            code = 0
        own = SharedMemory(size=1 << 16, create=True)
        mine = os.open(path, os.O_RDWR)
        io.register_fd(mine)
        other, area = io.make_ioring(mount, 8), io.make_iovec(own, mount)
        own.unlink()
        assert read(other, area, mine, own.buf) == ([7], b"content")
        del ring, iov, other, area
    except BaseException:
        code = 1
        raise
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert read(ring, iov, fd, shm.buf) == ([7], b"content")
"""


def test_fork(up: Up) -> None:
    (up.mount / "f").write_bytes(b"content")
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, up.mount / "f", up.mount], capture_output=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, b""), ran.stderr.decode()


SHARER = """
import os, sys
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from hf3fs_fuse import io

PAGE, PAGES, FILE = 1 << 16, 8, 1 << 40
path, me, all_ = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.open(path, os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, FILE)
io.register_fd(fd)
mount = io.extract_mount_point(path)
shm = SharedMemory(size=PAGE * PAGES, create=True)
reads, writes = io.make_ioring(mount, PAGES, timeout=1), io.make_ioring(mount, PAGES, for_read=False, timeout=1)
iov = io.make_iovec(shm, mount)
shm.unlink()

def place(who, i):  # all over the file, neighbours by different processes
    return (FILE // PAGES * i + who * PAGE) % FILE

def content(who, i):
    return bytes([who + 1, i + 1]) * (PAGE // 2)

def transfer(ring, reading, who):
    for i in range(PAGES):
        ring.prepare(iov[i * PAGE : (i + 1) * PAGE], reading, fd, place(who, i))
    done = ring.submit().wait(min_results=PAGES, timeout=timedelta(seconds=20))
    assert [r.result for r in done] == [PAGE] * PAGES, [r.result for r in done]

for i in range(PAGES):
    shm.buf[i * PAGE : (i + 1) * PAGE] = content(me, i)
transfer(writes, False, me)
print("written", flush=True)
sys.stdin.readline()
for who in range(all_):
    shm.buf[:] = bytes(PAGE * PAGES)
    transfer(reads, True, who)
    for i in range(PAGES):
        assert shm.buf[i * PAGE : (i + 1) * PAGE] == content(who, i), (who, i)
"""


def test_several_processes_on_one_file_of_a_tebibyte(up: Up) -> None:
    path = up.mount / "hicache.0.bin"
    sharers = [
        subprocess.Popen(
            [sys.executable, "-c", SHARER, path, str(i), "3"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(3)
    ]
    try:
        for sharer in sharers:
            assert sharer.stdout is not None
            assert sharer.stdout.readline() == b"written\n", sharer.communicate(timeout=60)[1].decode()
        for sharer in sharers:
            _, complaint = sharer.communicate(b"\n", timeout=60)
            assert sharer.returncode == 0, complaint.decode()
    finally:
        for sharer in sharers:
            sharer.kill()
            sharer.communicate()
    assert path.stat().st_size == 1 << 40


@pytest.mark.parametrize("seed", range(4))
def test_mixed_with_the_mount_against_a_model(up: Up, seed: int) -> None:
    """One file, written and read over rings and through the mount."""
    rng = random.Random(seed)
    limit = 1 << 20
    model = bytearray()
    client = Client(up.mount / "f", entries=8)
    plain = os.open(up.mount / "f", os.O_RDWR)

    def put(off: int, data: bytes) -> None:
        if off > len(model):
            model.extend(bytes(off - len(model)))
        model[off : off + len(data)] = data

    for step in range(400):
        off = rng.choice((rng.randrange(limit), rng.randrange(16) * PAGE, max(0, len(model) - 10)))
        size = min(rng.choice((1, 100, 4096, rng.randrange(1, 200_000))), limit - off)
        kind = rng.choice(
            ("ring write", "ring writes", "ring read", "ring reads", "write", "read", "truncate", "punch")
        )
        if size <= 0:
            continue
        if kind == "ring write":
            data = rng.randbytes(size)
            assert client.write(off, data) == size
            put(off, data)
        elif kind == "write":
            data = rng.randbytes(size)
            assert os.pwrite(plain, data, off) == size
            put(off, data)
        elif kind == "ring writes":  # side by side: those of one batch may be done in any order
            each = min(size // 8 + 1, (limit - off) // 8)
            if each == 0:
                continue
            for i in range(8):
                data = rng.randbytes(each)
                client.memory[i * each : (i + 1) * each] = data
                client.writes.prepare(client.iov[i * each : (i + 1) * each], False, client.fd, off + i * each)
                put(off + i * each, data)
            done = client.writes.submit().wait(min_results=8, timeout=SECONDS)
            assert [iov.result for iov in done] == [each] * 8
        elif kind == "ring read":
            assert client.read(off, size) == model[off : off + size], (step, off, size)
        elif kind == "read":
            assert os.pread(plain, size, off) == model[off : off + size], (step, off, size)
        elif kind == "ring reads":
            wanted: list[bytes] = []
            for i in range(8):
                start, end = i * 100_000, i * 100_000 + rng.randrange(1, 100_000)
                at = rng.randrange(limit)
                wanted.append(bytes(model[at : at + end - start]))
                client.reads.prepare(client.iov[start:end], True, client.fd, at)
            done = client.reads.submit().wait(min_results=8, timeout=SECONDS)
            got = [bytes(client.memory[iov.base_off : iov.base_off + iov.result]) for iov in done]
            assert got == wanted, step
        elif kind == "truncate" and rng.random() < 0.3:
            os.ftruncate(plain, off)
            if off < len(model):
                del model[off:]
            else:
                model.extend(bytes(off - len(model)))
        elif kind == "punch":
            io.punch_hole(client.fd, [off], [off + size])
            model[off : off + size] = bytes(len(model[off : off + size]))
        assert os.fstat(plain).st_size == len(model), (step, kind)
    with open(up.mount / "f", "rb") as opened:
        assert opened.read() == model
    os.close(plain)
    client.close()
