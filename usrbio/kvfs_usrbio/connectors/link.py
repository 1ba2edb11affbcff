"""Link: a connection to kvfs that comes and goes while its engine goes on.

Nothing here makes a caller wait for kvfs: opening happens in a thread of its own, at growing distances.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final, Generic, Protocol, TypeVar

from kvfs_usrbio import remote
from kvfs_usrbio.blocks import BlockStore
from kvfs_usrbio.queue import Queue

FIRST_PAUSE: Final = 0.1
LAST_PAUSE: Final = 5.0
GONE: Final = "the connection to kvfs was given up"

logger = logging.getLogger(__name__)


class Connection(Protocol):
    """What a link's user makes of an opened store."""

    store: BlockStore
    queue: Queue


C = TypeVar("C", bound=Connection)


def opener(where: str | os.PathLike[str], namespace: str | None, otherwise: str) -> Callable[..., BlockStore]:
    """Opens stores (`timeout`, as BlockStore.open has it). `namespace`: as configured, `otherwise` if it is not; on chunk
    servers it is part of the URL. ValueError: this can never be opened."""
    if remote.is_remote(where):
        if namespace is not None:
            raise ValueError(f"{os.fspath(where)} names the namespace already: leave out the option {namespace!r}")
        remote.check(os.fspath(where))
        return partial(BlockStore.open, where)
    return partial(BlockStore.open, where, otherwise if namespace is None else namespace)


def give_up(store: BlockStore) -> None:
    """Without waiting for anything: one on chunk servers has a node of its own in this process, whose end may take long."""
    store.abandon()
    threading.Thread(target=store.close, name="kvfs-close", daemon=True).start()


class Link(Generic[C]):
    """`open` opens and prepares a connection; it may take long and raises OSError, or whatever else, if it cannot."""

    def __init__(self, open: Callable[[], C]) -> None:
        self._open = open
        self._lock = threading.Lock()
        self._current: C | None = None
        self._opening: threading.Thread | None = None
        self._pause = 0.0  # before the next attempt but one; grows until an operation has ended well
        self._not_before = 0.0
        self._closed = False
        self.opened = 0  # how often
        self.lost = 0

    def current(self) -> C | None:
        """The connection, or None; then one is being opened, or will be after a pause of at most LAST_PAUSE seconds."""
        with self._lock:
            idle = self._current is None and self._opening is None and not self._closed
            if idle and time.monotonic() >= self._not_before:
                self._opening = threading.Thread(target=self._run, name="kvfs-link", daemon=True)
                self._opening.start()
            return self._current

    def wait(self, seconds: float) -> C | None:
        """As current, after a wait for the first attempt."""
        self.current()
        thread = self._opening
        if thread is not None:
            thread.join(seconds)
        return self._current

    def renewed(self, seconds: float) -> C | None:
        """As current, but a connection whose kvfs has gone since its last use is replaced first, if that takes no more than
        `seconds`."""
        connection = self.current()
        if connection is None or connection.store.alive:
            return connection
        self.lose(connection, "it has gone")
        return self.wait(seconds)

    def worked(self) -> None:
        """An operation has ended well: should the connection be lost, the next attempt to open one comes at once."""
        if self._pause:
            with self._lock:
                self._pause = 0.0

    def lose(self, connection: C, why: object) -> None:
        """It is not to be used any more. Operations still under way on it end with an error. Does not wait for kvfs."""
        with self._lock:
            if self._current is not connection:
                return
            self._current = None
            self.lost += 1
            self._later()
        # As text: an error that a log keeps holds the frames it came through, and the connection in them.
        logger.warning("kvfs is not there (%s): the engine computes everything itself until it is back", str(why))
        give_up(connection.store)
        connection.queue.fail(OSError(GONE))

    def close(self) -> C | None:
        """Ends it, and says which connection that was."""
        with self._lock:
            self._closed = True
            connection, self._current = self._current, None
        if connection is not None:
            connection.store.abandon()
            connection.store.close()
        return connection

    def _run(self) -> None:
        connection: C | None = None
        try:
            connection = self._open()
        except Exception as error:  # whatever it is, the engine goes on without
            if self._pause <= FIRST_PAUSE:
                logger.warning("no kvfs: %s; it is tried again every %g s", str(error), LAST_PAUSE)
        with self._lock:
            self._opening = None
            if connection is not None and not self._closed:
                self._current = connection
                self.opened += 1
                logger.info("connected to kvfs")
            else:
                self._later()

    def _later(self) -> None:
        self._not_before = time.monotonic() + self._pause
        self._pause = min(LAST_PAUSE, max(FIRST_PAUSE, self._pause * 2))
