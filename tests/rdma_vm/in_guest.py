"""kvfs as a whole over RDMA: what test_rdma_kvfs.py runs in the virtual machine.

One server on rxe2 and rxe3, clients on rxe0 and rxe1: four rails over RDMA, and TCP, which holds the sessions.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starter import Starter

from cluster.servers import Cluster, Server, free_port, new_key
from commands import run
from kvfs import daemon
from kvfs.cluster import file
from kvfs.cluster.map import Class
from kvfs.mount import service
from kvfs.node import RailStats
from kvfs_usrbio import MISS, BlockStore
from ring_clients import CHUNK, Way, clients_at_work, go_on, new_ring, old_ring, plain
from waiting import wait_for

ADDRESSES = ("10.90.0.3", "10.90.0.4")
SIZES = (4096, 16384, 16385, 65536, (1 << 20) + 1, 5 << 20, 16 << 20)
CALL_S = 60.0  # the machine is emulated
WAIT_S = 90.0
RING_S = 8.0  # of a mount daemon's operations on the server
SLOW_S = 20.0
CONNECTIONS = 2  # over each rail, as `remote.connections` says


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    made = Starter()
    yield made
    made.end()


@dataclass(kw_only=True)
class FabricServer(Server):
    starter: Starter

    def launch(self) -> None:
        self.process = self.starter.start(["serve", "chunk", "--config", self.config], self.directory / "log")

    @property
    def url(self) -> str:
        return f"tcp://{ADDRESSES[0]}:{self.port}"

    @property
    def host(self) -> str:
        return f"{ADDRESSES[0]}:{self.port}"


@pytest.fixture(scope="module")
def one(starter: Starter) -> Iterator[Cluster]:
    place = Path(tempfile.mkdtemp(prefix="kvfs-", dir="/var/tmp"))
    made = Cluster(place, [])
    server = FabricServer(place, 7117, free_port(), starter=starter)
    made.servers.append(server)
    listen = [server.url, *(f"rdma://{address}:7118" for address in ADDRESSES)]
    new_key(made.key)
    server.config.write_text(
        f'cluster = "{made.file}"\nlisten = {json.dumps(listen)}\nauth_key = "{made.key}.pub"\n'
        f'admin = "127.0.0.1:{server.admin}"\nbuffers = "64M"\nkeep = 5.0\n'
        f'[[device]]\npath = "{server.device}"\nsize = "256M"\nmemory = "16M"\n'
    )
    entries = file.ClusterFile(file.ClusterSection(1, 256)).with_target(listen)
    for name, cls in (("cache", Class.CACHE), ("kept", Class.DURABLE)):
        entries = entries.with_namespace("acme", name, cls)
    for name in ("home", "work", "rings"):
        entries = entries.with_namespace("acme", name, Class.VOLUME)
    file.store(made.file, entries)
    try:
        server.start()
        yield made
    finally:
        server.end()
        shutil.rmtree(place)


@pytest.fixture(autouse=True)
def over_rdma(no_kvfs_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFS_REMOTE_TRANSPORT", "rdma")
    monkeypatch.setenv("KVFS_REMOTE_RAILS", "rxe0,rxe1")


Mounter = Callable[..., AbstractContextManager[Path]]


@pytest.fixture
def mounted(one: Cluster, starter: Starter, tmp_path: Path) -> Mounter:
    """mounted(volume, directory, more grants): its mount, by a daemon that is gone afterwards."""

    @contextmanager
    def mount(volume: str, directory: Path, *grants: str) -> Generator[Path]:
        point = directory.with_name(directory.name + "-mnt")
        point.mkdir(exist_ok=True)
        log = tmp_path / "log"
        command = ["mount", one.url(volume), point, "--dir", directory, "--token", one.token(f"{volume}:rw", *grants)]
        daemon = starter.start(command, log)
        try:
            wait_for(lambda: service.is_mounted(point) or daemon.poll() is not None, WAIT_S, "it is mounted")
            assert daemon.poll() is None, log.read_text()
            yield point
        finally:
            daemon.terminate()
            try:
                assert daemon.wait(WAIT_S) == 0, log.read_text()
            finally:
                daemon.kill()
                service.unmount(point)

    return mount


def status(directory: Path) -> daemon.StatusReport:
    found = daemon.ask(directory, "status").status
    assert found is not None
    return found


def rails(directory: Path, device: str) -> list[RailStats]:
    """Of this device's port."""
    every = status(directory).rails
    found = [rail for rail in every if rail.name.endswith(f"@{device}/1")]
    assert len(found) == len(ADDRESSES), every
    return found


class Work(threading.Thread):
    """Does it again and again until told to end."""

    def __init__(self, once: Callable[[], None]) -> None:
        super().__init__()
        self.once = once
        self.done = 0
        self.enough = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                self.once()
                self.done += 1
        except BaseException as e:
            self.failure = e

    def wait_for_more(self, count: int) -> None:
        until = self.done + count
        wait_for(lambda: self.failure is not None or self.done >= until, WAIT_S, "operations go on")
        if self.failure is not None:
            raise self.failure

    def end(self) -> None:
        self.enough.set()
        self.join(WAIT_S)
        assert not self.is_alive()
        if self.failure is not None:
            raise self.failure


