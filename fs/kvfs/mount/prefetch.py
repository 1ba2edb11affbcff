"""Gives the node the entries of directories that are being walked name by name, before the kernel asks for them.

A lookup that Python answers costs several times one that the node answers. After a few in one directory its other entries
are left with the node (`Node.fuse_entries`), each for one use; what changes meanwhile is taken back. Entries of files with
several names are not left, and those of open ones not used.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import Final

import trio

from kvfs.meta.errors import FsError
from kvfs.meta.kv import StoreError
from kvfs.meta.schema import Inode
from kvfs.node import Node

from .ops import MountOps
from .packing import direntplus

MISSES: Final = 16
"""Lookups in one directory after which it counts as walked."""
SLICE: Final = 64
"""Entries left at once; requests are answered between them."""
DIRECTORIES: Final = 64
"""Watched at the same time."""


@dataclass(slots=True)
class Walk:
    misses: int = 0
    due: int = MISSES
    """Misses that start the next filling. 0: never, it is too large."""
    filling: bool = False


class EntryPrefetch:
    def __init__(self, ops: MountOps, node: Node) -> None:
        self._ops = ops
        self._node = node
        self._walks: dict[int, Walk] = {}
        """By directory, the one that was asked for longest ago first."""
        self._left_any = False
        self._send, self._receive = trio.open_memory_channel[int](DIRECTORIES)

    def missed(self, parent: int) -> None:
        """Python had to answer a lookup in this directory."""
        walk = self._walks.pop(parent, None) or Walk()
        self._walks[parent] = walk
        if len(self._walks) > DIRECTORIES:
            del self._walks[next(iter(self._walks))]
        walk.misses += 1
        if walk.due and walk.misses >= walk.due and not walk.filling:
            try:
                self._send.send_nowait(parent)
            except trio.WouldBlock:
                return
            walk.filling = True

    def changed(self, ino: int) -> None:
        """An inode or one of its names has changed; before that is answered."""
        if self._left_any:
            self._node.fuse_entry_changed(ino)

    async def run(self) -> None:
        async for parent in self._receive:
            walk = self._walks.get(parent)
            if walk is not None:
                await self._fill(parent, walk)

    async def _fill(self, parent: int, walk: Walk) -> None:
        cookie = count = 0
        room = True
        self._left_any = True
        try:
            while room and (page := self._ops.tree.readdir_plus(parent, cookie, SLICE)):
                cookie = page[-1][0].cookie
                count += len(page)
                entries = b"".join(direntplus(d, i) for d, i in page if _single(i))
                room = self._node.fuse_entries(parent, entries)
                await trio.lowlevel.checkpoint()
        except (FsError, StoreError):  # gone or damaged: who looks something up in it is told
            room = False
        walk.filling = False
        walk.misses = 0
        walk.due = max(MISSES, count // 4) if room else 0


def _single(inode: Inode) -> bool:
    return inode.nlink == 1 or stat.S_ISDIR(inode.mode)
