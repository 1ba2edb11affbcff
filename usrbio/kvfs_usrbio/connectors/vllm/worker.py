"""Worker: what a worker does with a step's Plan. It imports nothing of vLLM."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvfs_usrbio.blocks import BlockStore
from kvfs_usrbio.connectors.keys import Keyring
from kvfs_usrbio.connectors.link import Link
from kvfs_usrbio.connectors.transfer import Load, Loader, Pages, Saver, Staging, Transfers
from kvfs_usrbio.connectors.vllm.planner import LoadPlan, Plan

DRAIN: Final = 5.0  # seconds for what is still being stored when the engine ends
FIRST_WAIT: Final = 5.0  # for the first connection, when the engine starts

logger = logging.getLogger("vllm.kvfs")


@dataclass(frozen=True, slots=True)
class Settings:
    open: Callable[[], BlockStore]
    load_buffer: int
    save_buffer: int
    step_tokens: int  # computed in one step at most
    block_tokens: int


@dataclass(slots=True)
class Outcome:
    """For the scheduler's side, since the last one. `lost`: more was dropped, of what had been taken in earlier steps.
    `failures`: loads that failed since the start."""

    failed: set[bytes] = field(default_factory=set[bytes])
    dropped: set[bytes] = field(default_factory=set[bytes])
    lost: bool = False
    failures: int = 0


def pages_of(tensors: Mapping[str, Any], blocks: int, parts: int) -> Pages:
    """The memory of these KV tensors, of which each holds all blocks of one layer. ValueError if it is not such memory, or
    cannot be stored in so many parts."""
    layers: list[tuple[int, int]] = []
    known: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{name} lies in {tensor.device.type} memory; this connector is for KV in the host's. On a GPU use vLLM's "
                "OffloadingConnector with kvfs as its secondary tier (docs/engines.md)"
            )
        if not tensor.is_contiguous() or tensor.nbytes % blocks:
            raise ValueError(f"{name} is not {blocks} contiguous blocks: {tuple(tensor.shape)}, {tensor.stride()}")
        if tensor.data_ptr() not in known:  # layers may share one cache
            known.add(tensor.data_ptr())
            layers.append((int(tensor.data_ptr()), int(tensor.nbytes) // blocks))
    return Pages(layers, list(tensors.values()), parts=parts)


class Worker:
    """One rank's. `rank`: whose keys it loads; `stores`: whether it is the one that stores them."""

    def __init__(self, settings: Settings, keyring: Keyring, rank: int, stores: bool) -> None:
        self._settings = settings
        self._keyring = self._unsalted = keyring
        self._salt: bytes = b""
        self._rank = rank
        self._stores = stores
        self._plan = Plan()
        self._later: dict[str, tuple[LoadPlan, Load]] = {}
        self._bad_blocks: set[int] = set()
        self._outcome = Outcome()
        self._failures = 0
        self._loader: Loader | None = None
        self._saver: Saver | None = None
        self.counts: dict[str, float] = {}
        self.trace: Callable[[dict[str, Any]], None] | None = None

    def register(self, tensors: Mapping[str, Any], blocks: int) -> None:
        pages = pages_of(tensors, blocks, self._keyring.parts)
        s = self._settings
        # A whole step's blocks twice: one step's are stored while the next one's are computed.
        step = -(-s.step_tokens // s.block_tokens) * pages.block_bytes
        save_buffer = s.save_buffer or min(max(2 * step, 64 << 20), 1 << 30)
        links = [self._link(pages.room(size), max(pages.sizes)) for size in (s.load_buffer, save_buffer)]
        for link in links:
            link.current()
        self._loader, self._saver = Loader(links[0], pages), Saver(links[1], pages)
        for link in links:
            link.wait(FIRST_WAIT)
        logger.info(
            "kvfs: %d layers, blocks of %d KiB in %d parts; %d MiB of memory for loads, %d MiB for stores",
            sum(map(len, pages.parts)),
            pages.block_bytes >> 10,
            len(pages.sizes),
            s.load_buffer >> 20,
            save_buffer >> 20,
        )

    def _link(self, size: int, part: int) -> Link[Transfers]:
        def connect() -> Transfers:
            store = self._settings.open()
            return Transfers(store, store.queue(), Staging.of(store, size, part))

        return Link(connect)

    def start(self, plan: Plan) -> None:
        """Begins the plan's loads, and ends those that this step needs."""
        self._plan = plan
        if plan.salt != self._salt:
            self._salt = plan.salt
            self._keyring = self._unsalted.salted(plan.salt)
        assert self._loader is not None
        now: list[tuple[LoadPlan, Load]] = []
        for wanted in plan.loads:
            keys = [key for block in wanted.hashes for key in self._keyring.of_rank(block, self._rank)]
            load = Load(wanted.request, keys, wanted.blocks)
            if wanted.later:
                self._later[wanted.request] = (wanted, load)
            else:
                now.append((wanted, load))
            self._loader.submit(load)
        for wanted, load in now:
            load.done.wait()  # the loader ends each of them
            if self._ended(wanted, load):
                self._failures += 1

    def save(self) -> None:
        """Takes copies of the blocks that the step has filled, as far as there is room, and returns."""
        plan, saver = self._plan, self._saver
        self._plan = Plan()
        assert saver is not None
        if not self._stores:
            return
        if not plan.save_blocks:
            saver.reap()
        elif plan.seen < self._failures:
            # What was computed after a load that failed is computed again: it may not be what it should be.
            self._drop(plan.save_hashes)
        else:
            keyring, rank, hashes = self._keyring, self._rank, plan.save_hashes
            saved = saver.save(plan.save_blocks, lambda i: keyring.of_rank(hashes[i], rank))
            self._drop([hashes[i] for i in saved.dropped])
            self._count(save_blocks=len(hashes) - len(saved.dropped), save_bytes=saved.bytes, save_seconds=saved.copied)
            if self.trace is not None:
                self.trace({"what": "save", "blocks": len(hashes), "bytes": saved.bytes, "copy": saved.copied})
        if saver.stored or saver.refused:
            self._count(stored_values=saver.stored, refused_values=saver.refused)
            saver.stored = saver.refused = 0
        if saver.lost:
            self._count(save_dropped_blocks=saver.lost)
            self._outcome.lost = True
            saver.lost = 0

    def finished_loads(self) -> set[str]:
        """Requests whose later loads have ended since the last call."""
        ended = {name for name, (_, load) in self._later.items() if load.done.is_set()}
        for name in ended:
            self._ended(*self._later.pop(name))
        return ended

    def bad_blocks(self) -> set[int]:
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def outcome(self) -> Outcome | None:
        """If there is something to say."""
        if not self._outcome.failed and not self._outcome.dropped and not self._outcome.lost:
            return None
        outcome, self._outcome = self._outcome, Outcome()
        outcome.failures = self._failures
        return outcome

    def close(self) -> None:
        if self._saver is not None and not self._saver.drain(DRAIN):
            logger.warning("kvfs: not all blocks could be stored within %g s", DRAIN)
        for user in (self._loader, self._saver):
            if user is not None:
                user.link.close()
        if self._loader is not None:
            self._loader.close()
        self._loader = self._saver = None

    def _ended(self, wanted: LoadPlan, load: Load) -> bool:
        """Takes note of a load's end; whether some of it failed."""
        failed = load.failed
        self._bad_blocks.update(wanted.blocks[i] for i in failed)
        self._outcome.failed.update(wanted.hashes[i] for i in failed)
        assert self._saver is not None
        self._saver.evict(load.damaged)
        self._count(
            loads=1,
            load_blocks=len(wanted.blocks) - len(failed),
            load_bytes=load.bytes,
            load_seconds=load.seconds,
            load_failed_blocks=len(failed),
        )
        if self.trace is not None:
            self.trace(
                {
                    "what": "load",
                    "request": wanted.request,
                    "blocks": len(wanted.blocks),
                    "failed": len(failed),
                    "bytes": load.bytes,
                    "seconds": load.seconds,
                    "get": load.waited,
                    "copy": load.copied,
                    "later": wanted.later,
                }
            )
        return bool(failed)

    def _drop(self, hashes: Sequence[bytes]) -> None:
        if hashes:
            self._outcome.dropped.update(hashes)
            self._count(save_dropped_blocks=len(hashes))

    def _count(self, **more: float) -> None:
        for name, value in more.items():
            self.counts[name] = self.counts.get(name, 0) + value

    def take_counts(self) -> dict[str, float]:
        counts, self.counts = self.counts, {}
        return counts
