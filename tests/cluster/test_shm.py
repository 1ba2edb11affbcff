"""Clients and chunk servers on one host, with shared memory between them beside TCP."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Cluster, cluster
from test_remote_mount import mounted

from commands import kvfs
from kvfs_usrbio import MISS, BlockStore
from waiting import wait_for

SIZES = (1, 4096, 65537, 1 << 20, 16 << 20)
LIMIT = 30
SMALL = 1 << 20  # over TCP the beginning of a payload may come with a frame's header


@pytest.fixture
def sockets() -> Iterator[Path]:
    """Where the sockets of shm:// are, for the servers and the clients of a test."""
    place = Path(tempfile.mkdtemp(prefix="kvfs-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFS_SHM_DIR", str(place))
        yield place
    shutil.rmtree(place)


@pytest.fixture
def near(sockets: Path) -> Iterator[Cluster]:
    """Two servers that listen on shm:// too."""
    with cluster(2, shm=True) as made:
        yield made


def copied(made: Cluster) -> float:
    """Bytes that servers have copied: all that goes through memory, and hardly any over TCP."""
    return sum(server.metric("kvfs_server_copied_total") for server in made.servers)


def write(store: BlockStore, count: int = 20, size: int = 300_000) -> dict[bytes, bytes]:
    values = {os.urandom(32): os.urandom(size) for _ in range(count)}
    assert store.put(list(values), list(values.values()), durable=True) == [1] * count
    return values


def read(store: BlockStore, values: dict[bytes, bytes]) -> None:
    into = [bytearray(len(v)) for v in values.values()]
    assert store.get(list(values), into) == [len(v) for v in values.values()]
    assert into == list(values.values())


def through_memory(made: Cluster, store: BlockStore) -> bool:
    before = copied(made)
    values = write(store, 10)
    return copied(made) - before >= sum(map(len, values.values()))


def test_values_of_all_sizes_go_through_memory_and_come_back(near: Cluster) -> None:
    with BlockStore.open(near.url("cache"), token=near.token("cache:rw")) as store:
        wait_for(lambda: through_memory(near, store), LIMIT)
        keys = [os.urandom(32) for _ in SIZES]
        values = [os.urandom(size) for size in SIZES]
        before = copied(near)
        assert store.put(keys, values) == [1] * len(SIZES)
        assert store.exists([*keys, b"nobody"]) == [*SIZES, MISS]
        into = [bytearray(size) for size in SIZES]
        assert store.get(keys, into) == list(SIZES)
        assert into == values
        assert copied(near) - before >= 2 * sum(SIZES)
        assert {e.key for e in store.scan()} >= set(keys)
        assert store.evict(keys) == [0] * len(keys)
        assert store.exists(keys) == [MISS] * len(keys)
    assert sum(s.metric("kvfs_server_protocol_errors_total") for s in near.servers) == 0


def test_who_has_no_right_to_something_has_none_through_memory(near: Cluster) -> None:
    with BlockStore.open(near.url("cache"), token=near.token("cache:rw")) as store:
        wait_for(lambda: through_memory(near, store), LIMIT)
        key = os.urandom(32)
        assert store.put([key], [b"x" * 5000]) == [1]
        with BlockStore.open(near.url("cache"), token=near.token("cache:ro")) as reader:
            into = bytearray(5000)
            assert reader.get([key], [into]) == [5000]
            assert reader.put([os.urandom(32)], [b"y"])[0] < 0


def test_a_server_that_is_killed_comes_back_and_so_does_its_shared_memory(near: Cluster, sockets: Path) -> None:
    with BlockStore.open(near.url("kept"), token=near.token("kept:rw")) as store:
        wait_for(lambda: through_memory(near, store), LIMIT)
        values = write(store)
        for server in near.servers:
            server.kill()
        assert len(list(sockets.iterdir())) == 2, "the sockets of the dead are still there"
        for server in near.servers:
            server.start()
        read(store, values)
        wait_for(lambda: through_memory(near, store), LIMIT)
        read(store, values)


def test_without_its_socket_a_server_is_reached_over_tcp(near: Cluster, sockets: Path) -> None:
    with BlockStore.open(near.url("kept"), token=near.token("kept:rw")) as before:
        wait_for(lambda: through_memory(near, before), LIMIT)
        values = write(before)
        for path in sockets.iterdir():
            path.unlink()
        read(before, values)
        with BlockStore.open(near.url("kept"), token=near.token("kept:rw")) as store:
            time.sleep(1)
            bytes_copied = copied(near)
            read(store, values)
            write(store)
            assert copied(near) - bytes_copied < SMALL, "a client that came later"


def test_a_socket_of_the_same_name_but_another_server_is_not_used(near: Cluster, sockets: Path) -> None:
    one, two = sorted(sockets.iterdir())
    one.rename(sockets / "kept")
    two.rename(one)
    (sockets / "kept").rename(two)
    with BlockStore.open(near.url("kept"), token=near.token("kept:rw")) as store:
        values = write(store)
        time.sleep(1)
        bytes_copied = copied(near)
        opened = sum(s.metric("kvfs_server_sessions_opened_total") for s in near.servers)
        read(store, values)
        assert copied(near) - bytes_copied < SMALL
        assert sum(s.metric("kvfs_server_sessions_opened_total") for s in near.servers) == opened == 2


def test_servers_that_end_in_order_leave_no_sockets(near: Cluster, sockets: Path) -> None:
    assert len(list(sockets.iterdir())) == 2
    assert [server.stop() for server in near.servers] == [0, 0]
    assert list(sockets.iterdir()) == []


def test_a_mount_works_through_memory(near: Cluster, tmp_path: Path) -> None:
    directory = tmp_path / "names"
    content = os.urandom(20 << 20)
    with mounted(near, directory, near.token("home:rw")) as point:

        def rails() -> list[dict[str, object]]:
            return json.loads(kvfs("status", "--dir", directory, "--json"))["rails"]

        wait_for(lambda: sum(r["transport"] == 3 and bool(r["up"]) for r in rails()) == 2, LIMIT, "both are up")
        (point / "file").write_bytes(content)
        os.sync()
        assert (point / "file").read_bytes() == content
        assert sum(int(str(r["bytes_out"])) for r in rails() if r["transport"] == 3) >= len(content)
    with mounted(near, directory, near.token("home:rw")) as point:
        assert (point / "file").read_bytes() == content
