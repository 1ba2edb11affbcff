"""Queue: submit and poll. Operations of one ring under way together, and a descriptor to wait on."""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from kvfs_usrbio._native import ffi, lib
from kvfs_usrbio.client import Client, check
from kvfs_usrbio.jobs import Job, Lane

MAX_OPERATIONS: Final = 4096  # under way or waiting in one Queue; more is BlockingIOError


class Operation:
    """One submitted call. The buffers it was given are held until it has ended."""

    __slots__ = ("_error", "_job", "_value", "callback", "done")

    def __init__(self, job: Job) -> None:
        self.done = False
        self.callback: Callable[[Operation], None] | None = None
        self._job: Job | None = job
        self._value: list[int] = []
        self._error: BaseException | None = None

    def result(self) -> list[int]:
        """What the blocking call would return, or raise. BlockingIOError: it has not ended."""
        if not self.done:
            raise BlockingIOError(errno.EAGAIN, "the operation has not ended")
        if self._error is not None:
            raise self._error
        return self._value

    def step(self) -> Any:
        """The next batch to run, or None for staging; StopIteration's kin set `done` and return no batch."""
        assert self._job is not None
        try:
            return next(self._job)
        except StopIteration as end:
            self.end(end.value, None)
        except Exception as error:
            self.end([], error)
        return None

    def end(self, value: list[int], error: BaseException | None) -> None:
        self._value, self._error, self.done = value, error, True
        if self._job is not None and error is not None:
            self._job.close()
        self._job = None


class Queue:
    """Safe to use from several threads; each call holds a lock, also `wait` while it waits."""

    def __init__(self, client: Client, entries: int) -> None:
        self._lane = Lane(client, entries)
        self._client = client
        self._fd: int = check(lib.kvfs_ring_event_fd(self._lane.ring.handle), "make a ring's descriptor")
        self._lock = threading.RLock()
        self._running: dict[int, tuple[Operation, Any]] = {}  # by tag: what is under way, and its native batch
        self._backlog: deque[tuple[Operation, Any]] = deque()  # the ring has no slot for these yet
        self._staging_owner: Operation | None = None
        self._want_staging: deque[Operation] = deque()
        self._ended: list[Operation] = []
        self._last = 0
        self._pending = 0
        self._error: OSError | None = None
        self._tags = ffi.new("uint64_t[]", 64)

    @property
    def lane(self) -> Lane:
        return self._lane

    @property
    def broken(self) -> bool:
        """It takes no more operations: the daemon is gone or does not answer."""
        return self._error is not None

    @property
    def pending(self) -> int:
        """Operations submitted and not yet returned by poll or wait."""
        return self._pending

    def fileno(self) -> int:
        """Readable once operations have ended, if `arm` returned True before."""
        return self._fd

    def submit(self, job: Job) -> Operation:
        self._client.check_fork()
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._pending >= MAX_OPERATIONS:
                raise BlockingIOError(errno.EAGAIN, f"{MAX_OPERATIONS} operations are under way: poll first")
            operation = Operation(job)
            self._pending += 1
            self._advance(operation)
            if operation.done and operation._error is not None and not isinstance(operation._error, OSError):  # pyright: ignore[reportPrivateUsage]
                self._ended.remove(operation)  # a wrong argument is the caller's to hear of now
                self._pending -= 1
                operation.result()
            return operation

    def arm(self, count: int = 1) -> bool:
        """Before waiting on the descriptor. False: something has ended already, or nothing is under way: do not wait."""
        with self._lock:
            if self._ended or not self._running or self._error is not None:
                return False
            return check(lib.kvfs_arm(self._lane.ring.handle, count), "arm") == 0

    def poll(self) -> list[Operation]:
        """What has ended since the last call."""
        self._client.check_fork()
        with self._lock:
            if self._running:
                self._reap(lib.kvfs_py_poll(self._lane.ring.handle, self._tags, 64))
            return self._take()

    def wait(self, timeout: float | None = None) -> list[Operation]:
        """As poll, but waits until something has ended; [] if nothing is under way. TimeoutError after `timeout` s."""
        self._client.check_fork()
        limit = lib.KVFS_NO_TIMEOUT if timeout is None else int(timeout * 1e9)
        with self._lock:
            while not self._ended and self._running:
                got = lib.kvfs_py_wait(self._lane.ring.handle, self._tags, 64, limit)
                if got == -errno.ETIMEDOUT:
                    raise TimeoutError(errno.ETIMEDOUT, "no operation has ended yet")
                self._reap(got)
            return self._take()

    def fail(self, error: OSError) -> None:
        """Ends everything with `error`: what is under way is undecided, and the queue takes no more."""
        with self._lock:
            self._error = error
            left = {id(op): op for op, _ in (*self._running.values(), *self._backlog)}
            left.update({id(op): op for op in self._want_staging})
            self._running.clear()
            self._backlog.clear()
            self._want_staging.clear()
            for operation in left.values():
                operation.end([], error)
                self._ended.append(operation)

    def _take(self) -> list[Operation]:
        ended, self._ended = self._ended, []
        self._pending -= len(ended)
        return ended

    def _reap(self, got: int) -> None:
        if got < 0:
            try:
                check(got, "blocks")
            except OSError as error:
                self.fail(error)
            return
        done = [self._running.pop(self._tags[i])[0] for i in range(got)]
        for operation in done:
            self._advance(operation)
        while self._backlog and len(self._running) < lib.KVFS_BATCHES:
            self._start(*self._backlog.popleft())

    def _advance(self, operation: Operation) -> None:
        while True:
            batch = operation.step()
            if operation.done:
                self._ended.append(operation)
                if self._staging_owner is operation:
                    self._staging_owner = None
                    if self._want_staging:
                        operation = self._staging_owner = self._want_staging.popleft()
                        continue
                return
            if batch is not None:
                self._start(operation, batch)
                return
            if self._staging_owner is not None:
                self._want_staging.append(operation)
                return
            self._staging_owner = operation

    def _start(self, operation: Operation, batch: Any) -> None:
        if len(self._running) >= lib.KVFS_BATCHES:
            self._backlog.append((operation, batch))
            return
        self._last += 1
        batch.user = ffi.cast("void*", self._last)
        self._running[self._last] = operation, batch
        result = lib.kvfs_batch_submit(self._lane.ring.handle, batch)
        if result < 0:
            self._reap(result)
