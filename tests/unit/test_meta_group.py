"""Group commit: what a later transaction, a flush, a crash and a full disk make of what was committed."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from kvfs.meta import kv
from kvfs.meta.group import MAX_CACHED, MAX_PENDING, GroupStore
from kvfs.meta.kv import ClosedError, Conflict, FullError, LimitError, Store, StoreError, Txn
from kvfs.meta.schema import ROOT_INO
from kvfs.meta.sqlite import SqliteStore
from kvfs.meta.tree import INO_BATCH, Tree


class Limited(SqliteStore):
    """The real engine on a full disk, when told so."""

    full = False

    def transact(self, *, read_only: bool = False):
        if self.full and not read_only:
            raise FullError("no space left")
        return super().transact(read_only=read_only)


@pytest.fixture
def engine(tmp_path: Path) -> Limited:
    return Limited(tmp_path / "meta.db")


@pytest.fixture
def store(engine: Limited) -> Iterator[GroupStore]:
    engine.full = False
    store = GroupStore(engine)
    yield store
    engine.full = False
    store.close()


def _set(store: Store, key: bytes, value: bytes | None) -> None:
    kv.run(store, lambda t: t.delete(key) if value is None else t.put(key, value))


def _get(store: Store, key: bytes) -> bytes | None:
    return kv.read(store, lambda t: t.get(key))


def test_commits_reach_the_engine_with_the_flush(store: GroupStore, engine: Limited) -> None:
    calls: list[int] = []
    store.on_pending = lambda: calls.append(1)
    for n in range(3):
        _set(store, b"k%d" % n, b"v")
    assert len(calls) == 1
    assert _get(store, b"k2") == b"v"
    assert _get(engine, b"k0") is None
    store.flush()
    assert kv.read(engine, lambda t: [k for k, _ in t.range(b"k", b"l")]) == [b"k0", b"k1", b"k2"]
    _set(store, b"k0", None)
    assert len(calls) == 2
    store.sync()
    assert _get(engine, b"k0") is None


def test_close_stores_what_waits(tmp_path: Path) -> None:
    with GroupStore(SqliteStore(tmp_path / "meta.db")) as store:
        _set(store, b"k", b"v")
    with pytest.raises(ClosedError):
        store.transact()
    store.close()
    with SqliteStore(tmp_path / "meta.db") as engine:
        assert _get(engine, b"k") == b"v"


def test_what_waits_is_bounded(store: GroupStore, engine: Limited) -> None:
    for n in range(MAX_PENDING + 1):
        _set(store, b"%06d" % n, b"v")
    assert len(kv.read(engine, lambda t: t.range(b"0", b"9", kv.MAX_RANGE))) == MAX_PENDING
    for n in range(MAX_CACHED + 10):  # more than is remembered
        assert _get(store, b"%06d" % n) == (b"v" if n <= MAX_PENDING else None)


def test_large_transactions_and_ranges(store: GroupStore) -> None:
    def fill(txn: Txn) -> None:
        for n in range(kv.MAX_WRITES):
            txn.put(b"%06d" % n, b"")

    kv.run(store, fill)
    store.flush()

    def thin(txn: Txn) -> list[bytes]:
        for n in range(8000):
            txn.delete(b"%06d" % n)
        txn.put(b"009000+", b"")
        return [k for k, _ in txn.range(b"0", b"9", 2000)]

    with store.transact() as txn:
        keys = thin(txn)
        assert keys[0] == b"008000"
        assert len(keys) == 2000
        assert b"009000+" in keys
        back = [k for k, _ in txn.range(b"0", b"9", kv.MAX_RANGE, reverse=True)]
        assert back[::-1] == [*keys, b"009999"]
        txn.commit()
    assert [k for k, _ in kv.read(store, lambda t: t.range(b"0", b"9", 1))] == [b"008000"]


def test_a_full_engine_refuses_changes_until_there_is_space(store: GroupStore, engine: Limited) -> None:
    _set(store, b"k", b"1")
    engine.full = True
    with pytest.raises(FullError):
        store.flush()
    with pytest.raises(FullError):
        _set(store, b"k", b"2")
    with pytest.raises(FullError):
        store.sync()
    assert _get(store, b"k") == b"1"
    engine.full = False
    _set(store, b"k", b"3")
    assert _get(engine, b"k") == b"1"
    store.flush()
    assert _get(engine, b"k") == b"3"


def test_conflicts(store: GroupStore) -> None:
    with store.transact() as one, store.transact() as two:
        assert one.get(b"x") is None
        assert two.get(b"y") is None
        one.put(b"y", b"1")
        two.put(b"x", b"1")
        one.commit()
        with pytest.raises(Conflict):
            two.range(b"a", b"z")
        with pytest.raises(Conflict):
            two.commit()
    assert _get(store, b"x") is None

    def add(txn: Txn) -> None:
        txn.put(b"n", b"%d" % (int(txn.get(b"n") or b"0") + 1))

    def work() -> None:
        for n in range(100):
            kv.run(store, add, retries=1000)
            if n % 10 == 0:
                store.flush()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _get(store, b"n") == b"400"


def test_limits(store: GroupStore) -> None:
    with store.transact() as txn:
        for key in (b"", b"k" * (kv.MAX_KEY + 1)):
            for use in (txn.get, txn.delete):
                with pytest.raises(LimitError):
                    use(key)
            with pytest.raises(LimitError):
                txn.put(key, b"")
        with pytest.raises(LimitError):
            txn.put(b"k", b"v" * (kv.MAX_VALUE + 1))
        with pytest.raises(LimitError):
            txn.range(b"a", b"b", kv.MAX_RANGE + 1)
        txn.abort()
        with pytest.raises(ClosedError):
            txn.get(b"k")
    with store.transact(read_only=True) as txn, pytest.raises(StoreError):
        txn.put(b"k", b"")


def test_a_number_is_not_given_twice_after_a_crash(tmp_path: Path) -> None:
    first = Tree(GroupStore(SqliteStore(tmp_path / "meta.db")))
    first.flush()
    given = [first.create(ROOT_INO, b"%d" % n, 0o600, 0, 0).ino for n in range(INO_BATCH + 5)]
    assert len(set(given)) == len(given)
    again = Tree(GroupStore(SqliteStore(tmp_path / "meta.db")))  # what a process sees after the first was killed
    assert again.create(ROOT_INO, b"other", 0o600, 0, 0).ino not in given


KEYS = st.binary(min_size=1, max_size=2).map(lambda b: bytes(x % 5 for x in b))


class Machine(RuleBasedStateMachine):
    """Against a dict, with crashes: after one the store is as it was at the last flush or at a later moment."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.history: list[dict[bytes, bytes]] = [{}]
        """The states since the last flush, the current one last."""
        self.open()

    def open(self) -> None:
        self.store = GroupStore(SqliteStore(Path(self.directory.name) / "meta.db"))

    @rule(changes=st.dictionaries(KEYS, st.none() | st.binary(max_size=4), max_size=4), give_up=st.booleans())
    def change(self, changes: dict[bytes, bytes | None], give_up: bool) -> None:
        state = dict(self.history[-1])
        with self.store.transact() as txn:
            for key, value in changes.items():
                if value is None:
                    txn.delete(key)
                    state.pop(key, None)
                else:
                    txn.put(key, value)
                    state[key] = value
                assert txn.get(key) == value
            assert txn.range(b"\0", b"\xff") == sorted(state.items())
            if give_up:
                return
            txn.commit()
        self.history.append(state)

    @rule(begin=KEYS, end=KEYS, limit=st.integers(1, 4), reverse=st.booleans())
    def range(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> None:
        wanted = sorted(((k, v) for k, v in self.history[-1].items() if begin <= k < end), reverse=reverse)[:limit]
        assert kv.read(self.store, lambda t: t.range(begin, end, limit, reverse=reverse)) == wanted

    @rule(key=KEYS)
    def get(self, key: bytes) -> None:
        assert _get(self.store, key) == self.history[-1].get(key)

    @rule()
    def flush(self) -> None:
        self.store.flush()
        del self.history[:-1]

    @rule()
    def crash(self) -> None:
        self.store.engine.close()
        self.open()
        found = dict(kv.read(self.store, lambda t: t.range(b"\0", b"\xff")))
        assert found in self.history
        self.history = [found]

    def teardown(self) -> None:
        self.store.close()
        self.directory.cleanup()


def test_against_a_dict_with_crashes() -> None:
    run_state_machine_as_test(  # pyright: ignore[reportUnknownMemberType]
        Machine,
        settings=settings(
            max_examples=50, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
