"""Values: byte strings of any size under names, as LMCache stores them, in blocks of kvfs.

What is longer than a block of kvfs takes several; the first is stored last, and is what says that a value is there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from kvfs_usrbio._native import ffi
from kvfs_usrbio.connectors.keys import PART_MAX
from kvfs_usrbio.connectors.lossy import Keys, LossyStore
from kvfs_usrbio.memory import Data, memory_of

MAX_MAPPINGS: Final = 64  # that are shared with kvfs; what lies in others is copied


class Values:
    """Safe to use from several threads."""

    def __init__(self, store: LossyStore, keys: Keys) -> None:
        self._store = store
        self._keys = keys
        self._lock = threading.Lock()
        self._seen: list[tuple[int, int]] = []  # mappings, whether they can be shared or not

    def exists(self, names: Sequence[bytes]) -> list[bool]:
        return [size > 0 for size in self._store.exists([self._keys.of(name) for name in names])]

    def match_prefix(self, names: Sequence[bytes]) -> int:
        return self._store.match_prefix([self._keys.of(name) for name in names])

    def get(self, names: Sequence[bytes], dests: Sequence[memoryview]) -> list[bool]:
        """For each whether it is there, has that length, and is in `dests` now."""
        keys: list[bytes] = []
        parts: list[Data] = []
        owner: list[int] = []
        for i, (name, dest) in enumerate(zip(names, dests, strict=True)):
            for part, piece in enumerate(self._pieces(dest)):
                keys.append(self._keys.of(name, part))
                parts.append(piece)
                owner.append(i)
        good = [True] * len(names)
        for i, piece, status in zip(owner, parts, self._store.get(keys, parts), strict=True):
            good[i] &= status == len(piece)
        # The block may be longer than what was read of it.
        lengths = self._store.exists([self._keys.of(name) for name in names])
        return [ok and length == min(len(d), PART_MAX) for ok, length, d in zip(good, lengths, dests, strict=True)]

    def put(self, names: Sequence[bytes], srcs: Sequence[memoryview]) -> list[bool]:
        """For each whether it is stored now, or was there with that length."""
        pieces = [self._pieces(src) for src in srcs]
        good = [bool(found) for found in pieces]
        for first in (False, True):
            todo = [
                (i, part, piece)
                for i, found in enumerate(pieces)
                for part, piece in enumerate(found)
                if good[i] and (part == 0) == first
            ]
            done = self._store.put([self._keys.of(names[i], part) for i, part, _ in todo], [p for _, _, p in todo])
            for (i, _, _), status in zip(todo, done, strict=True):
                good[i] &= status >= 0
        return good

    def evict(self, names: Sequence[bytes]) -> list[bool]:
        """What follows the first block is left to kvfs to evict."""
        return [status >= 0 for status in self._store.evict([self._keys.of(name) for name in names])]

    # -- inside

    def _pieces(self, view: memoryview) -> list[memoryview]:
        whole = view.cast("B") if view.format != "B" or view.ndim != 1 else view
        self._share(whole)
        return [whole[at : at + PART_MAX] for at in range(0, len(whole), PART_MAX)]

    def _share(self, view: memoryview) -> None:
        """The mapping in which it lies, if that is shared memory and was not seen before."""
        if not view or view.readonly:
            return
        memory = memory_of(view, writable=True)
        address = memory.address
        memory.release()
        with self._lock:
            if any(start <= address < end for start, end in self._seen) or len(self._seen) >= MAX_MAPPINGS:
                return
            start, end, shared = _mapping(address)
            self._seen.append((start, end))
        if shared:
            self._store.share(ffi.buffer(ffi.cast("char*", start), end - start))


def _mapping(address: int) -> tuple[int, int, bool]:
    """The mapping of this process in which the address lies; whether it is shared and writable."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            area, rights = line.split(maxsplit=2)[:2]
            start, end = (int(bound, 16) for bound in area.split("-"))
            if start <= address < end:
                return start, end, rights.startswith("rw") and rights.endswith("s")
    raise ValueError(f"no memory at {address:#x}")
