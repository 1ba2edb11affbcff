"""Replays a request trace against a BlockStore as an inference engine would: match the prefix, get the hits, put the rest.

The format is that of Mooncake's FAST'25 traces: one JSON object a line with timestamp, input_length, output_length and
hash_ids, one id per 512-token block. A block's bytes follow from its id, so every byte that comes back can be checked.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import xxhash

from kvfs_usrbio import BlockStore

MAX_LINE = 1 << 20
MAX_BLOCKS = 1 << 16  # blocks of one request
BATCH = 64


class TraceError(Exception):
    """The trace cannot be read; str() names the line and the reason."""


class Request(msgspec.Struct, frozen=True):
    """One line of the trace; fields that replay does not use are ignored."""

    hash_ids: list[int]


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds per batched call."""

    calls: int
    p50: float
    p99: float


class Report(msgspec.Struct, frozen=True):
    requests: int
    references: int  # block ids named by requests
    prefix_hits: int  # of those, found by match_prefix before anything of the request was put
    hit_rate: float
    stored: int
    refused: int  # puts that failed (no space, ...)
    vanished: int  # matched, then evicted before the get
    evictions: int  # of blocks, by the store while the trace ran
    verified_bytes: int
    wrong: int  # blocks that came back with other bytes
    seconds: float
    blocks_per_s: float
    bytes_per_s: float
    match: Latency
    get: Latency
    put: Latency


@dataclass
class _Times:
    ms: list[float] = field(default_factory=list[float])

    def add(self, begin: float) -> None:
        self.ms.append((time.perf_counter() - begin) * 1e3)

    def summary(self) -> Latency:
        ordered = sorted(self.ms)
        if not ordered:
            return Latency(0, 0.0, 0.0)
        return Latency(
            len(ordered), ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
        )


def requests(path: Path, limit: int | None = None) -> Iterator[Request]:
    """The trace's requests in order, at most `limit`."""
    decoder = msgspec.json.Decoder(Request)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and number > limit:
                return
            if len(line) > MAX_LINE:
                raise TraceError(f"{path}, line {number}: longer than {MAX_LINE} bytes")
            try:
                request = decoder.decode(line)
            except msgspec.DecodeError as e:
                raise TraceError(f"{path}, line {number}: {e}") from None
            if len(request.hash_ids) > MAX_BLOCKS:
                raise TraceError(f"{path}, line {number}: more than {MAX_BLOCKS} blocks")
            yield request


def key_of(block: int) -> bytes:
    return hashlib.sha256(b"kvfs replay %d" % block).digest()


class Content:
    """The bytes of block ids: one random page, rotated and stamped by the id, so that making them costs little."""

    def __init__(self, size: int) -> None:
        if size < 8:
            raise ValueError("a block has at least 8 bytes")
        self.size = size
        page = b"".join(xxhash.xxh3_128_digest(b"%d" % i) for i in range((size + 15) // 16 + 1))
        self._page = page[:size] * 2

    def of(self, block: int) -> bytes:
        turn = block * 8191 % self.size
        return block.to_bytes(8, "little") + self._page[turn + 8 : turn + self.size]


def replay(
    store: BlockStore,
    path: Path,
    *,
    block_bytes: int,
    limit: int | None = None,
    verify: bool = True,
    progress: Callable[[int], None] = lambda _: None,
    evictions: Callable[[], int] = lambda: 0,
) -> Report:
    """Runs the trace once. `progress` gets 1 after each request; `evictions` counts the store's, since it was opened."""
    content = Content(block_bytes)
    step = max(1, min(BATCH, (64 << 20) // block_bytes))
    room = store.alloc(block_bytes * step)
    views = [room[i * block_bytes : (i + 1) * block_bytes] for i in range(step)]
    match, get, put = _Times(), _Times(), _Times()
    count = references = hits = stored = refused = vanished = wrong = moved = 0
    evicted = evictions()
    begin = time.perf_counter()
    for request in requests(path, limit):
        ids = request.hash_ids
        keys = [key_of(i) for i in ids]
        at = time.perf_counter()
        found = store.match_prefix(keys) if keys else 0
        match.add(at)
        for first in range(0, found, step):
            part = ids[first : min(first + step, found)]
            at = time.perf_counter()
            results = store.get(keys[first : first + len(part)], views[: len(part)])
            get.add(at)
            for block, result, view in zip(part, results, views, strict=False):
                if result < 0:
                    vanished += 1
                    continue
                moved += result
                if verify and (result != block_bytes or view != memoryview(content.of(block))):
                    wrong += 1
        for first in range(found, len(ids), step):
            part = ids[first : first + step]
            for block, view in zip(part, views, strict=False):
                view[:] = content.of(block)
            at = time.perf_counter()
            results = store.put(keys[first : first + len(part)], views[: len(part)])
            put.add(at)
            stored += sum(r == 1 for r in results)
            refused += sum(r < 0 for r in results)
            moved += block_bytes * sum(r == 1 for r in results)
        count += 1
        references += len(ids)
        hits += found
        progress(1)
    seconds = time.perf_counter() - begin
    return Report(
        requests=count,
        references=references,
        prefix_hits=hits,
        hit_rate=hits / references if references else 0.0,
        stored=stored,
        refused=refused,
        vanished=vanished,
        evictions=evictions() - evicted,
        verified_bytes=(hits - vanished) * block_bytes if verify else 0,
        wrong=wrong,
        seconds=seconds,
        blocks_per_s=(hits + stored) / seconds if seconds else 0.0,
        bytes_per_s=moved / seconds if seconds else 0.0,
        match=match.summary(),
        get=get.summary(),
        put=put.summary(),
    )
