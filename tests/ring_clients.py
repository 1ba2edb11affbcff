"""Ring clients of a mount as tests use them: files over both libraries and over the mount alike, and clients that work while
servers fail."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from cluster.load import ALLOWED, SLACK
from hf3fs_fuse import io
from kvfs_usrbio import MISS, BlockStore, File
from waiting import wait_for

CHUNK = 64 << 10
SIZE = 24 * CHUNK
STEPS = 3
"""Operations on servers, one after another, of which a write may consist: a chunk of which a part is dirty is read and written,
then comes what was asked for."""
CLIENT_TIMEOUT = 120.0
"""Of a ring client's calls: the daemon gives up long before."""
RING = timedelta(seconds=CLIENT_TIMEOUT)
BACK_S = 30.0
FILE_ERRORS = ALLOWED | {-errno.EIO}
"""What is asked for in pieces fails with that; a chunk that could not be written back is told so, too."""


def within(deadline: float, steps: int = 1) -> float:
    """How long that many operations take at most, one after another, if each ends within the deadline and a second."""
    return steps * (deadline + 1) + SLACK


def closed(fd: int) -> None:
    """It may have to tell of what could not be written back."""
    try:
        os.close(fd)
    except OSError as e:
        assert -(e.errno or 0) in FILE_ERRORS  # noqa: PT017


class OldRing:
    """A file through hf3fs_fuse.io: a ring for reads, one for writes, one area."""

    def __init__(self, path: Path) -> None:
        mount = io.extract_mount_point(str(path))
        assert mount is not None
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        io.register_fd(self.fd)
        self._shm = SharedMemory(size=4 * CHUNK, create=True)
        assert self._shm.buf is not None
        self.memory = self._shm.buf
        self.reads = io.make_ioring(mount, 16, for_read=True)
        self.writes = io.make_ioring(mount, 16, for_read=False)
        self.iov = io.make_iovec(self._shm, mount)
        self._shm.unlink()

    def write(self, at: int, data: bytes) -> int:
        self.memory[: len(data)] = data
        done = self.writes.prepare(self.iov[: len(data)], False, self.fd, at).submit().wait(min_results=1, timeout=RING)
        assert len(done) == 1, "it never ended"
        return done[0].result

    def read(self, at: int, size: int) -> bytes | int:
        self.memory[:size] = b"\xee" * size
        done = self.reads.prepare(self.iov[:size], True, self.fd, at).submit().wait(min_results=1, timeout=RING)
        assert len(done) == 1, "it never ended"
        return bytes(self.memory[: done[0].result]) if done[0].result >= 0 else done[0].result

    def close(self) -> None:
        io.deregister_fd(self.fd)
        closed(self.fd)
        del self.reads, self.writes, self.iov, self.memory
        self._shm.close()


@contextmanager
def old_ring(path: Path) -> Generator[OldRing]:
    made = OldRing(path)
    try:
        yield made
    finally:
        made.close()


class NewRing:
    """The same through kvfs_usrbio.File."""

    def __init__(self, file: File) -> None:
        self.file = file

    def write(self, at: int, data: bytes) -> int:
        return self.file.write([at], [data])[0]

    def read(self, at: int, size: int) -> bytes | int:
        into = bytearray(size)
        got = self.file.read([at], [into])[0]
        return bytes(into[:got]) if got >= 0 else got


@contextmanager
def new_ring(path: Path) -> Generator[NewRing]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    mount = io.extract_mount_point(str(path))
    assert mount is not None
    try:
        with File.open(mount, fd, timeout=CLIENT_TIMEOUT) as file:
            yield NewRing(file)
    finally:
        closed(fd)


