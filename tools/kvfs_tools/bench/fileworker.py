"""One process that does one kind of file operation and says how many it did in which time.

`kvfs bench posix` starts it as a program of its own, so that several processes share nothing. It prints "ready", waits
for a line on standard input, works, and prints {"count": N, "seconds": S}. Only the standard library, so that it starts
quickly under `python -I -S`.
"""

import argparse
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable

PIECE = 128 << 10  # of a read()
FILE_BYTES = 4096  # of a created file

Work = Callable[[], tuple[int, float]]
"""How many it did, in how many seconds."""


def _timed(work: Callable[[], int]) -> Work:
    def run() -> tuple[int, float]:
        begun = time.monotonic()
        count = work()
        return count, time.monotonic() - begun

    return run


def _name(number: int) -> str:
    return f"file-{number:07d}"


def _shuffled(directory: str, count: int, seed: int) -> list[str]:
    paths = [f"{directory}/{_name(i)}" for i in range(count)]
    random.Random(seed).shuffle(paths)
    return paths


def _create(a: argparse.Namespace) -> Work:
    """New files, each created, written and closed, until the time or the count is over."""
    os.mkdir(a.path)
    data = os.urandom(FILE_BYTES)

    def work() -> int:
        end = time.monotonic() + a.seconds
        done = 0
        while done < a.count and time.monotonic() < end:
            fd = os.open(f"{a.path}/{_name(done)}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            try:
                if os.write(fd, data) != FILE_BYTES:
                    raise OSError("a write was short")
            finally:
                os.close(fd)
            done += 1
        return done

    return _timed(work)


def _make(a: argparse.Namespace) -> Work:
    """The directory of `count` empty files that the others look at."""

    def work() -> int:
        os.mkdir(a.path)
        for i in range(a.count):
            os.close(os.open(f"{a.path}/{_name(i)}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        return a.count

    return _timed(work)


def _stat(a: argparse.Namespace) -> Work:
    paths = _shuffled(a.path, a.count, a.seed)

    def work() -> int:
        for path in paths:
            os.stat(path)
        return len(paths)

    return _timed(work)


def _list(a: argparse.Namespace) -> Work:
    def work() -> int:
        with os.scandir(a.path) as entries:
            return sum(1 for _ in entries)

    return _timed(work)


def _unlink(a: argparse.Namespace) -> Work:
    """In the order in which they were made."""
    paths = [f"{a.path}/{_name(i)}" for i in range(a.count)]

    def work() -> int:
        for path in paths:
            os.unlink(path)
        return len(paths)

    return _timed(work)


def _clear(a: argparse.Namespace) -> Work:
    """Removes the directory; every file in it must have `size` bytes."""

    def work() -> int:
        with os.scandir(a.path) as entries:
            paths = [entry.path for entry in entries]
        for path in paths:
            size = os.stat(path).st_size
            if size != a.size:
                raise OSError(f"{path} has {size} bytes and not {a.size}")
            os.unlink(path)
        os.rmdir(a.path)
        return len(paths)

    return _timed(work)


def _passes(a: argparse.Namespace, once: Callable[[int, memoryview], None]) -> Work:
    """Whole passes over one file until the time is over; the first one, which warms the page cache, does not count.

    The time is the median pass's, times their number: a pass takes less than a time slice, so that one that another
    process interrupted is seen as what it is.
    """
    fd = os.open(a.path, os.O_RDONLY)
    if os.fstat(fd).st_size != a.size:
        raise OSError(f"{a.path} has {os.fstat(fd).st_size} bytes and not {a.size}")
    buffer = memoryview(bytearray(a.size))
    once(fd, buffer)

    def work() -> tuple[int, float]:
        now = time.monotonic()
        end = now + a.seconds
        took: list[float] = []
        while now < end:
            once(fd, buffer)
            before, now = now, time.monotonic()
            took.append(now - before)
        return len(took), sorted(took)[len(took) // 2] * len(took)

    return work


def _read(a: argparse.Namespace) -> Work:
    def once(fd: int, buffer: memoryview) -> None:
        for at in range(0, len(buffer), PIECE):
            if os.preadv(fd, [buffer[at : at + PIECE]], at) != min(PIECE, len(buffer) - at):
                raise OSError("a read was short")

    return _passes(a, once)


def _mmap(a: argparse.Namespace) -> Work:
    """Mapped anew in each pass, so that the page faults are counted, too."""

    def once(fd: int, buffer: memoryview) -> None:
        with mmap.mmap(fd, len(buffer), mmap.MAP_SHARED, mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            buffer[:] = view

    return _passes(a, once)


OPERATIONS: dict[str, Callable[[argparse.Namespace], Work]] = {
    "create": _create,
    "make": _make,
    "stat": _stat,
    "list": _list,
    "unlink": _unlink,
    "clear": _clear,
    "read": _read,
    "mmap": _mmap,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operation", choices=sorted(OPERATIONS))
    parser.add_argument("path")
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=FILE_BYTES)
    a = parser.parse_args()
    try:
        work = OPERATIONS[a.operation](a)
        print("ready", flush=True)
        if not sys.stdin.readline():
            return 1  # who started it is gone
        count, seconds = work()
    except OSError as e:
        print(f"{a.operation}: {e}", file=sys.stderr)
        return 1
    print(json.dumps({"count": count, "seconds": seconds}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
