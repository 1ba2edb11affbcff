"""Two cables to one server: work goes on over the other when one is pulled, nothing is lost or done twice, and both carry
their share."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from machines import Site

from kvfs_tools.bench.measure import Listener
from kvfs_tools.bench.rails import two_rails
from kvfs_tools.hosts import Cable, End
from kvfs_usrbio import MISS, BlockStore
from waiting import wait_for

TIMEOUT = 6.0  # of a call; a rail that is silent is waited for a fourth of it
BACK_S = 20.0
SIZES = (4096, 4097, 65536, 65537, 300_000, 1 << 20)


class Work(threading.Thread):
    """Puts blocks, gets them, evicts half of them, looks which are there; every result must be the one of a network that never
    fails, so what was done twice would show, too: a second put finds the first one's block, a second evict nothing."""

    def __init__(self, store: BlockStore) -> None:
        super().__init__()
        self.store = store
        self.rounds = 0
        self.enough = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                self.round()
                self.rounds += 1
        except BaseException as e:
            self.failure = e

    def round(self) -> None:
        keys = [os.urandom(32) for _ in SIZES]
        values = [os.urandom(size) for size in SIZES]
        half = len(SIZES) // 2
        assert self.store.put(keys, values) == [1] * len(SIZES)
        into = [bytearray(size) for size in SIZES]
        assert self.store.get(keys, into) == list(SIZES)
        assert into == values
        assert self.store.evict(keys[:half]) == [0] * half
        assert self.store.exists(keys) == [MISS] * half + list(SIZES[half:])
        assert self.store.evict(keys[half:]) == [0] * (len(SIZES) - half)


@contextmanager
def working(store: BlockStore, threads: int = 2) -> Generator[list[Work]]:
    works = [Work(store) for _ in range(threads)]
    for work in works:
        work.start()
    try:
        yield works
    finally:
        for work in works:
            work.enough.set()
        for work in works:
            work.join(TIMEOUT * 5)
    for work in works:
        assert not work.is_alive()
        if work.failure is not None:
            raise work.failure


def go_on(works: list[Work]) -> None:
    """Every one of them ends what it does and two rounds more."""
    before = [work.rounds for work in works]
    wait_for(lambda: all(w.failure or w.rounds > b + 2 for w, b in zip(works, before, strict=True)), BACK_S)


def carried(cable: Cable) -> int:
    return sum(cable.b.carried())


def in_use(cable: Cable) -> bool:
    """Within a moment it carries what only work makes."""
    before = carried(cable)
    time.sleep(0.1)
    return carried(cable) - before > 64 << 10


@pytest.mark.parametrize(
    ("number", "at_server", "cut"),
    [(0, True, End.unplugged), (1, False, End.unplugged), (1, False, End.silent)],
    ids=["first", "second", "second-silent"],
)
def test_a_rail_that_is_pulled_costs_no_operation_and_is_used_again(
    railed: Site, number: int, at_server: bool, cut: Callable[[End], AbstractContextManager[None]]
) -> None:
    server = railed.cluster.servers[0]
    pulled, other = railed.cables[0][number], railed.cables[0][1 - number]

    def done() -> tuple[float, ...]:
        names = ("puts_total", "puts_existed_total", "deletes_total")
        return *(server.metric(f"kvfs_target_{name}") for name in names), server.metric(
            "kvfs_server_sessions_opened_total"
        )

    with railed.opened("cache", TIMEOUT) as store:
        before = done()
        with working(store) as works:
            wait_for(lambda: in_use(pulled) and in_use(other), BACK_S)
            with cut(pulled.a if at_server else pulled.b):
                time.sleep(TIMEOUT / 4)
                go_on(works)
                assert not in_use(pulled)
                wait_for(lambda: in_use(other), BACK_S)
            wait_for(lambda: in_use(pulled), BACK_S)
            go_on(works)
        blocks = sum(work.rounds for work in works) * len(SIZES)
        assert [a - b for a, b in zip(done(), before, strict=True)] == [blocks, 0, blocks, 0]


def test_both_rails_pulled_one_after_the_other_leave_the_session(railed: Site) -> None:
    server = railed.cluster.servers[0]
    first, second = railed.cables[0]
    with railed.opened("cache", TIMEOUT) as store:
        sessions = server.metric("kvfs_server_sessions_opened_total")
        with working(store) as works:
            go_on(works)
            with first.a.unplugged():
                with second.a.unplugged():
                    time.sleep(0.5)
                wait_for(lambda: in_use(second), BACK_S)
            wait_for(lambda: in_use(first), BACK_S)
            go_on(works)
        assert server.metric("kvfs_server_sessions_opened_total") == sessions


def test_equal_rails_carry_about_the_same(railed: Site) -> None:
    count = 16
    with railed.opened("cache", TIMEOUT) as store:
        keys = [os.urandom(32) for _ in range(count)]
        buffer = store.alloc(count << 20)
        buffer.view[:] = os.urandom(len(buffer))
        assert store.put_from(keys, buffer, 1 << 20) == [1] * count
        wait_for(lambda: server_connections(railed) == 4, BACK_S)
        before = [cable.b.carried()[0] for cable in railed.cables[0]]
        for _ in range(8):
            assert store.get_into(keys, buffer, 1 << 20) == [1 << 20] * count
        shares = [cable.b.carried()[0] - b for cable, b in zip(railed.cables[0], before, strict=True)]
        assert sum(shares) >= 8 * count << 20
        assert (max(shares) - min(shares)) / (sum(shares) / 2) < 0.25
        assert store.evict(keys) == [0] * count


def server_connections(site: Site) -> float:
    return site.cluster.servers[0].metric("kvfs_server_connections")


def test_the_bench_of_two_rails_measures_both_and_leaves_nothing(tmp_path: Path) -> None:
    rows = two_rails(tmp_path, 1, 0.2, Listener())
    assert [row.name for row in rows] == ["net-rails", "net-rails-apart"]
    speed, apart = rows
    assert speed.ours > 0
    assert speed.ratio is not None
    assert 0 <= apart.ours < 200
