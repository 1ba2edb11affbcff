"""Awaiting operations under asyncio or trio, whichever runs: one Queue for each event loop.

A cancelled await ends when its operation has ended (they take milliseconds, and at most the timeout): the caller's
memory is the caller's again afterwards.
"""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from kvfs_usrbio.jobs import Job, Lane
from kvfs_usrbio.queue import Operation, Queue

if TYPE_CHECKING:
    import trio

Maker = Callable[[Lane], Job]


class Driver(Protocol):
    queue: Queue

    async def run(self, make: Maker, timeout: float | None) -> list[int]: ...


def _late() -> OSError:
    return OSError(errno.ETIMEDOUT, "the daemon did not answer in time")


class AsyncioDriver:
    def __init__(self, queue: Queue, loop: asyncio.AbstractEventLoop) -> None:
        self.queue = queue
        self._loop = loop
        self._watched = False
        self._futures: dict[Operation, asyncio.Future[None]] = {}

    async def run(self, make: Maker, timeout: float | None) -> list[int]:
        operation = self.queue.submit(make(self.queue.lane))
        future = self._futures[operation] = self._loop.create_future()
        timer = None if timeout is None else self._loop.call_later(timeout, self._expire)
        cancelled: asyncio.CancelledError | None = None
        try:
            self._serve()
            while not operation.done:
                try:
                    await asyncio.shield(future)
                except asyncio.CancelledError as error:
                    cancelled = error
        finally:
            if timer is not None:
                timer.cancel()
        if cancelled is not None:
            raise cancelled
        return operation.result()

    def _expire(self) -> None:
        self.queue.fail(_late())
        self._serve()

    def _serve(self) -> None:
        """Hands out what has ended, and watches the descriptor as long as more is to come."""
        while self.queue.pending:
            if self.queue.arm():
                break
            for operation in self.queue.poll():
                future = self._futures.pop(operation, None)
                if future is not None and not future.done():
                    future.set_result(None)
        if bool(self.queue.pending) != self._watched:
            self._watched = not self._watched
            if self._watched:
                self._loop.add_reader(self.queue.fileno(), self._readable)
            else:
                self._loop.remove_reader(self.queue.fileno())

    def _readable(self) -> None:
        for operation in self.queue.poll():
            future = self._futures.pop(operation, None)
            if future is not None and not future.done():
                future.set_result(None)
        self._serve()


class TrioDriver:
    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self._serving = False
        self._events: dict[Operation, trio.Event] = {}

    async def run(self, make: Maker, timeout: float | None) -> list[int]:
        import trio

        await trio.lowlevel.checkpoint_if_cancelled()
        operation = self.queue.submit(make(self.queue.lane))
        event = self._events[operation] = trio.Event()
        if not self._serving:
            self._serving = True
            trio.lowlevel.spawn_system_task(self._serve)
        with trio.CancelScope(shield=True):
            if timeout is None:
                await event.wait()
            else:
                with trio.move_on_after(timeout):
                    await event.wait()
        if not operation.done:
            self.queue.fail(_late())
            for ended in self.queue.poll():  # _serve may wait for ever
                other = self._events.pop(ended, None)
                if other is not None:
                    other.set()
        await trio.lowlevel.checkpoint_if_cancelled()
        return operation.result()

    async def _serve(self) -> None:
        """Until nothing is under way. Every awaiting task waits for its operation's end, so this outlives none of them."""
        import trio

        try:
            while self.queue.pending:
                if self.queue.arm():
                    await trio.lowlevel.wait_readable(self.queue.fileno())
                for operation in self.queue.poll():
                    event = self._events.pop(operation, None)
                    if event is not None:
                        event.set()
        finally:
            self._serving = False


def current_loop() -> Any:
    """A hashable name for the event loop that runs here, trio's or asyncio's."""
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return trio.lowlevel.current_trio_token()
    return asyncio.get_running_loop()


def make_driver(loop: Any, queue: Queue) -> Driver:
    return AsyncioDriver(queue, loop) if isinstance(loop, asyncio.AbstractEventLoop) else TrioDriver(queue)