@contextmanager
def working(once: Callable[[], None]) -> Generator[Work]:
    work = Work(once)
    work.start()
    try:
        yield work
    finally:
        work.end()


def test_the_devices_are_seen_and_would_be_used(starter: Starter, tmp_path: Path) -> None:
    def seen(*options: str) -> dict[str, Any]:
        log = tmp_path / f"log{len(options)}"
        assert starter.start(["rails", "--json", *options], log).wait(WAIT_S) == 0, log.read_text()
        return json.loads(log.read_text())

    report = seen()
    assert report["source"] == "pyverbs", report["note"]
    ports = {port["device"]: port for port in report["ports"]}
    assert set(ports) == {"rxe0", "rxe1", "rxe2", "rxe3"}
    assert all(port["state"] == "active" and port["used"] for port in ports.values())
    chosen = seen("--devices=eth0,rxe1/1")
    assert [port["device"] for port in chosen["ports"] if port["used"]] == ["rxe0", "rxe1"]


def test_blocks_of_all_sizes_come_back_byte_for_byte(one: Cluster) -> None:
    transfers = one.servers[0].metric("kvfs_server_rdma_total")
    with BlockStore.open(one.url("cache"), token=one.token("cache:rw"), timeout=CALL_S) as store:
        keys = [os.urandom(32) for _ in SIZES]
        values = [os.urandom(size) for size in SIZES]
        assert store.put(keys, values) == [1] * len(SIZES)
        assert store.put(keys, values) == [0] * len(SIZES)
        assert store.exists([*keys, b"nobody"]) == [*SIZES, MISS]
        into = [bytearray(size) for size in SIZES]
        assert store.get(keys, into) == list(SIZES)
        assert into == values
        part = bytearray(100_000)
        assert store.get([keys[-1]], [part], [1 << 20]) == [100_000]
        assert part == values[-1][1 << 20 : (1 << 20) + 100_000]
        many = [b"many-%03d" % i for i in range(300)]
        buffer = store.alloc(300 * 4096)
        buffer.view[:] = whole = os.urandom(len(buffer))
        assert store.put_from(many, buffer, 4096) == [1] * 300
        buffer.view[:] = bytes(len(buffer))
        assert store.get_into(many, buffer, 4096) == [4096] * 300
        assert bytes(buffer.view) == whole
        assert {e.key for e in store.scan()} >= {*keys, *many}
        assert store.evict([*keys, *many, b"nobody"]) == [0] * (len(SIZES) + 300) + [MISS]
    assert one.servers[0].metric("kvfs_server_rdma_total") - transfers >= 2 * (len(SIZES) + 300)


