"""Session: one connection to a daemon with its lanes; what BlockStore and File have in common."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from kvfs_usrbio._native import ffi, lib
from kvfs_usrbio.aio import Driver, Maker, current_loop, make_driver
from kvfs_usrbio.client import Client, check
from kvfs_usrbio.jobs import Job, Lane, check_count, pack
from kvfs_usrbio.queue import Queue

SOCKET_NAME: Final = "kvfs.sock"  # in the data directory
INFO_NAME: Final = ".kvfs/info"  # in the mount
RING_ENTRIES: Final = 256
MAX_LANES: Final = 10  # rings for blocking calls; more threads would wait for the same daemon
INFO_BYTES: Final = 65536


def socket_path(where: str | os.PathLike[str]) -> str:
    """The daemon's socket for a mount point, a socket path, a data directory or kvfs:///any of them."""
    text = os.fspath(where)
    if text.startswith("kvfs:"):
        url = urlsplit(text)
        if url.netloc not in ("", "localhost"):
            raise ValueError(f"{text}: only this machine's kvfs can be opened: kvfs:///path")
        text = unquote(url.path)
    path = Path(text)
    try:
        mode = path.stat().st_mode
    except OSError as e:
        raise OSError(e.errno, f"no kvfs at {path}: {e.strerror}") from None
    if not stat.S_ISDIR(mode):
        return str(path)
    # The mount first: its files are its users', and one of them may be called kvfs.sock.
    try:
        with open(path / INFO_NAME, "rb") as info:
            found: Any = json.loads(info.read(INFO_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return str(path / SOCKET_NAME)
    except ValueError:
        raise OSError(errno.EPROTO, f"{path / INFO_NAME} is not what a kvfs mount has there") from None
    if not isinstance(found, dict) or not isinstance(found.get("socket"), str):  # pyright: ignore[reportUnknownMemberType]
        raise OSError(errno.EPROTO, f"{path / INFO_NAME} names no socket")
    return found["socket"]  # pyright: ignore[reportUnknownVariableType]


class Session:
    """Safe to use from several threads: a blocking call takes a lane of its own for as long as it lasts."""

    def __init__(self, where: str | os.PathLike[str], entries: int, timeout: float | None, lanes: int = 0) -> None:
        self.client = Client(socket_path(where))
        self.entries = entries
        self.seconds = timeout
        self.timeout: int = lib.KVFS_NO_TIMEOUT if timeout is None else int(timeout * 1e9)
        self._idle = deque(Lane(self.client, entries) for _ in range(min(lanes, MAX_LANES)))
        self._lanes = len(self._idle)
        self._waiting = 0
        self._free = threading.Condition()
        self._drivers: weakref.WeakKeyDictionary[Any, Driver] = weakref.WeakKeyDictionary()

    def take(self) -> Lane:
        self.client.check_fork()
        try:
            return self._idle.pop()
        except IndexError:
            pass
        with self._free:
            self._waiting += 1  # before the last look: who gives one back from now on notifies
            try:
                while True:
                    try:
                        return self._idle.pop()
                    except IndexError:
                        pass
                    if self._lanes < MAX_LANES:
                        self._lanes += 1
                        break
                    self._free.wait()
            finally:
                self._waiting -= 1
        try:
            return Lane(self.client, self.entries)
        except BaseException:
            self.lose()
            raise

    def give(self, lane: Lane) -> None:
        self._idle.append(lane)
        if self._waiting:
            with self._free:
                self._free.notify()

    def lose(self) -> None:
        """A lane taken is not given back: operations may still be under way on it."""
        with self._free:
            self._lanes -= 1
            self._free.notify()

    def call(
        self,
        opcode: int,
        flags: int,
        handle: int,
        keys: Sequence[bytes],
        iov: int = 0,
        at: int = 0,
        stride: int = 0,
        length: int = 0,
    ) -> list[int]:
        """One native call for a batch whose values, if it has any, lie at equal distances."""
        count = len(keys)
        if count == 0:
            return []
        check_count(count)
        blob, lens, key_length = pack(keys)
        lane = self.take()
        if count > lane.size:
            lane.grow(count)
        result: int = lib.kvfs_py_call(
            lane.ring.handle,
            lane.batch,
            lane.blocks,
            lane.statuses,
            count,
            opcode,
            flags,
            handle,
            blob,
            lens,
            key_length,
            iov,
            at,
            stride,
            length,
            self.timeout,
        )
        if result < 0:
            self.lose()
            check(result, "blocks")
        statuses: list[int] = ffi.unpack(lane.statuses, count)
        self.give(lane)
        return statuses

    def run(self, make: Maker) -> list[int]:
        lane = self.take()
        job = make(lane)
        try:
            value = self._drive(lane, job)
        except (ValueError, TypeError, BufferError):
            self.give(lane)  # refused before anything was under way
            raise
        except BaseException:
            self.lose()
            raise
        finally:
            job.close()
        self.give(lane)
        return value

    def _drive(self, lane: Lane, job: Job) -> list[int]:
        while True:
            try:
                batch = next(job)
            except StopIteration as end:
                return end.value
            if batch is not None:
                check(lib.kvfs_py_run(lane.ring.handle, batch, self.timeout), "blocks")

    def queue(self) -> Queue:
        self.client.check_fork()
        return Queue(self.client, self.entries)

    async def arun(self, make: Maker) -> list[int]:
        self.client.check_fork()
        loop = current_loop()
        driver = self._drivers.get(loop)
        if driver is None:
            driver = self._drivers[loop] = make_driver(loop, self.queue())
        try:
            return await driver.run(make, self.seconds)
        except OSError:
            if driver.queue.broken and self._drivers.get(loop) is driver:
                del self._drivers[loop]
            raise
