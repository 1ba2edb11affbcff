"""Workers: threads for calls that may have to wait for kvfs as long as it hangs, and that no end of a process waits for."""

from __future__ import annotations

import queue as queues
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

Result = TypeVar("Result")

CLOSE_S: Final = 5.0  # for what is under way when its user ends


class Workers:
    """ThreadPoolExecutor's are joined when the process ends, which a daemon that hangs would hold up."""

    def __init__(self, count: int, name: str) -> None:
        self._todo: queues.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queues.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(count)]
        self._closed = False
        self._lock = threading.Lock()  # nothing is added behind what ends the threads
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """What comes after `close` is cancelled."""
        future: Future[Result] = Future()
        with self._lock:
            if self._closed:
                future.cancel()
            else:
                self._todo.put((future, call))
        return future

    def close(self) -> bool:
        """Waits CLOSE_S seconds at most for what is under way, and cancels what has not begun. False: some of it goes on."""
        until = time.monotonic() + CLOSE_S
        with self._lock:
            self._closed = True
        while True:
            try:
                job = self._todo.get_nowait()
            except queues.Empty:
                break
            if job is not None:
                job[0].cancel()
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (job := self._todo.get()) is not None:
            future, call = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