class Plain:
    """The same through the mount."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def write(self, at: int, data: bytes) -> int:
        try:
            return os.pwrite(self.fd, data, at)
        except OSError as e:
            return -(e.errno or errno.EIO)

    def read(self, at: int, size: int) -> bytes | int:
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            return os.pread(self.fd, size, at)
        except OSError as e:
            return -(e.errno or errno.EIO)


@contextmanager
def plain(path: Path) -> Generator[Plain]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield Plain(fd)
    finally:
        closed(fd)


Way = NewRing | OldRing | Plain


class Work(threading.Thread):
    """Does something again and again, and remembers the worst of it."""

    def __init__(self, what: str, limit: float) -> None:
        super().__init__(name=what)
        self.limit = limit  # of one round
        self.rounds = 0
        self.good = 0
        self.longest = 0.0
        self.errors: set[int] = set()
        self.enough = threading.Event()
        self.failure: BaseException | None = None

    def round(self) -> bool:
        """All of it went well."""
        raise NotImplementedError

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                begin = time.monotonic()
                self.good += self.round()
                self.longest = max(self.longest, time.monotonic() - begin)
                self.rounds += 1
        except BaseException as e:
            self.failure = e

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure
        assert self.longest < self.limit, self.name


class Blocks(Work):
    """Puts durable blocks, gets them again, and remembers those that were acknowledged."""

    SIZES = (100, 4096, 70_000, 1 << 20, 4096, 4096, 4096, 4096)

    def __init__(self, store: BlockStore, deadline: float) -> None:
        super().__init__("blocks", within(deadline, 2))
        self.store = store
        self.kept: dict[bytes, bytes] = {}

    def round(self) -> bool:
        keys = [os.urandom(32) for _ in self.SIZES]
        values = [os.urandom(size) for size in self.SIZES]
        put = self.store.put(keys, values, durable=True)
        # 0: asked for again, and what the first request had stored was there
        self.kept.update((k, v) for k, v, r in zip(keys, values, put, strict=True) if r in (0, 1))
        into = [bytearray(size) for size in self.SIZES]
        got = self.store.get(keys, into)
        for value, found, was_put, result in zip(values, into, put, got, strict=True):
            if result >= 0:
                assert found == value
            assert result == len(value) or was_put not in (0, 1) or result in ALLOWED
        self.errors |= {r for r in put + got if r < 0 and r != MISS}
        return all(r in (0, 1) for r in put) and got == list(self.SIZES)

    def check(self) -> None:
        super().check()
        assert self.errors <= ALLOWED, self.errors
        assert self.kept
        for key, value in self.kept.items():
            into = bytearray(len(value))
            assert self.store.get([key], [into]) == [len(value)]
            assert into == value


class Pages(Work):
    """Writes pages that say which they are, and reads some: what can be read is whole and was written there once."""

    PAGE = 4096

    def __init__(self, what: str, way: Way, deadline: float) -> None:
        super().__init__(what, within(deadline, STEPS + 1))
        self.way = way
        self.rng = random.Random(what)

    @staticmethod
    def content(number: int, mark: int, count: int) -> bytes:
        return b"".join(b"%015d\n" % (n << 32 | mark) * (Pages.PAGE // 16) for n in range(number, number + count))

    def look(self, number: int, data: bytes) -> None:
        for i in range(0, len(data), self.PAGE):
            page = data[i : i + self.PAGE]
            if page == bytes(len(page)):
                continue  # never written, or what was written is lost, of which fsync tells
            assert page == page[:16] * (self.PAGE // 16), f"{self.name}: page {number} is torn"
            assert int(page[:15]) >> 32 == number + i // self.PAGE, f"{self.name}: page {number} is another one"

    def round(self) -> bool:
        count = self.rng.choice((1, 3, 16, 32))
        number = self.rng.randrange(SIZE // self.PAGE - count)
        if count >= 16:
            number = number // 16 * 16  # whole chunks, which go straight to the servers
        wrote = self.way.write(number * self.PAGE, self.content(number, self.rounds, count))
        read = self.way.read(number * self.PAGE, count * self.PAGE)
        if isinstance(read, bytes):
            self.look(number, read)
        self.errors |= {r for r in (wrote, read) if isinstance(r, int) and r < 0}
        return wrote == count * self.PAGE and not isinstance(read, int)

    def check(self) -> None:
        super().check()
        assert self.errors <= FILE_ERRORS, (self.name, self.errors)


@contextmanager
def clients_at_work(namespace: str, place: Path, deadline: float) -> Generator[list[Work]]:
    """Ring clients of all kinds, and a program on the mount beside them; their files are in `place`, on a mount whose daemon has
    this deadline."""
    mount = io.extract_mount_point(str(place))
    assert mount is not None
    with ExitStack() as stack:
        store = stack.enter_context(BlockStore.open(mount, namespace, timeout=CLIENT_TIMEOUT))
        works: list[Work] = [
            Blocks(store, deadline),
            Pages("kvfs_usrbio", stack.enter_context(new_ring(place / "new")), deadline),
            Pages("hf3fs_fuse", stack.enter_context(old_ring(place / "old")), deadline),
            Pages("mount", stack.enter_context(plain(place / "plain")), deadline),
        ]
        for work in works:
            work.start()
        try:
            yield works
        finally:
            for work in works:
                work.enough.set()
            for work in works:
                work.join(work.limit)
        assert not [work.name for work in works if work.is_alive()], "these hang"
        for work in works:
            work.check()


def go_on(works: list[Work], seconds: float = BACK_S) -> None:
    """Each of them has two good rounds from now."""
    before = [work.good for work in works]
    wait_for(lambda: all(w.failure or w.good >= b + 2 for w, b in zip(works, before, strict=True)), seconds)