def test_files_are_there_after_a_new_mount_and_went_over_both_ports(mounted: Mounter, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for i in range(20):
        (tree / f"f{i}").write_bytes(os.urandom(i * 5077))
    (tree / "large").write_bytes(os.urandom(12 << 20))
    names = sorted(os.listdir(tree))
    directory = tmp_path / "names"
    with mounted("home", directory) as point:
        run("cp", "-a", f"{tree}/.", point)
        assert filecmp.cmpfiles(tree, point, names, shallow=False) == (names, [], [])
    with mounted("home", directory) as point:

        def all_rails_carry() -> bool:
            Path("/proc/sys/vm/drop_caches").write_text("1")
            assert filecmp.cmpfiles(tree, point, names, shallow=False) == (names, [], [])
            return all(rail.bytes_in > 0 for device in ("rxe0", "rxe1") for rail in rails(directory, device))

        wait_for(all_rails_carry, WAIT_S, "every rail has carried something")
        seen = status(directory).rails
        fast = [rail for rail in seen if rail.transport == 2]
        assert len(fast) == 4, seen
        assert all(rail.up for rail in fast), seen
        assert [(r.up, r.bytes_in, r.bytes_out) for r in seen if r.transport == 1] == [(1, 0, 0)]


def test_ring_clients_of_a_mount_work_over_rdma_and_outlive_the_server(
    one: Cluster, mounted: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFS_REMOTE_DEADLINE", str(RING_S))
    server = one.servers[0]
    sizes = (4096, 65537, (1 << 20) + 1, 5 << 20)
    keys = [os.urandom(32) for _ in sizes]
    values = [os.urandom(size) for size in sizes]
    directory = tmp_path / "names"
    with mounted("rings", directory, "cache:rw", "kept:rw") as point:
        pid = status(directory).pid
        moved = server.metric("kvfs_server_rdma_total")
        with BlockStore.open(point, "acme/cache", timeout=CALL_S) as store:
            assert store.put(keys, values) == [1] * len(sizes)
            into = [bytearray(size) for size in sizes]
            assert store.get(keys, into) == list(sizes)
            assert into == values
            for key, value in zip(keys, values, strict=True):
                assert (point / ".kvfs/blocks/acme/cache" / key.hex()[:2] / key.hex()).read_bytes() == value
            buffer = store.alloc(64 * 4096)
            buffer.view[:] = whole = os.urandom(len(buffer))
            many = [b"ring-%02d" % i for i in range(64)]
            assert store.put_from(many, buffer, 4096) == [1] * 64
            buffer.view[:] = bytes(len(buffer))
            assert store.get_into(many, buffer, 4096) == [4096] * 64
            assert bytes(buffer.view) == whole
            assert store.evict([*keys, *many]) == [0] * (len(sizes) + 64)
        with old_ring(point / "file") as old, new_ring(point / "file") as new, plain(point / "file") as through:
            ways: list[Way] = [old, new, through]
            data = os.urandom(3 * CHUNK + 5000)
            for i, way in enumerate(ways):
                at = i * (2 * CHUNK + 100)
                assert way.write(at, data) == len(data)
                for other in ways:
                    assert other.read(at, len(data)) == data
            new.file.sync()
        assert server.metric("kvfs_server_rdma_total") - moved >= 2 * (len(sizes) + 64) + 10
        assert [rail.bytes_in + rail.bytes_out for rail in status(directory).rails if rail.transport == 1] == [0]

        with clients_at_work("acme/kept", point, RING_S + SLOW_S) as works:
            go_on(works, WAIT_S)
            server.kill()
            time.sleep(1)
            assert status(directory).pid == pid
            server.start()
            go_on(works, WAIT_S)
            server.signal(signal.SIGSTOP)
            time.sleep(RING_S / 2)
            assert status(directory).pid == pid
            server.signal(signal.SIGCONT)
            go_on(works, WAIT_S)
        for name in ("new", "old", "plain"):
            with new_ring(point / name) as way:
                assert way.write(0, data) == len(data)
                way.file.sync()
            with plain(point / name) as way:
                assert way.read(0, len(data)) == data
        assert status(directory).pid == pid


def test_a_cable_that_is_pulled_costs_its_rails_and_nothing_else(mounted: Mounter, tmp_path: Path) -> None:
    directory = tmp_path / "names"
    data = os.urandom(700_000)

    def round_trip() -> None:
        place = point / "file"
        with open(place, "wb") as f:
            f.write(data)
            os.fsync(f.fileno())
        with open(place, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert f.read() == data

    def traffic(device: str) -> int:
        return sum(rail.ops for rail in rails(directory, device))

    with mounted("work", directory) as point, working(round_trip) as work:
        work.wait_for_more(3)
        # A request for a connection that goes into a dead port breaks soft-RoCE for good: none is under way.
        wait_for(
            lambda: all(r.connections == CONNECTIONS for d in ("rxe0", "rxe1") for r in rails(directory, d)),
            WAIT_S,
            "all connections are there",
        )
        try:
            run("ip", "-n", "fabric", "link", "set", "port1", "down")
            wait_for(lambda: not any(r.up for r in rails(directory, "rxe1")), WAIT_S, "rails are down")
            others = traffic("rxe0")
            work.wait_for_more(5)
            assert traffic("rxe0") > others
            assert all(rail.up for rail in rails(directory, "rxe0"))
        finally:
            run("ip", "-n", "fabric", "link", "set", "port1", "up")
        wait_for(lambda: all(r.up for r in rails(directory, "rxe1")), WAIT_S, "rails are up again")
        before = traffic("rxe1")
        wait_for(lambda: traffic("rxe1") > before, WAIT_S, "rails are used again")
        work.wait_for_more(1)


def test_a_server_that_is_killed_and_started_again_loses_nothing_durable(one: Cluster) -> None:
    server = one.servers[0]
    acknowledged: dict[bytes, bytes] = {}
    with BlockStore.open(one.url("kept"), token=one.token("kept:rw"), timeout=CALL_S) as store:

        def put() -> None:
            keys = [os.urandom(32) for _ in range(8)]
            values = [os.urandom(20_000) for _ in keys]
            results = store.put(keys, values, durable=True)
            # 0: asked for again, and what the first request had stored was there
            assert set(results) <= {0, 1, -errno.ETIMEDOUT, -errno.EREMOTEIO}
            acknowledged.update((k, v) for k, v, r in zip(keys, values, results, strict=True) if r in (0, 1))

        with working(put) as work:
            work.wait_for_more(3)
            server.kill()
            server.start()
            work.wait_for_more(3)
        keys = list(acknowledged)
        into = [bytearray(len(value)) for value in acknowledged.values()]
        assert store.get(keys, into) == [20_000] * len(keys)
        assert into == list(acknowledged.values())
    assert server.metric("kvfs_server_rdma_total") > 0
    assert server.stop() == 0
