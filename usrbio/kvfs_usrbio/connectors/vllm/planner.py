"""Planner: what the scheduler's side decides. It imports nothing of vLLM.

In every step it says which blocks the workers load and which they store. It looks at nothing but its own memory and, for a
new request, at kvfs through a Finder, which does not wait.
"""

from __future__ import annotations

import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from kvfs_usrbio.connectors.keys import Keyring

REMEMBERED: Final = 1 << 16  # hashes of blocks that are thought to be stored, and of ones that could not be loaded
BAD_S: Final = 10.0  # seconds for which a block that could not be loaded is not asked for


class Request(Protocol):
    """Of vLLM's Request what is used here."""

    request_id: str
    num_tokens: int
    block_hashes: Sequence[bytes]
    lora_request: Any
    skip_reading_prefix_cache: Any


class Finds(Protocol):
    def find(self, name: str, keys: Sequence[bytes]) -> list[int] | None: ...
    def forget(self, name: str) -> None: ...


@dataclass(slots=True)
class LoadPlan:
    """`later`: the request waits for it outside the schedule, and others run meanwhile."""

    request: str
    hashes: list[bytes]
    blocks: list[int]
    later: bool


@dataclass(slots=True)
class Plan:
    """What the workers do in one step. `seen`: how many failed loads of a worker the scheduler knew of by then."""

    loads: list[LoadPlan] = field(default_factory=list[LoadPlan])
    save_hashes: list[bytes] = field(default_factory=list[bytes])
    save_blocks: list[int] = field(default_factory=list[int])
    salt: bytes = b""
    seen: int = 0


@dataclass(slots=True)
class _State:
    request: Request
    saved: int = 0  # blocks of it that are stored or thought to be
    match: tuple[int, bool] | None = None  # (first block that was asked for, later), from lookup to allocation


class Remembered:
    """The latest hashes, so many at most, each for so many seconds."""

    def __init__(self, most: int = REMEMBERED, seconds: float = math.inf) -> None:
        self._most = most
        self._seconds = seconds
        self._hashes: OrderedDict[bytes, float] = OrderedDict()

    def __contains__(self, block: bytes) -> bool:
        added = self._hashes.get(block)
        return added is not None and time.monotonic() - added < self._seconds

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, block: bytes) -> None:
        self._hashes[block] = time.monotonic()
        self._hashes.move_to_end(block)
        if len(self._hashes) > self._most:
            self._hashes.popitem(last=False)

    def discard(self, block: bytes) -> None:
        self._hashes.pop(block, None)

    def clear(self) -> None:
        self._hashes.clear()


