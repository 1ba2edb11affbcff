"""KvfsL2: the second level of LMCache's multiprocess server on kvfs.

    --l2-adapter '{"type": "native_plugin", "module_path": "kvfs_usrbio.connectors.lmcache_l2", "class_name": "KvfsL2",
      "adapter_params": {"kvfs": "/mnt/kvfs"}}'

The server's first level is shared memory (--shm-name, its default), so that objects move to and from kvfs without a copy.
Nothing of LMCache is imported.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Final

from kvfs_usrbio.connectors.lossy import Keys, LossyStore
from kvfs_usrbio.connectors.values import Values
from kvfs_usrbio.connectors.workers import Workers

FORMAT: Final = "lmcache-l2-1"
NAMESPACE: Final = "lmcache"
WORKERS: Final = 4
QUESTIONERS: Final = 2  # threads of their own for lookups: transfers may wait for a kvfs that hangs
MAX_PENDING: Final = 4096  # batches not yet answered; more fail at once

Completion = tuple[int, bool, str, list[bool]]

logger: Final = logging.getLogger(__name__)


class KvfsL2:
    """`version` sets apart what must not be mixed although LMCache's keys, which name a model, a rank and a hash of tokens, are
    alike: other weights, another type of the KV, another version of the engine. Nothing of these is said to an adapter."""

    def __init__(self, kvfs: str, namespace: str | None = None, version: str = "", workers: int = WORKERS) -> None:
        self._store = LossyStore(kvfs, namespace, NAMESPACE)
        self._values = Values(self._store, Keys({"format": FORMAT, "version": version}))
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._movers = Workers(workers, "kvfs-l2")
        self._questioners = Workers(QUESTIONERS, "kvfs-l2-ask")
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._pending = 0
        self._closed = False
        self._done: list[Completion] = []

    def event_fd(self) -> int:
        return self._fd

    def submit_batch_set(self, keys: Sequence[str], memoryviews: Sequence[memoryview]) -> int:
        return self._submit(len(keys), lambda: self._values.put(_names(keys), memoryviews))

    def submit_batch_get(self, keys: Sequence[str], memoryviews: Sequence[memoryview]) -> int:
        return self._submit(len(keys), lambda: self._values.get(_names(keys), memoryviews))

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        return self._submit(len(keys), lambda: self._values.exists(_names(keys)), question=True)

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        return self._submit(len(keys), lambda: self._values.evict(_names(keys)))

    def drain_completions(self) -> list[Completion]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        with self._lock:
            done, self._done = self._done, []
            self._pending -= len(done)
        return done

    def close(self) -> None:
        """Waits at most some seconds for what is under way. A transfer that hangs with kvfs goes on until that does or this
        process ends, and is never reported as ended, so that its memory is not used for something else."""
        self._questioners.close()
        moved = self._movers.close()
        self._store.close()
        with self._lock:
            self._closed = True
            os.close(self._fd)
        if not moved:
            logger.warning("kvfs does not answer: transfers under way are left to themselves")

    def _submit(self, count: int, call: Callable[[], list[bool]], question: bool = False) -> int:
        """`question`: "no" is an answer too, not a failure."""
        number = next(self._ids)
        with self._lock:
            self._pending += 1
            full = self._pending > MAX_PENDING
        if full:
            self._finish(number, False, "too much is under way", [False] * count)
        else:
            workers = self._questioners if question else self._movers
            workers.submit(lambda: self._run(number, count, call, question))
        return number

    def _run(self, number: int, count: int, call: Callable[[], list[bool]], question: bool) -> None:
        try:
            each = call()
            self._finish(number, question or all(each), "", each)
        except Exception as error:  # an answer that never comes would hold up LMCache
            logger.exception("kvfs: batch %d", number)
            self._finish(number, False, repr(error), [False] * count)

    def _finish(self, number: int, ok: bool, error: str, each: list[bool]) -> None:
        with self._lock:
            if not self._closed:
                self._done.append((number, ok, error, each))
                os.eventfd_write(self._fd, 1)


def _names(keys: Sequence[str]) -> list[bytes]:
    return [key.encode() for key in keys]
