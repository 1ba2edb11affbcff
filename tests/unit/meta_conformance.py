"""The conformance suite of `kvfs.meta.kv`: what every engine must do. An engine's test module subclasses
`StoreConformance` and says how to open a store on a directory; the child process of the kill test opens it by
the same function, named by `opener` as "module:function"."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvfs.meta import kv
from kvfs.meta.kv import Conflict, LimitError, Store, StoreError, Txn

CHILD = """
import importlib, sys
module, name = sys.argv[1].split(":")
store = getattr(importlib.import_module(module), name)(sys.argv[2])
from kvfs.meta import kv
n = int(sys.argv[3])
while True:
    kv.run(store, lambda t: (t.put(b"a%08d" % n, b"x" * (n % 3000)), t.put(b"b%08d" % n, b"%d" % n), t.put(b"last", b"%d" % n)))
    sys.stdout.write("%d\\n" % n)
    sys.stdout.flush()
    n += 1
"""


def open_by_name(opener: str, directory: str) -> Store:
    module, name = opener.split(":")
    return getattr(importlib.import_module(module), name)(directory)


def _put(key: bytes, value: bytes = b"v"):
    def body(txn: Txn) -> None:
        txn.put(key, value)

    return body


class StoreConformance(ABC):
    opener: str

    @abstractmethod
    def child_path(self) -> str:
        """The PYTHONPATH with which a child process can import `opener`'s module."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        with open_by_name(self.opener, str(tmp_path)) as store:
            yield store

    def test_get_put_delete(self, store: Store) -> None:
        with store.transact() as txn:
            assert txn.get(b"k") is None
            txn.put(b"k", b"1")
            assert txn.get(b"k") == b"1"
            txn.commit()
        assert kv.read(store, lambda t: t.get(b"k")) == b"1"
        kv.run(store, lambda t: t.delete(b"k"))
        kv.run(store, lambda t: t.delete(b"never there"))
        assert kv.read(store, lambda t: t.get(b"k")) is None

    def test_uncommitted_is_discarded(self, store: Store) -> None:
        with store.transact() as txn:
            txn.put(b"k", b"1")
        assert kv.read(store, lambda t: t.get(b"k")) is None
        with pytest.raises(StoreError):
            txn.put(b"k", b"1")
        with pytest.raises(StoreError):
            txn.get(b"k")
        with pytest.raises(StoreError):
            txn.commit()
        txn.abort()

    def test_ranges(self, store: Store) -> None:
        keys = [b"a", b"a\0", b"a\xff", b"b", b"b\0\0", b"c", b"\xff\xff"]

        def fill(txn: Txn) -> None:
            for key in reversed(keys):
                txn.put(key, key * 2)

        kv.run(store, fill)
        with store.transact() as txn:
            assert [k for k, _ in txn.range(b"", b"\xff" * 3)] == keys
            assert txn.range(b"b", b"c") == [(b"b", b"bb"), (b"b\0\0", b"b\0\0b\0\0")]
            assert [k for k, _ in txn.range(b"a", b"c", 2)] == keys[:2]
            assert [k for k, _ in txn.range(b"a", b"c", 2, reverse=True)] == [b"b\0\0", b"b"]
            assert txn.range(b"c", b"a") == []
            assert [k for k, _ in txn.range(b"a", kv.prefix_end(b"a"))] == keys[:3]
            txn.delete(b"a\0")
            txn.put(b"aa", b"")
            txn.put(b"a", b"new")
            assert txn.range(b"a", b"b", 2) == [(b"a", b"new"), (b"aa", b"")]
            assert [k for k, _ in txn.range(b"a", b"b", 2, reverse=True)] == [b"a\xff", b"aa"]

    def test_read_only(self, store: Store) -> None:
        with store.transact(read_only=True) as txn:
            with pytest.raises(StoreError):
                txn.put(b"k", b"")
            with pytest.raises(StoreError):
                txn.delete(b"k")
            txn.commit()

    def test_snapshot(self, store: Store) -> None:
        kv.run(store, _put(b"k", b"1"))
        with store.transact() as txn:
            assert txn.get(b"k") == b"1"
            kv.run(store, _put(b"k", b"2"))
            kv.run(store, _put(b"l", b"2"))
            assert txn.get(b"k") == b"1"
            assert txn.get(b"l") is None
            assert txn.range(b"k", b"z") == [(b"k", b"1")]
            txn.commit()  # wrote nothing: its reads were one consistent past

    def test_conflict_on_read_key(self, store: Store) -> None:
        with store.transact() as txn:
            assert txn.get(b"k") is None
            txn.put(b"out", b"1")
            kv.run(store, _put(b"k"))
            with pytest.raises(Conflict):
                txn.commit()
        assert kv.read(store, lambda t: t.get(b"out")) is None

    @pytest.mark.parametrize("change", ["insert", "delete", "update"])
    def test_conflict_on_range(self, store: Store, change: str) -> None:
        kv.run(store, _put(b"r1"))
        with store.transact() as txn:
            txn.range(b"r", b"s")
            txn.put(b"out", b"1")
            if change == "insert":
                kv.run(store, _put(b"r2"))
            elif change == "delete":
                kv.run(store, lambda t: t.delete(b"r1"))
            else:
                kv.run(store, _put(b"r1", b"other"))
            with pytest.raises(Conflict):
                txn.commit()
        assert kv.read(store, lambda t: t.get(b"out")) is None

    def test_no_conflict_without_overlap(self, store: Store) -> None:
        kv.run(store, _put(b"r1"))
        with store.transact() as txn:
            assert txn.range(b"r", b"s", 1) == [(b"r1", b"v")]
            txn.get(b"k")
            txn.put(b"out", b"1")
            kv.run(store, _put(b"other"))
            kv.run(store, _put(b"r2"))  # beyond what the limited range returned
            kv.run(store, _put(b"out", b"0"))  # written, not read
            txn.commit()
        assert kv.read(store, lambda t: t.get(b"out")) == b"1"

    def test_write_skew(self, store: Store) -> None:
        with store.transact() as one, store.transact() as two:
            assert one.get(b"x") is None
            assert two.get(b"y") is None
            one.put(b"y", b"1")
            two.put(b"x", b"1")
            one.commit()
            with pytest.raises(Conflict):
                two.commit()

    def test_run_is_bounded(self, store: Store) -> None:
        tries = 0

        def body(txn: Txn) -> None:
            nonlocal tries
            tries += 1
            txn.get(b"k")
            txn.put(b"out", b"")
            kv.run(store, _put(b"k", b"%d" % tries))

        with pytest.raises(Conflict):
            kv.run(store, body, retries=3)
        assert tries == 4

    def test_counter_from_threads(self, store: Store) -> None:
        def add(txn: Txn) -> None:
            txn.put(b"n", b"%d" % (int(txn.get(b"n") or b"0") + 1))

        def work() -> None:
            for _ in range(50):
                kv.run(store, add, retries=1000)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert kv.read(store, lambda t: t.get(b"n")) == b"200"

    def test_limits(self, store: Store) -> None:
        with store.transact() as txn:
            txn.put(b"k" * kv.MAX_KEY, b"v" * kv.MAX_VALUE)
            for key in (b"", b"k" * (kv.MAX_KEY + 1)):
                with pytest.raises(LimitError):
                    txn.put(key, b"")
                with pytest.raises(LimitError):
                    txn.get(key)
                with pytest.raises(LimitError):
                    txn.delete(key)
            with pytest.raises(LimitError):
                txn.put(b"k", b"v" * (kv.MAX_VALUE + 1))
            for limit in (0, -1, kv.MAX_RANGE + 1):
                with pytest.raises(LimitError):
                    txn.range(b"a", b"b", limit)
            txn.commit()
        value = kv.read(store, lambda t: t.get(b"k" * kv.MAX_KEY))
        assert value == b"v" * kv.MAX_VALUE

    def test_too_many_writes(self, store: Store) -> None:
        with store.transact() as txn:
            for n in range(kv.MAX_WRITES):
                txn.put(b"%d" % n, b"")
            txn.put(b"0", b"again")
            with pytest.raises(LimitError):
                txn.put(b"one more", b"")

    def test_close(self, store: Store) -> None:
        txn = store.transact()
        txn.get(b"k")
        store.close()
        store.close()
        with pytest.raises(StoreError):
            store.transact()
        with pytest.raises(StoreError):
            store.sync()
        txn.abort()

    def test_reopen(self, tmp_path: Path) -> None:
        for n in range(3):
            with open_by_name(self.opener, str(tmp_path)) as store:
                assert len(kv.read(store, lambda t: t.range(b"a", b"b"))) == n
                kv.run(store, _put(b"a%d" % n))
                if n == 1:
                    store.sync()

    def test_two_opened_at_once(self, store: Store, tmp_path: Path) -> None:
        with open_by_name(self.opener, str(tmp_path)) as other:
            kv.run(store, _put(b"k", b"1"))
            assert kv.read(other, lambda t: t.get(b"k")) == b"1"
            with other.transact() as txn:
                txn.get(b"k")
                txn.put(b"k", b"3")
                kv.run(store, _put(b"k", b"2"))
                with pytest.raises(Conflict):
                    txn.commit()

    def test_watch(self, store: Store, tmp_path: Path) -> None:
        async def main() -> None:
            kv.run(store, _put(b"w/old", b"1"))
            watch = store.watch(b"w/")
            with open_by_name(self.opener, str(tmp_path)) as other, trio.fail_after(10):
                kv.run(store, _put(b"w/1"))
                kv.run(store, _put(b"x/1"))
                assert await anext(watch) == b"w/1"
                kv.run(other, _put(b"w/2"))
                assert await anext(watch) == b"w/2"
                kv.run(other, lambda t: t.delete(b"w/old"))
                assert await anext(watch) == b"w/old"
                kv.run(other, _put(b"w/1", b"other"))
                async for key in watch:
                    assert key == b"w/1"
                    break
                with trio.move_on_after(0.2) as scope:
                    await anext(watch)
                assert scope.cancelled_caught
            watch.close()
            with pytest.raises(StopAsyncIteration):
                await anext(watch)

        trio.run(main)

    @pytest.mark.timeout(60)
    def test_kill_loses_nothing_acknowledged(self, tmp_path: Path) -> None:
        acknowledged = -1
        for round_ in range(4):
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD, self.opener, str(tmp_path), str(acknowledged + 1)],
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": self.child_path()},
            )
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    acknowledged = int(line)
                    if acknowledged >= (round_ + 1) * 400:
                        break
            finally:
                child.send_signal(signal.SIGKILL)
                rest = child.stdout.read()
                child.wait()
                child.stdout.close()
            whole = [int(line) for line in rest.splitlines(keepends=True) if line.endswith(b"\n")]
            acknowledged = max([acknowledged, *whole])
            assert acknowledged >= (round_ + 1) * 400
            with open_by_name(self.opener, str(tmp_path)) as store:
                last = int(kv.read(store, lambda t: t.get(b"last")) or b"-1")
                assert acknowledged <= last <= acknowledged + 1
                with store.transact(read_only=True) as txn:
                    for n in range(last + 1):
                        assert txn.get(b"a%08d" % n) == b"x" * (n % 3000)
                        assert txn.get(b"b%08d" % n) == b"%d" % n
                    assert txn.get(b"a%08d" % (last + 1)) is None
                acknowledged = last

    @pytest.mark.timeout(120)
    def test_against_a_dict(self) -> None:
        opener = self.opener

        class Machine(StoreMachine):
            def __init__(self) -> None:
                super().__init__(opener)

        run_state_machine_as_test(  # pyright: ignore[reportUnknownMemberType]
            Machine,
            settings=settings(
                max_examples=60,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )


KEYS = st.binary(min_size=1, max_size=3).map(lambda b: bytes(x % 4 for x in b))
VALUES = st.binary(max_size=8)


class StoreMachine(RuleBasedStateMachine):
    """Two interleaved transactions against a dict: reads show the snapshot plus own writes; a commit succeeds
    exactly when repeating its reads on the current state gives what they gave."""

    def __init__(self, opener: str) -> None:
        super().__init__()
        self.opener = opener
        self.directory = tempfile.TemporaryDirectory()
        self.store = open_by_name(opener, self.directory.name)
        self.model: dict[bytes, bytes] = {}
        self.txns: list[_Open | None] = [None, None]

    def _open(self, slot: int) -> _Open:
        found = self.txns[slot]
        if found is None:
            found = self.txns[slot] = _Open(self.store.transact(), dict(self.model))
            found.txn.get(b"snapshot")  # the first read takes the snapshot
        return found

    @rule(slot=st.integers(0, 1), key=KEYS)
    def get(self, slot: int, key: bytes) -> None:
        state = self._open(slot)
        assert state.txn.get(key) == state.view().get(key)
        if key not in state.writes:
            state.reads.append((key, key + b"\0", 1, False))

    @rule(slot=st.integers(0, 1), begin=KEYS, end=KEYS, limit=st.integers(1, 5), reverse=st.booleans())
    def range(self, slot: int, begin: bytes, end: bytes, limit: int, reverse: bool) -> None:
        state = self._open(slot)
        found = state.txn.range(begin, end, limit, reverse=reverse)
        assert found == _select(state.view(), begin, end, limit, reverse)
        gone = sum(v is None and begin <= k < end for k, v in state.writes.items())
        state.reads.append((begin, end, limit + gone, reverse))

    @rule(slot=st.integers(0, 1), key=KEYS, value=VALUES)
    def put(self, slot: int, key: bytes, value: bytes) -> None:
        state = self._open(slot)
        state.txn.put(key, value)
        state.writes[key] = value

    @rule(slot=st.integers(0, 1), key=KEYS)
    def delete(self, slot: int, key: bytes) -> None:
        state = self._open(slot)
        state.txn.delete(key)
        state.writes[key] = None

    @rule(slot=st.integers(0, 1))
    def commit(self, slot: int) -> None:
        state = self._open(slot)
        self.txns[slot] = None
        valid = not state.writes or all(_select(self.model, *r) == _select(state.base, *r) for r in state.reads)
        try:
            state.txn.commit()
        except Conflict:
            assert not valid
            return
        assert valid
        for key, value in state.writes.items():
            if value is None:
                self.model.pop(key, None)
            else:
                self.model[key] = value

    @rule(slot=st.integers(0, 1))
    def abort(self, slot: int) -> None:
        self._open(slot).txn.abort()
        self.txns[slot] = None

    @rule()
    def sync(self) -> None:
        self.store.sync()

    @precondition(lambda self: self.txns == [None, None])
    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = open_by_name(self.opener, self.directory.name)

    @invariant()
    def committed_state(self) -> None:
        found = kv.read(self.store, lambda t: t.range(b"", b"\xff"))
        assert found == sorted(self.model.items())

    def teardown(self) -> None:
        self.store.close()
        self.directory.cleanup()


class _Open:
    def __init__(self, txn: Txn, base: dict[bytes, bytes]) -> None:
        self.txn = txn
        self.base = base
        self.writes: dict[bytes, bytes | None] = {}
        self.reads: list[tuple[bytes, bytes, int, bool]] = []

    def view(self) -> dict[bytes, bytes]:
        return {k: v for k, v in (self.base | self.writes).items() if v is not None}


def _select(
    state: dict[bytes, bytes], begin: bytes, end: bytes, limit: int, reverse: bool
) -> list[tuple[bytes, bytes]]:
    return sorted(((k, v) for k, v in state.items() if begin <= k < end), reverse=reverse)[:limit]
