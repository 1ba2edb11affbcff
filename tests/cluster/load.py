"""Callers of chunk servers that fail: what they were promised is remembered, and asked for when the servers are back."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from kvfs_usrbio import BlockStore

SLACK = 4.0  # a busy machine's
ALLOWED = {-errno.ETIMEDOUT, -errno.EREMOTEIO}
"""What a server that does not answer, or is not there, may give."""


class Load(threading.Thread):
    """Puts durable blocks, a batch after another, and remembers which were acknowledged."""

    def __init__(self, store: BlockStore, sizes: tuple[int, ...], pause: float) -> None:
        super().__init__()
        self.store = store
        self.sizes = sizes
        self.pause = pause
        self.acknowledged: list[tuple[bytes, bytes]] = []
        self.errors: set[int] = set()
        self.longest = 0.0
        self.enough = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.enough.wait(self.pause):
                keys = [os.urandom(32) for _ in self.sizes]
                values = [os.urandom(size) for size in self.sizes]
                begin = time.monotonic()
                results = self.store.put(keys, values, durable=True)
                self.longest = max(self.longest, time.monotonic() - begin)
                for key, value, result in zip(keys, values, results, strict=True):
                    if result in (0, 1):  # 0: asked for again, and what the first request had stored was there
                        self.acknowledged.append((key, value))
                    else:
                        self.errors.add(result)
        except BaseException as e:
            self.failure = e

    def end(self) -> None:
        self.enough.set()
        self.join(30)
        assert not self.is_alive()
        if self.failure is not None:
            raise self.failure


@contextmanager
def loaded(store: BlockStore, sizes: tuple[int, ...] = (8192,) * 8, pause: float = 0.0) -> Generator[Load]:
    """`pause`: seconds between batches."""
    load = Load(store, sizes, pause)
    load.start()
    try:
        yield load
    finally:
        load.end()


def check(store: BlockStore, load: Load) -> None:
    assert load.acknowledged
    for key, value in load.acknowledged:
        into = bytearray(len(value))
        assert store.get([key], [into]) == [len(value)]
        assert into == value
