# pyright: basic, reportMissingImports=false
"""Requests that share prefixes, in random order and from two threads, through SGLang's host pool and KvfsHiCache:

    python sglang_random.py WHERE LAYOUT REQUESTS

What a page holds follows from its key, so that each page that is loaded is compared with what computing it anew would give.
Prints "half" after half of the requests, and then waits for a line on standard input; at the end one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from prefixes import chain

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engines"))
from sglang_pool import backend_of, host_pool

PAGE_SIZE = 16
PAGES = 24  # of the longest request
THREADS = 2


def computed(key: str, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(key[:12], 16))
    return torch.randint(-30000, 30000, like.shape, dtype=torch.int16, generator=generator)


class Requests(threading.Thread):
    """Owns a part of the pool."""

    def __init__(self, number: int, pool: Any, backend: Any, count: int, half: threading.Barrier) -> None:
        super().__init__(daemon=True)
        self.rng = random.Random(number)
        self.pool, self.backend, self.count, self.half = pool, backend, count, half
        self.pages = list(range(number * PAGES, (number + 1) * PAGES))
        self.loaded = self.stored = self.wrong = 0

    def page(self, number: int) -> torch.Tensor:
        """In all layouts the tokens of a page, seen through SGLang's own eyes."""
        return self.pool.get_data_page(number * PAGE_SIZE, flat=True).contiguous().view(torch.int16)

    def run(self) -> None:
        for number in range(self.count):
            if number == self.count // 2:
                self.half.wait()
                self.half.wait()
            keys = [name.hex() for name in chain(self.rng, PAGES)]
            self.rng.shuffle(self.pages)
            there = self.backend.batch_exists(keys)
            assert 0 <= there <= len(keys)
            found = self.backend.batch_get_v1(keys[:there], self.indices(0, there)) if there else []
            assert len(found) == there
            good = found.index(False) if False in found else there
            for i in range(good):
                page = self.page(self.pages[i])
                self.wrong += not torch.equal(page, computed(keys[i], page))
            self.loaded += good
            for i in range(good, len(keys)):
                page = self.page(self.pages[i])
                flat = computed(keys[i], page).view(self.pool.dtype)
                self.pool.set_from_flat_data_page(self.pages[i] * PAGE_SIZE, flat)
            if good < len(keys):
                done = self.backend.batch_set_v1(keys[good:], self.indices(good, len(keys)))
                self.stored += done.count(True)

    def indices(self, start: int, end: int) -> torch.Tensor:
        firsts = torch.tensor(self.pages[start:end]) * PAGE_SIZE
        return (firsts[:, None] + torch.arange(PAGE_SIZE)).flatten()


def main() -> None:
    where, layout, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    pool = host_pool(layout, THREADS * PAGES * PAGE_SIZE, PAGE_SIZE, "shm")
    backend = backend_of("kvfs", pool, "mha", where)
    half = threading.Barrier(THREADS + 1)
    threads = [Requests(i, pool, backend, count // THREADS, half) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    half.wait(120)
    before = sum(thread.loaded for thread in threads)
    print("half", flush=True)
    sys.stdin.readline()
    half.wait(120)
    for thread in threads:
        thread.join(300)
    report = {
        "ended": not any(thread.is_alive() for thread in threads),
        "loaded": before,
        "loaded_later": sum(thread.loaded for thread in threads) - before,
        "stored": sum(thread.stored for thread in threads),
        "wrong": sum(thread.wrong for thread in threads),
    }
    print(json.dumps(report), flush=True)
    os._exit(0)  # SGLang's exit handlers would close its memory under tensors that still use it


if __name__ == "__main__":
    main()
