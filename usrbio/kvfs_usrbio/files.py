"""File: an open file of the mount, read and written over the ring.

One int per piece: bytes (short at the file's end; at most 16 MiB of memory that is not shared), or -errno: -EBADF if the
descriptor was not open for that, -EIO, -ENOSPC. A hole reads as zeros.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from kvfs_usrbio import jobs
from kvfs_usrbio._native import lib
from kvfs_usrbio.aio import Maker
from kvfs_usrbio.client import check
from kvfs_usrbio.memory import Data
from kvfs_usrbio.session import RING_ENTRIES, Session


class File:
    """Handing over the descriptor proves the right to the file; it may be closed afterwards."""

    def __init__(self, session: Session, fd: int) -> None:
        self._session = session
        self._handle = check(lib.kvfs_file_register(session.client.handle, fd), f"register descriptor {fd}")

    @classmethod
    def open(
        cls,
        where: str | os.PathLike[str],
        fd: int,
        *,
        ring_entries: int = RING_ENTRIES,
        timeout: float | None = 30.0,
    ) -> File:
        """With a connection of its own; BlockStore.file shares the store's."""
        return cls(Session(where, ring_entries, timeout), fd)

    def close(self) -> None:
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            self._session.client.check_fork()
            lib.kvfs_file_unregister(self._session.client.handle, handle)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, offsets: Sequence[int], dests: Sequence[Data]) -> list[int]:
        return self._session.run(self._make(lib.KVFS_OP_READ, offsets, dests, False))

    def write(self, offsets: Sequence[int], srcs: Sequence[Data], *, durable: bool = False) -> list[int]:
        """A read through the mount sees it once this has returned. `durable`: it would survive a loss of power; the file's
        size and name need an fsync through the mount."""
        return self._session.run(self._make(lib.KVFS_OP_WRITE, offsets, srcs, durable))

    def sync(self) -> None:
        """Data written so far, also through the mount, survives a loss of power."""
        check(self._session.run(lambda lane: jobs.file_sync(self._open()))[0], "sync")

    async def aread(self, offsets: Sequence[int], dests: Sequence[Data]) -> list[int]:
        return await self._session.arun(self._make(lib.KVFS_OP_READ, offsets, dests, False))

    async def awrite(self, offsets: Sequence[int], srcs: Sequence[Data], *, durable: bool = False) -> list[int]:
        return await self._session.arun(self._make(lib.KVFS_OP_WRITE, offsets, srcs, durable))

    def _open(self) -> int:
        if self._handle < 0:
            raise ValueError("the file is closed")
        return self._handle

    def _make(self, opcode: int, offsets: Sequence[int], values: Sequence[Data], durable: bool) -> Maker:
        handle = self._open()
        client = self._session.client
        flags = lib.KVFS_SQE_DURABLE if durable else 0
        return lambda lane: jobs.transfer(client, lane, opcode, flags, handle, None, values, offsets)
