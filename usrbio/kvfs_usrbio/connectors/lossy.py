"""LossyStore: blocks of one namespace for an engine that can live without them, and the keys under which they lie.

While no kvfs answers, nothing is found and nothing is stored.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from kvfs_usrbio.blocks import BlockStore
from kvfs_usrbio.client import ForkError
from kvfs_usrbio.connectors.keys import fingerprint
from kvfs_usrbio.connectors.link import Link, give_up, opener
from kvfs_usrbio.memory import Data
from kvfs_usrbio.queue import Queue
from kvfs_usrbio.session import MAX_LANES

SETTLE_S: Final = 0.2
SWEEP: Final = 1 << 14  # blocks that are evicted together
PREFIX_BYTES: Final = 12
DIGEST_BYTES: Final = 20

Result = TypeVar("Result")


class Keys:
    """Keys of 32 bytes for one kind of content. `facts` are all that must be alike for its bytes to fit: model, data type,
    layout, rank, sizes."""

    def __init__(self, facts: Mapping[str, object]) -> None:
        self.prefix: Final = fingerprint(facts)[:PREFIX_BYTES]

    def of(self, name: bytes, part: int = 0) -> bytes:
        """Of part number `part` of what the engine calls `name`."""
        digest = hashlib.blake2b(name, digest_size=DIGEST_BYTES, salt=part.to_bytes(8, "little"))
        return self.prefix + digest.digest()


@dataclass(slots=True)
class _Stores:
    """One connection for questions, and one for data, which differ in how long a call may take.

    That for data is given up only while nobody uses it: a transfer that ended with an error although the daemon lives would
    let the engine use its memory for something else, and the daemon could go on to write there."""

    store: BlockStore
    queue: Queue
    data: BlockStore
    shared: list[bool] = field(default_factory=list[bool])  # of LossyStore._memory, as far as it is registered
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0  # of data
    over: bool = False

    def enter(self) -> bool:
        """False: it is over, and data may not be used any more."""
        with self.lock:
            self.users += not self.over
            return not self.over

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            last = self.over and not self.users
        if last:
            give_up(self.data)

    def end(self) -> None:
        with self.lock:
            self.over = True
            idle = not self.users
        if idle:
            give_up(self.data)


class LossyStore:
    """Safe to use from several threads. No call raises OSError, or waits for a kvfs that is not there.

    A question is answered within `patience` seconds. Data moves straight into and out of the engine's memory, so a
    transfer is not given up while the daemon lives: it could go on later, in memory that is another request's by then.

    `namespace`: as configured; None is `otherwise`, or what the URL says. ValueError: this can never be opened.
    """

    def __init__(
        self,
        where: str | os.PathLike[str],
        namespace: str | None = None,
        otherwise: str = "default",
        *,
        patience: float = 2.0,
    ) -> None:
        self._open = opener(where, namespace, otherwise)
        self._patience = patience
        self._lock = threading.Lock()
        self._memory: list[Data] = []
        self._link: Link[_Stores] = Link(self._connect)
        self._link.wait(patience)

    @property
    def up(self) -> bool:
        return self._link.current() is not None

    @property
    def lost(self) -> int:
        """How often a connection was."""
        return self._link.lost

    def close(self) -> None:
        """Does not wait for transfers under way, nor end them: the memory they use must stay, or be nobody else's."""
        link = self._link.close()
        if link is not None:
            link.end()

    def share(self, memory: Data) -> bool:
        """Registers memory of the engine's, now and with each new connection; it must stay until `close`. True: transfers
        go straight into and out of it. False: each is copied once, or there is no kvfs."""
        with self._lock:
            self._memory.append(memory)
            place = len(self._memory) - 1
        found = self._link.wait(self._patience)
        if found is None or not self._move(found, lambda: self._register(found), False):
            return False
        return found.shared[place]

    # -- calls; what is not found, or not done, has a negative number

    def match_prefix(self, keys: Sequence[bytes]) -> int:
        link = self._link.current()
        return 0 if link is None else self._attempt(link, lambda: link.store.match_prefix(keys), 0)

    def exists(self, keys: Sequence[bytes]) -> list[int]:
        """Each value's bytes."""
        link, lost = self._link.current(), [-errno.EREMOTEIO] * len(keys)
        return lost if link is None else self._attempt(link, lambda: link.store.exists(keys), lost)

    def get(self, keys: Sequence[bytes], dests: Sequence[Data], offsets: Sequence[int] | None = None) -> list[int]:
        link, lost = self._link.current(), [-errno.EREMOTEIO] * len(keys)
        if link is None:
            return lost
        found = self._move(link, lambda: link.data.get(keys, dests, offsets), None)
        if found is not None:
            if -errno.EIO in found:  # a damaged block makes room for a good one
                self.evict([key for key, status in zip(keys, found, strict=True) if status == -errno.EIO])
            return found
        # A daemon that was killed may have had reads under way: the device is given time to finish them before the memory
        # is used for something else.
        time.sleep(SETTLE_S)
        return lost

    def put(self, keys: Sequence[bytes], srcs: Sequence[Data]) -> list[int]:
        link, lost = self._link.current(), [-errno.EREMOTEIO] * len(keys)
        return lost if link is None else self._move(link, lambda: link.data.put(keys, srcs), lost)

    def evict(self, keys: Sequence[bytes]) -> list[int]:
        link, lost = self._link.current(), [-errno.EREMOTEIO] * len(keys)
        return lost if link is None else self._attempt(link, lambda: link.store.evict(keys), lost)

    def evict_all(self, kinds: Iterable[Keys]) -> bool:
        """Every block of these kinds; looks at each key of the namespace."""
        prefixes = {keys.prefix for keys in kinds}

        def sweep(store: BlockStore) -> bool:
            found = (entry.key for entry in store.scan() if entry.key[:PREFIX_BYTES] in prefixes)
            while some := list(itertools.islice(found, SWEEP)):
                store.evict(some)
            return True

        link = self._link.current()
        return link is not None and self._move(link, lambda: sweep(link.data), False)

    # -- inside

    def _attempt(self, link: _Stores, call: Callable[[], Result], otherwise: Result) -> Result:
        """A question, or part of it."""
        try:
            done = call()
        except (OSError, ForkError) as error:
            self._link.lose(link, error)
            link.end()
            return otherwise
        self._link.worked()
        return done

    def _move(self, link: _Stores, call: Callable[[], Result], otherwise: Result) -> Result:
        """What uses the connection for data."""
        if not link.enter():
            return otherwise
        try:
            return self._attempt(link, call, otherwise)
        finally:
            link.leave()

    def _connect(self) -> _Stores:
        # Rings for all who ask at the same time: one that is made when it is needed waits for a daemon that hangs.
        store = self._open(timeout=self._patience, lanes=MAX_LANES)
        made = _Stores(store, store.queue(), self._open(timeout=None))
        self._register(made)
        return made

    def _register(self, link: _Stores) -> bool:
        with self._lock:
            for memory in self._memory[len(link.shared) :]:
                link.shared.append(link.data.register(memory).shared)
        return True
