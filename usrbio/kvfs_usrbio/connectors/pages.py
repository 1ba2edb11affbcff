# pyright: basic, reportMissingImports=false
"""PagePool: pages of one of SGLang's host pools as blocks of kvfs.

A page lies in the pool in one or several pieces. Large pieces are blocks by themselves and move in place, both ways. Many
small ones, as where each layer's tokens lie together, are gathered into few blocks, which costs a copy; they are read in
place all the same, each piece from its part of the block.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from kvfs_usrbio._native import ffi
from kvfs_usrbio.connectors.lossy import Keys, LossyStore
from kvfs_usrbio.memory import Data

BLOCK_MAX: Final = 16 << 20  # bytes of one value of kvfs
LARGE_PIECE: Final = 1 << 20
FEW_PIECES: Final = 4
STAGING_BYTES: Final = 64 << 20
ALIGN: Final = 4096

Piece = tuple[int, int]  # address, bytes


@dataclass(frozen=True, slots=True)
class Part:
    """`size` bytes from byte `start` of piece number `piece`, which lie at byte `at` of block number `block`."""

    piece: int
    start: int
    size: int
    block: int
    at: int


def plan(sizes: Sequence[int]) -> list[Part]:
    """Which block of a page each piece goes to. Says the same for each page and process: it is what is stored."""
    in_place = len(sizes) <= FEW_PIECES or min(sizes) >= LARGE_PIECE
    parts: list[Part] = []
    block, at = 0, 0
    for piece, size in enumerate(sizes):
        for start in range(0, size, BLOCK_MAX):
            length = min(BLOCK_MAX, size - start)
            if parts and (in_place or at + length > BLOCK_MAX):
                block, at = block + 1, 0
            parts.append(Part(piece, start, length, block, at))
            at += length
    return parts


class Gatherer:
    """Memory that is shared with kvfs, in which blocks are put together. One caller at a time."""

    def __init__(self, store: LossyStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._memory: mmap.mmap | None = None
        self._address = 0

    def put(self, keys: Sequence[bytes], blocks: Sequence[Sequence[Piece]]) -> list[int]:
        """As BlockStore.put, of blocks in pieces."""
        with self._lock:
            memory = self._memory or self._make()
            done: list[int] = []
            views: list[memoryview] = []
            used = 0
            for pieces in blocks:
                size = sum(length for _, length in pieces)
                if used + size > STAGING_BYTES:
                    done += self._store.put(keys[len(done) : len(done) + len(views)], views)
                    views, used = [], 0
                at = self._address + used
                for address, length in pieces:
                    ctypes.memmove(at, address, length)
                    at += length
                views.append(memoryview(memory)[used : used + size])
                used += (size + ALIGN - 1) // ALIGN * ALIGN
            return done + self._store.put(keys[len(done) :], views)

    def _make(self) -> mmap.mmap:
        fd = os.memfd_create("kvfs-gather")
        try:
            os.ftruncate(fd, STAGING_BYTES)
            self._memory = memory = mmap.mmap(fd, STAGING_BYTES)
            self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            self._store.share(memory)
        finally:
            os.close(fd)
        return memory


class PagePool:
    """`keys_for` makes the keys from what is particular to the pool."""

    def __init__(
        self, pool: Any, keys_for: Callable[[Mapping[str, object]], Keys], store: LossyStore, gatherer: Gatherer
    ) -> None:
        self._pool = pool
        self._store = store
        self._gatherer = gatherer
        self.page_size = int(getattr(pool, "page_size", 1) or 1)
        sizes = self._sizes()
        self.page_bytes = sum(sizes)
        self._parts = plan(sizes)
        self._blocks = [0] * (self._parts[-1].block + 1)
        for part in self._parts:
            self._blocks[part.block] += part.size
        self._gathered = len(self._blocks) < len(self._parts)
        self.keys = keys_for(
            {
                "pool class": type(pool).__name__,
                "layout": getattr(pool, "layout", None),
                "tag": getattr(pool, "storage_format_tag", None),
                "type": str(getattr(pool, "dtype", None)),  # of fp8 both kinds are uint8: the engine's arguments tell
                "tokens": self.page_size,
                "pieces": sizes,
            }
        )

    def match_prefix(self, keys: Sequence[str]) -> int:
        return self._store.match_prefix(self._names(keys)) // len(self._blocks)

    def exists(self, keys: Sequence[str]) -> list[bool]:
        found, each = self._store.exists(self._names(keys)), len(self._blocks)
        return [found[i : i + each] == self._blocks for i in range(0, len(found), each)]

    def get(self, keys: Sequence[str], indices: torch.Tensor) -> list[bool]:
        """Into the pages at `indices`, of which each has page_size; for each key whether its page is all there."""
        if self._flat:
            return self._get_flat(keys, indices)
        names: list[bytes] = []
        dests: list[Data] = []
        offsets: list[int] = []
        for key, pieces in zip(keys, self._pages(indices), strict=True):
            blocks = self._names([key])
            for part in self._parts:
                names.append(blocks[part.block])
                dests.append(_memory(pieces[part.piece][0] + part.start, part.size))
                offsets.append(part.at)
        return self._whole(self._store.get(names, dests, offsets))

    def put(self, keys: Sequence[str], indices: torch.Tensor) -> list[bool]:
        """For each key whether its page is stored now."""
        names = self._names(keys)
        each = len(self._blocks)
        kept = self._flat_pages(indices) if self._flat else []
        pages = [[_piece(page)] for page in kept] if self._flat else self._pages(indices)
        blocks: list[list[Piece]] = []
        for pieces in pages:
            page: list[list[Piece]] = [[] for _ in self._blocks]
            for part in self._parts:
                page[part.block].append((pieces[part.piece][0] + part.start, part.size))
            blocks += page
        if self._gathered:
            return self._put_gathered(names, blocks)
        done = self._store.put(names, [_memory(*block[0]) for block in blocks])
        return [min(done[i : i + each]) >= 0 for i in range(0, len(done), each)]

    def _put_gathered(self, names: Sequence[bytes], blocks: Sequence[Sequence[Piece]]) -> list[bool]:
        each = len(self._blocks)
        there = [size > 0 for size in self._store.exists(names)]  # what is there needs no gathering
        new = [i for i, found in enumerate(there) if not found]
        for i, status in zip(new, self._gatherer.put([names[i] for i in new], [blocks[i] for i in new]), strict=True):
            there[i] = status >= 0
        return [all(there[i : i + each]) for i in range(0, len(there), each)]

    # -- inside

    def _names(self, keys: Sequence[str]) -> list[bytes]:
        of, blocks = self.keys.of, range(len(self._blocks))
        return [of(name, block) for name in [key.encode() for key in keys] for block in blocks]

    def _whole(self, found: Sequence[int]) -> list[bool]:
        wanted = [part.size for part in self._parts]
        each = len(wanted)
        return [list(found[i : i + each]) == wanted for i in range(0, len(found), each)]

    def _pages(self, indices: torch.Tensor) -> list[list[Piece]]:
        """The pieces of each page, in SGLang's order."""
        addresses, sizes = self._pool.get_page_buffer_meta(indices)
        each = len(addresses) * self.page_size // max(1, indices.numel())
        pieces: list[Piece] = list(zip(addresses, sizes, strict=True))
        return [pieces[i : i + each] for i in range(0, len(pieces), each)]

    def _sizes(self) -> list[int]:
        """Of a page's pieces. Some pools, or some of their layouts, only hand out pages as tensors."""
        self._flat = False
        try:
            return [size for _, size in self._pages(torch.arange(self.page_size))[0]]
        except (NotImplementedError, ValueError, AttributeError):
            self._flat = True
            return [_piece(self._pool.get_dummy_flat_data_page())[1]]

    def _flat_pages(self, indices: torch.Tensor) -> list[torch.Tensor]:
        firsts = indices[:: self.page_size].tolist()
        return [self._pool.get_data_page(first, flat=True).contiguous() for first in firsts]

    def _get_flat(self, keys: Sequence[str], indices: torch.Tensor) -> list[bool]:
        pages = [self._pool.get_dummy_flat_data_page() for _ in keys]
        names: list[bytes] = []
        dests: list[Data] = []
        for key, page in zip(keys, pages, strict=True):
            address, _ = _piece(page)
            names += self._names([key])
            dests += [_memory(address + part.start, part.size) for part in self._parts]
        there = self._whole(self._store.get(names, dests))
        for first, page, found in zip(indices[:: self.page_size].tolist(), pages, there, strict=True):
            if found:
                self._pool.set_from_flat_data_page(first, page)
        return there


def _piece(tensor: torch.Tensor) -> Piece:
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def _memory(address: int, size: int) -> Data:
    return ffi.buffer(ffi.cast("char*", address), size)
