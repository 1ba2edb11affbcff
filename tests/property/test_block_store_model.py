"""The block API against a dict: any sequence of puts, gets with ranges, evictions, scans, checkpoints and restarts."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

pytest.importorskip("kvfs._node", reason="the native modules are not built")
pytest.importorskip("kvfs_usrbio._native", reason="the native modules are not built")

from kvfs.node import Namespace, Node, NodeConfig, format_store
from kvfs_usrbio import MISS, BlockStore

# Keys that are each other's prefixes or differ in the last byte, one that is hashed, and every kind of length.
KEYS = st.sampled_from([b"a", b"ab", b"ab\0", b"b" * 31, b"b" * 32, b"c" * 33, b"c" * 200])
SIZES = st.one_of(st.integers(1, 600), st.integers(4000, 9000), st.sampled_from([65536, 65537, 1 << 20, (1 << 20) + 1]))
OFFSETS = st.one_of(st.just(0), st.integers(0, 70_000))


def value(seed: int, size: int) -> bytes:
    unit = seed.to_bytes(4, "little") + bytes(range(1, 124))  # of 127 bytes, so that no two sub-blocks are alike
    return (unit * (size // len(unit) + 1))[:size]


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.data = Path(self.directory.name) / "data"
        format_store(self.data, 64 << 20, segment_bytes=1 << 20, journal_bytes=4 << 20)
        self.model: dict[bytes, bytes] = {}
        self.seed = 0
        self.start()

    def start(self) -> None:
        self.node = Node.start(NodeConfig(self.data, socket=self.data.with_name("sock"), memory_bytes=1 << 20))
        self.node.put_namespace("t", "n", Namespace(16, evictable=False))
        self.store = BlockStore.open(self.data.with_name("sock"), "t/n")

    def teardown(self) -> None:
        self.store.close()
        self.node.stop()
        self.directory.cleanup()

    @initialize()
    def empty(self) -> None:
        assert list(self.store.scan()) == []

    @rule(keys=st.lists(KEYS, min_size=1, max_size=4, unique=True), size=SIZES, durable=st.booleans())
    def put(self, keys: list[bytes], size: int, durable: bool) -> None:
        self.seed += 1
        values = [value(self.seed * 8 + i, size) for i in range(len(keys))]
        expected: list[int] = []
        for key, data in zip(keys, values, strict=True):
            there = self.model.get(key)
            expected.append(1 if there is None else 0 if len(there) == size else -errno.EEXIST)
            self.model.setdefault(key, data)
        assert self.store.put(keys, values, durable=durable) == expected

    @rule(keys=st.lists(KEYS, min_size=1, max_size=4), offset=OFFSETS, size=SIZES)
    def get(self, keys: list[bytes], offset: int, size: int) -> None:
        dests = [bytearray(size) for _ in keys]
        results = self.store.get(keys, dests, offsets=[offset] * len(keys))
        for key, dest, result in zip(keys, dests, results, strict=True):
            there = self.model.get(key)
            if there is None:
                assert result == MISS
                continue
            part = there[offset : offset + size]
            assert result == len(part)
            assert dest[: len(part)] == part
            assert not any(dest[len(part) :])

    @rule(keys=st.lists(KEYS, min_size=1, max_size=3, unique=True))
    def evict(self, keys: list[bytes]) -> None:
        expected = [MISS if self.model.pop(key, None) is None else 0 for key in keys]
        assert self.store.evict(keys) == expected

    @rule(keys=st.lists(KEYS, max_size=7))
    def match_prefix(self, keys: list[bytes]) -> None:
        there = [key in self.model for key in keys]
        assert self.store.match_prefix(keys) == [*there, False].index(False)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.node.stop()
        self.start()

    @invariant()
    def everything_is_listed(self) -> None:
        assert sorted(entry.length for entry in self.store.scan()) == sorted(len(v) for v in self.model.values())
        keys = list(self.model)
        assert self.store.exists(keys) == [len(self.model[key]) for key in keys]


@pytest.mark.timeout(120)
def test_block_store_is_a_dict() -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
