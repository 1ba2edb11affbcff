"""Open regular files: their sizes and times in memory, written to the tree on close, fsync and once a second, and
their data removed when the last name and the last opener are gone.

The tree's changes reach the store in groups (`store_groups`). Data is removed only after the change that allows it has
been stored: a crash in between must not bring back a name or a size without the data.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import pyfuse3
import trio
import trio.to_thread

from kvfs.dataplane import DataPlane
from kvfs.meta.errors import FsError
from kvfs.meta.schema import Inode
from kvfs.meta.tree import Tree
from kvfs.node import Node

from .attrs import log

PERSIST_S: Final = 1.0
FILE_CHUNK: Final = 64 << 10
"""Bytes of a file in one chunk of the store (native: kFileChunk)."""
STORE_S: Final = 0.02
"""After a change of the tree, at most about this long until a kill of the daemon no longer loses it."""
RECLAIM_QUEUE: Final = 1024
"""Removed files whose data waits to be dropped; beyond that an unlink waits."""
RECLAIM_BATCH: Final = 256

DROPPERS: Final = 8
"""Threads that wait for the kernel to forget pages."""


@dataclass(slots=True)
class OpenFile:
    ino: int
    stored_size: int
    """The size in the tree."""
    users: int = 0
    written_ns: int = 0
    """When data was last written, taken from the data plane and not yet in the tree; 0: nothing is taken."""
    resizing: int = 0
    no_capability: bool = False
    """It has no security.capability, for which the kernel asks before each write."""
    orphan: bool = False


class OpenFiles:
    def __init__(self, tree: Tree, data: DataPlane, node: Node | None = None) -> None:
        """`node` serves the mount; None: pyfuse3 does, alone."""
        self.tree = tree
        self.data = data
        self._invalidate: Callable[[int], None] = node.fuse_invalidate if node else pyfuse3.invalidate_inode
        self._open: dict[int, OpenFile] = {}
        self._lingering: dict[int, OpenFile] = {}
        """Closed here, but its bytes are on their way to the store, or a client's file handle holds it."""
        self._syncing = trio.Lock()
        self._synced = -1
        self._droppers = trio.CapacityLimiter(DROPPERS)
        self._unstored = trio.Event()
        tree.store.on_pending = lambda: self._unstored.set()
        self._send, self._receive = trio.open_memory_channel[tuple[int, int]](RECLAIM_QUEUE)

    def acquire(self, inode: Inode) -> OpenFile:
        file = self._open.get(inode.ino)
        if file is None:
            file = self._lingering.pop(inode.ino, None)
            if file is None:
                if inode.nlink == 0:
                    raise FsError(errno.ENOENT)
                self.data.inode_open(inode.ino, inode.size)
                self.data.inode_show(inode.ino)  # the kernel may have attributes and pages from before
                file = OpenFile(inode.ino, inode.size)
            self._open[inode.ino] = file
        file.users += 1
        return file

    def release(self, file: OpenFile) -> Awaitable[None] | None:
        """Returns what must be awaited, if anything."""
        file.users -= 1
        if file.users:
            return None
        del self._open[file.ino]
        return self._let_go(file)

    def _let_go(self, file: OpenFile) -> Awaitable[None] | None:
        """Nobody has it open here. A client's handle may hold it; none can come that does not."""
        self._lingering[file.ino] = file
        if file.orphan or self.data.inode_landed(file.ino):
            return self._forget(file)
        self._unstored.set()  # its bytes are on their way to the store; many such files end together
        return None

    def _forget(self, file: OpenFile) -> Awaitable[None] | None:
        if self._lingering.get(file.ino) is not file:
            return None  # opened again meanwhile, or gone
        if self.data.inode_refs(file.ino) > 1:
            self.persist(file)
            return None
        del self._lingering[file.ino]
        try:
            if not file.orphan:
                self.persist(file)
        finally:
            size = self.data.inode_size(file.ino)
            self.data.inode_close(file.ino)
            later = self._drop_data(file.ino, size) if file.orphan else None
        return later

    def _drop_data(self, ino: int, size: int) -> Awaitable[None] | None:
        if self.data.space_short():  # who removed it may want its space at once
            return self._reclaim([(ino, size)])
        try:
            self._send.send_nowait((ino, size))
        except trio.WouldBlock:
            return self._send.send((ino, size))
        return None

    def held(self, ino: int) -> OpenFile | None:
        """Open here or through a client's handle."""
        return self._open.get(ino) or self._lingering.get(ino)

    def any_held(self) -> bool:
        return bool(self._open or self._lingering)

    def set_no_capability(self, file: OpenFile, on: bool) -> None:
        if file.no_capability != on:
            file.no_capability = on
            with contextlib.suppress(FileNotFoundError):  # a client's handle held it, and is gone
                self.data.inode_no_capability(file.ino, on)

    def overlay(self, inode: Inode) -> Inode:
        """The record with what only memory knows, for the kernel."""
        file = self.held(inode.ino)
        if file is not None:
            now = self.data.inode_show(file.ino)
            if not file.resizing:
                inode.size = now.size
            written_ns = now.written_ns or file.written_ns
            if written_ns:
                inode.mtime = inode.ctime = written_ns
        return inode

    def persist(self, file: OpenFile) -> None:
        """Brings size and times in the tree up to date; a process crash after it loses neither.

        The size only as far as the bytes are in the store (`DataPlane.land`), so that no crash leaves zeros for them.
        """
        if file.resizing:
            return
        now = self.data.inode_take(file.ino)
        file.written_ns = now.written_ns or file.written_ns
        grown = now.size > file.stored_size
        if file.written_ns:
            self.tree.setattr(file.ino, size=now.size if grown else None, mtime=file.written_ns)
            file.written_ns = 0
        elif grown:  # the time was stored before
            self.tree.grow(file.ino, now.size)
        if grown:
            file.stored_size = now.size

    async def resize(self, inode: Inode, size: int) -> None:
        """Sets the size: the tree first (it notes what must go), then the data, then the note is removed."""
        file = self.acquire(inode)
        try:
            self.persist(file)
            old = self.data.inode_size(file.ino)
            file.resizing += 1
            try:
                self.tree.setattr(file.ino, size=size)
                file.stored_size = size
                if size < old:
                    self.tree.flush()
                await self.data.truncate(file.ino, size)
                if size < old:
                    self.tree.trimmed(file.ino)
            finally:
                file.resizing -= 1
        finally:
            later = self.release(file)
            if later is not None:
                await later

    async def fsync(self, file: OpenFile, datasync: bool) -> None:
        await self.data.fsync(file.ino)
        if not datasync or self.data.inode_size(file.ino) > file.stored_size:
            self.persist(file)
        await self.sync()

    async def sync(self) -> None:
        """Every change of the tree so far becomes durable: one flush for all that wait, none if there is nothing new."""
        wanted = self.tree.changes
        async with self._syncing:
            if self._synced >= wanted:
                return
            flushed = self.tree.changes
            self.tree.flush()
            await trio.to_thread.run_sync(self.tree.sync)
            self._synced = flushed

    async def drop_cached(self, ino: int) -> None:
        """A client has written to it: the kernel forgets its pages and attributes. May wait for reads under way."""
        with contextlib.suppress(FileNotFoundError):  # the kernel does not know it
            await trio.to_thread.run_sync(self._invalidate, ino, limiter=self._droppers)

    async def store(self, ino: int) -> None:
        """A client's fsync: what it has written is durable, now its size."""
        file = self.held(ino)
        if file is not None:
            self.persist(file)
        await self.sync()

    def removed(self, inode: Inode) -> Awaitable[None] | None:
        """Its last name is gone: the data goes now, or when the last opener has closed it. Returns what must be awaited,
        if anything."""
        file = self.held(inode.ino)
        if file is None:
            return self._drop_data(inode.ino, inode.size)
        file.orphan = True
        return None

    # -- background

    async def persist_periodically(self) -> None:
        while True:
            await trio.sleep(PERSIST_S)
            for file in list(self._open.values()):
                try:
                    self.persist(file)
                except Exception:
                    log.exception("size not stored, will try again", ino=file.ino)
                await trio.lowlevel.checkpoint()
            for file in list(self._lingering.values()):
                if file.ino in self._lingering:
                    try:
                        later = self._let_go(file)
                        if later is not None:
                            await later
                    except Exception:
                        log.exception("size not stored", ino=file.ino)

    async def store_groups(self) -> None:
        """Stores what has changed in the tree, soon after the first change."""
        while True:
            await self._unstored.wait()
            await trio.sleep(STORE_S)
            self._unstored = trio.Event()
            try:
                await self._end_landed()
                self.tree.flush()
            except Exception:
                log.exception("changes not stored, will try again")
                self._unstored.set()
                await trio.sleep(PERSIST_S)

    async def _end_landed(self) -> None:
        """Forgets closed files whose bytes have reached the store; looks again soon for the others."""
        for file in list(self._lingering.values()):
            if self._lingering.get(file.ino) is not file or self.data.inode_refs(file.ino) > 1:
                continue
            if self.data.inode_landed(file.ino):
                later = self._forget(file)
                if later is not None:
                    await later
            else:
                self._unstored.set()

    async def reclaim_removed(self) -> None:
        """Many together: each batch waits for a store of the tree."""
        async for first in self._receive:
            batch = [first]
            if self._receive.statistics().current_buffer_used < RECLAIM_BATCH:
                await trio.sleep(STORE_S)
            with contextlib.suppress(trio.WouldBlock):
                while len(batch) < RECLAIM_BATCH:
                    batch.append(self._receive.receive_nowait())
            await self._reclaim(batch)

    async def _reclaim(self, batch: list[tuple[int, int]]) -> None:
        try:
            self.tree.flush()
            await self.data.delete_many(batch)
            self.tree.reclaim_many([ino for ino, _ in batch])
        except Exception:
            log.exception(
                "removed files' data not dropped; the next mount does it", first=batch[0][0], files=len(batch)
            )

    async def recover(self) -> None:
        """Finishes truncations and removals that a crash or an unmount interrupted. Before anything is served."""
        while trims := self.tree.trims():
            for ino, trim in trims:
                self.data.inode_open(ino, trim.upto)
                try:
                    await self.data.truncate(ino, trim.keep)
                finally:
                    self.data.inode_close(ino)
                self.tree.trimmed(ino)
        await self._drop_unknown()
        after = 0
        while orphans := self.tree.orphans(after):
            for ino, _ in orphans:
                after = ino
                size = self._size(ino)
                if size is not None:
                    await self.data.delete(ino, size)
                    self.tree.reclaim(ino)

    def _size(self, ino: int) -> int | None:
        """The stored size; None if there is no such inode."""
        try:
            return self.tree.getattr(ino).size
        except FsError as e:
            if e.errno != errno.ENOENT:
                raise
            return None

    async def _drop_unknown(self) -> None:
        """Data beyond the stored size, or of no file: written before a crash that the size did not survive.

        It would come to light in the hole when the file grows again.
        """
        ends: dict[int, int] = {}
        async for ino, number, length in self.data.file_scan():
            ends[ino] = max(ends.get(ino, 0), number * FILE_CHUNK + length)
        for ino, end in ends.items():
            size = self._size(ino)
            if size is None:
                await self.data.delete(ino, end)
            elif end > size:
                self.data.inode_open(ino, end)
                try:
                    await self.data.truncate(ino, size)
                finally:
                    self.data.inode_close(ino)

    async def settle(self) -> None:
        """Before the end: every byte written is in the store, then every size in the tree."""
        try:
            await self.data.sync()
        except OSError:
            log.exception("not everything that was written could be stored")
        for file in [*self._open.values(), *self._lingering.values()]:
            try:
                self.persist(file)
            except Exception:
                log.exception("size not stored", ino=file.ino)
