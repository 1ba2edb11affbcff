"""Bytes that are damaged between client and server: with data sums nobody ever sees them; without these the sums of frames still
protect what results mean."""

from __future__ import annotations

import errno
import itertools
import os
import random
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from proxy import DATA_SUMS, REQUEST, RESPONSE, Frame, Part, Proxy, damage, proxy
from servers import Cluster, Server, cluster_of, free_port
from test_remote_mount import mounted

from kvfs_usrbio import MISS, BlockStore

SIZES = (100, 4096, 70_000, 1 << 20, 5 << 20)
TIMEOUT = 20.0


@dataclass
class Behind(Server):
    """A server that the cluster's map has at the proxy before it."""

    front: Proxy | None = None

    @property
    def url(self) -> str:
        assert self.front is not None
        return f"tcp://127.0.0.1:{self.front.port}"

    @property
    def host(self) -> str:
        return self.url.removeprefix("tcp://")

    @property
    def listens(self) -> list[str]:
        return [f"tcp://127.0.0.1:{self.port}"]


@contextmanager
def behind_a_proxy(more: str = "") -> Generator[tuple[Cluster, Proxy]]:
    port = free_port()
    with proxy(port) as front:

        def make(directory: Path) -> Server:
            return Behind(directory, port, free_port(), front=front)

        with cluster_of([make], more=more) as made:
            yield made, front


@pytest.fixture(params=["sums", "no sums here", "no sums at the server"])
def any_sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[tuple[Cluster, Proxy, bool]]:
    """And whether there are any."""
    if request.param == "no sums here":
        monkeypatch.setenv("KVFS_REMOTE_DATA_SUMS", "false")
    with behind_a_proxy("data_sums = false\n" if request.param == "no sums at the server" else "") as (made, front):
        yield made, front, request.param == "sums"


def opened(made: Cluster, name: str = "cache") -> BlockStore:
    return BlockStore.open(made.url(name), token=made.token(f"{name}:rw"), timeout=TIMEOUT)


def put_some(store: BlockStore) -> dict[bytes, bytes]:
    values = {os.urandom(32): os.urandom(size) for size in SIZES}
    assert store.put(list(values), list(values.values())) == [1] * len(SIZES)
    return values


def got(store: BlockStore, values: dict[bytes, bytes]) -> tuple[list[int], list[bytearray]]:
    into = [bytearray(len(value)) for value in values.values()]
    return store.get(list(values), into), into


def agree(front: Proxy, sums: bool) -> None:
    """The sessions so far have agreed on sums or on none, and that is how payloads came."""
    assert {bool(features & DATA_SUMS) for features in front.features} == {sums}
    assert front.sums == {sums}


def test_blocks_and_files_come_back_with_and_without_sums(
    any_sums: tuple[Cluster, Proxy, bool], tmp_path: Path
) -> None:
    made, front, sums = any_sums
    with opened(made) as store:
        values = put_some(store)
        assert got(store, values) == (list(SIZES), list(values.values()))
    content = os.urandom(5_000_000)
    with mounted(made, tmp_path / "names", made.token("home:rw")) as point:
        (point / "file").write_bytes(content)
    with mounted(made, tmp_path / "names", made.token("home:rw")) as point:
        assert (point / "file").read_bytes() == content
    agree(front, sums)


def test_a_damaged_frame_costs_its_connection_and_changes_no_result(any_sums: tuple[Cluster, Proxy, bool]) -> None:
    made, front, sums = any_sums
    with opened(made) as store:
        values = put_some(store)
        for kind, part in itertools.product((REQUEST, RESPONSE), (Part.HEADER, Part.BODY)):
            before = front.damaged
            front.change = damage(kind, part, 3)
            more = put_some(store)
            for _ in range(3):
                assert got(store, values) == (list(SIZES), list(values.values()))
                assert got(store, more) == (list(SIZES), list(more.values()))
            assert front.damaged - before == 3, (kind, part)
            assert store.exists([*values, b"nobody"]) == [*SIZES, MISS]
    agree(front, sums)


def test_with_sums_what_was_damaged_is_sent_again() -> None:
    with behind_a_proxy() as (made, front), opened(made) as store:
        values = put_some(store)
        for times in (1, 3):
            before = front.damaged
            front.change = damage(RESPONSE, Part.PAYLOAD, times)
            assert got(store, values) == (list(SIZES), list(values.values()))
            front.change = damage(REQUEST, Part.PAYLOAD, times)
            more = put_some(store)
            assert front.damaged - before == 2 * times
            assert got(store, more) == (list(SIZES), list(more.values()))


def test_with_sums_what_is_damaged_every_time_is_an_error_and_never_wrong_bytes() -> None:
    with behind_a_proxy() as (made, front), opened(made) as store:
        values = put_some(store)
        front.change = damage(RESPONSE, Part.PAYLOAD)
        begin = time.monotonic()
        results, into = got(store, values)
        assert time.monotonic() - begin < TIMEOUT
        assert front.damaged >= 4
        for value, result, found in zip(values.values(), results, into, strict=True):
            assert result == -errno.EIO or (result == len(value) and found == value)
        assert -errno.EIO in results

        front.change = damage(REQUEST, Part.PAYLOAD)
        keys = [os.urandom(32) for _ in SIZES]
        results = [store.put([key], [os.urandom(size)])[0] for key, size in zip(keys, SIZES, strict=True)]
        assert results == [-errno.EIO] * len(SIZES)
        assert store.exists(keys) == [MISS] * len(SIZES)

        front.change = None
        assert got(store, values) == (list(SIZES), list(values.values()))
        assert store.put(keys, [b"x" * 5000] * len(SIZES)) == [1] * len(SIZES)


class NowAndThen:
    """Damages payloads of some frames, either way."""

    def __init__(self, times: int) -> None:
        self.rng = random.Random(3)
        self.left = times
        self.wait = 0

    def __call__(self, frame: Frame) -> bool:
        if not frame.payload or not self.left:
            return False
        self.wait -= 1
        if self.wait >= 0:
            return False
        self.wait = self.rng.randrange(2, 9)
        self.left -= 1
        frame.payload[self.rng.randrange(len(frame.payload))] ^= 1 << self.rng.randrange(8)
        return True


def test_with_sums_files_are_whole_whatever_is_damaged_on_the_way(tmp_path: Path) -> None:
    content = os.urandom(8_000_000)
    with behind_a_proxy() as (made, front), mounted(made, tmp_path / "names", made.token("home:rw")) as point:
        front.change = NowAndThen(12)
        with open(point / "file", "wb") as f:
            f.write(content)
            os.fsync(f.fileno())
        for _ in range(3):
            with open(point / "file", "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert f.read() == content
        assert front.damaged >= 6


def test_without_sums_a_damaged_answer_is_what_the_caller_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is the sums that notice it."""
    monkeypatch.setenv("KVFS_REMOTE_DATA_SUMS", "false")
    with behind_a_proxy() as (made, front), opened(made) as store:
        value = os.urandom(300_000)
        assert store.put([b"key"], [value]) == [1]
        front.change = damage(RESPONSE, Part.PAYLOAD, 1)
        into = bytearray(len(value))
        assert store.get([b"key"], [into]) == [len(value)]
        assert front.damaged == 1
        assert [i for i in range(len(value)) if into[i] != value[i]] == [len(value) // 2]
        assert store.get([b"key"], [into]) == [len(value)]
        assert into == value