class Planner:
    """`tokens`: of a block. `per_hash`: of each of the request's hashes, a divisor of `tokens`. `may_wait`: a load may hold up
    the step that needs it; otherwise all requests wait outside the schedule."""

    def __init__(
        self,
        keyring: Keyring,
        finder: Finds,
        *,
        tokens: int,
        per_hash: int,
        may_wait: bool,
        loads: bool = True,
        saves: bool = True,
    ) -> None:
        self._keyring = keyring
        self._unsalted = keyring
        self._finder = finder
        self._tokens = tokens
        self._every = tokens // per_hash
        self._may_wait = may_wait
        self._loads = loads
        self._saves = saves
        self._states: dict[str, _State] = {}
        self._plan = Plan()
        self._salt: bytes = b""
        self._running: set[str] = set()  # in the latest step, as far as they have not ended
        self._seen = 0
        self.stored = Remembered()
        self.bad = Remembered(seconds=BAD_S)
        self.asked = 0  # blocks
        self.found = 0

    def hashes(self, request: Request, first: int, end: int) -> list[bytes]:
        """Of the blocks from `first` on. A hash stands for all that comes before it, so a block's last one is its name."""
        every = self._every
        return [bytes(block) for block in request.block_hashes[first * every + every - 1 : end * every : every]]

    def match(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """As KVConnectorBase_V1.get_num_new_matched_tokens: at least one token is left to be computed, whose logits are
        wanted."""
        if not self._loads or request.lora_request is not None or request.skip_reading_prefix_cache:
            return 0, False
        first = computed // self._tokens
        wanted = self.hashes(request, first, (request.num_tokens - 1) // self._tokens)
        for i, block in enumerate(wanted):
            if block in self.bad:
                wanted = wanted[:i]
                break
        if not wanted:
            return 0, False
        statuses = self._finder.find(request.request_id, self._keyring.of_all(wanted))
        if statuses is None:
            return None, False
        width = self._keyring.ranks * self._keyring.parts
        there = [min(statuses[i : i + width]) > 0 for i in range(0, len(statuses), width)]
        count = there.index(False) if False in there else len(there)
        for block, is_there in zip(wanted, there, strict=False):
            if not is_there:
                self.stored.discard(block)
        self.asked += len(wanted)
        self.found += count
        later = count > 0 and (bool(self._running) or not self._may_wait)
        self._state(request).match = (first, later)
        return count * self._tokens, later

    def allocated(self, request: Request, blocks: Sequence[int], external: int) -> None:
        """As update_state_after_alloc; `external`: tokens to load into the blocks from where they were asked for."""
        state = self._state(request)
        match, state.match = state.match, None
        if not external or match is None:
            return
        first, later = match
        end = first + external // self._tokens
        hashes = self.hashes(request, first, end)
        self._plan.loads.append(LoadPlan(request.request_id, hashes, list(blocks[first:end]), later))
        for block in hashes:
            self.stored.add(block)

    def step(self, scheduled: Iterable[tuple[str, int, Callable[[], Sequence[int]]]]) -> Plan:
        """The plan of a step in which these requests run: (id, tokens computed after it, their blocks)."""
        plan, self._plan = self._plan, Plan()
        self._running.clear()
        taken: set[bytes] = set()
        for request, computed, blocks in scheduled:
            self._running.add(request)
            state = self._states.get(request)
            if state is not None and self._saves and state.request.lora_request is None:
                self._save(plan, state, computed, blocks, taken)
        plan.salt = self._salt
        plan.seen = self._seen
        return plan

    def rewound(self, request: str, computed: int) -> None:
        """Its blocks from there on are computed again."""
        state = self._states.get(request)
        if state is not None:
            state.saved = min(state.saved, computed // self._tokens)

    def _save(
        self, plan: Plan, state: _State, computed: int, blocks: Callable[[], Sequence[int]], taken: set[bytes]
    ) -> None:
        full = min(computed // self._tokens, len(state.request.block_hashes) // self._every)
        if full <= state.saved:
            return
        hashes = self.hashes(state.request, state.saved, full)
        ids: Sequence[int] | None = None
        for i, block in enumerate(hashes, state.saved):
            if block in self.stored or block in taken:
                continue
            ids = blocks() if ids is None else ids
            plan.save_hashes.append(block)
            plan.save_blocks.append(ids[i])
            taken.add(block)
            self.stored.add(block)
            self.bad.discard(block)
        state.saved = full

    def outcome(self, failed: Iterable[bytes], dropped: Iterable[bytes], failures: int, lost: bool = False) -> None:
        """What the workers say: blocks that could not be loaded are not asked for again until they have been stored again, or
        BAD_S seconds have passed. `failures`: loads of the worker that failed so far. `lost`: a connection went with blocks
        that nobody can name any more; any of those that were to be stored may be missing."""
        if lost:
            self.stored.clear()
        self._seen = max(self._seen, failures)
        for block in failed:
            self.bad.add(block)
            self.stored.discard(block)
        for block in dropped:
            self.stored.discard(block)

    def finished(self, request: str) -> None:
        self._states.pop(request, None)
        self._running.discard(request)
        self._finder.forget(request)

    def reset(self) -> None:
        """Nothing stored so far is loaded from now on, as after a change of the model's weights."""
        self._salt = os.urandom(16)
        self._keyring = self._unsalted.salted(self._salt)
        self.stored.clear()
        self.bad.clear()

    def _state(self, request: Request) -> _State:
        state = self._states.get(request.request_id)
        if state is None:
            state = self._states[request.request_id] = _State(request)
        return state
