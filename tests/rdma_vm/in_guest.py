"""kvfs as a whole over RDMA: what test_rdma_kvfs.py runs in the virtual machine.

One server on rxe2 and rxe3, clients on rxe0 and rxe1: four rails over RDMA, and TCP, which holds the sessions.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.servers import Cluster, Server, free_port, new_key
from commands import attempt_kvfs, kvfs, run
from kvfs import daemon
from kvfs.cluster import file
from kvfs.cluster.map import Class
from kvfs.mount import service
from kvfs.node import RailStats
from kvfs_usrbio import MISS, BlockStore
from waiting import wait_for

ADDRESSES = ("10.90.0.3", "10.90.0.4")
SIZES = (4096, 16384, 16385, 65536, (1 << 20) + 1, 5 << 20, 16 << 20)
CALL_S = 60.0  # the machine is emulated
WAIT_S = 90.0


class FabricServer(Server):
    @property
    def url(self) -> str:
        return f"tcp://{ADDRESSES[0]}:{self.port}"

    @property
    def host(self) -> str:
        return f"{ADDRESSES[0]}:{self.port}"


@pytest.fixture(scope="module")
def one() -> Iterator[Cluster]:
    place = Path(tempfile.mkdtemp(prefix="kvfs-", dir="/var/tmp"))
    made = Cluster(place, [])
    server = FabricServer(place, 7117, free_port())
    made.servers.append(server)
    listen = [server.url, *(f"rdma://{address}:7118" for address in ADDRESSES)]
    new_key(made.key)
    server.config.write_text(
        f'cluster = "{made.file}"\nlisten = {json.dumps(listen)}\nauth_key = "{made.key}.pub"\n'
        f'admin = "127.0.0.1:{server.admin}"\nbuffers = "64M"\nkeep = 5.0\n'
        f'[[device]]\npath = "{server.device}"\nsize = "256M"\nmemory = "16M"\n'
    )
    entries = file.ClusterFile(file.ClusterSection(1, 256)).with_target(listen)
    for name, cls in (("cache", Class.CACHE), ("kept", Class.DURABLE), ("home", Class.VOLUME), ("work", Class.VOLUME)):
        entries = entries.with_namespace("acme", name, cls)
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


@contextmanager
def mounted(made: Cluster, volume: str, directory: Path) -> Generator[Path]:
    point = directory.with_name(directory.name + "-mnt")
    try:
        kvfs(
            "mount", made.url(volume), point, "--dir", directory, "--token", made.token(f"{volume}:rw"), "--detach",
            seconds=WAIT_S,
        )  # fmt: skip
        yield point
    finally:
        attempt_kvfs("down", "--dir", directory, seconds=WAIT_S)
        service.unmount(point)


def rails(directory: Path, device: str) -> list[RailStats]:
    """Of this device's port, without a process: to start one takes seconds here."""
    status = daemon.ask(directory, "status").status
    assert status is not None
    found = [rail for rail in status.rails if rail.name.endswith(f"@{device}/1")]
    assert len(found) == len(ADDRESSES), status.rails
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


def test_the_devices_are_seen_and_would_be_used() -> None:
    report = json.loads(kvfs("rails", "--json"))
    assert report["source"] == "pyverbs", report["note"]
    ports = {port["device"]: port for port in report["ports"]}
    assert set(ports) == {"rxe0", "rxe1", "rxe2", "rxe3"}
    assert all(port["state"] == "active" and port["used"] for port in ports.values())
    chosen = json.loads(kvfs("rails", "--json", "--devices", "eth0,rxe1/1"))
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


def test_files_are_there_after_a_new_mount_and_went_over_both_ports(one: Cluster, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for i in range(20):
        (tree / f"f{i}").write_bytes(os.urandom(i * 5077))
    (tree / "large").write_bytes(os.urandom(12 << 20))
    names = sorted(os.listdir(tree))
    directory = tmp_path / "names"
    with mounted(one, "home", directory) as point:
        run("cp", "-a", f"{tree}/.", point)
        assert filecmp.cmpfiles(tree, point, names, shallow=False) == (names, [], [])
    with mounted(one, "home", directory) as point:

        def all_rails_carry() -> bool:
            Path("/proc/sys/vm/drop_caches").write_text("1")
            assert filecmp.cmpfiles(tree, point, names, shallow=False) == (names, [], [])
            return all(rail.bytes_in > 0 for device in ("rxe0", "rxe1") for rail in rails(directory, device))

        wait_for(all_rails_carry, WAIT_S, "every rail has carried something")
        seen = json.loads(kvfs("status", "--dir", directory, "--json"))["rails"]
        fast = [rail for rail in seen if rail["transport"] == 2]
        assert len(fast) == 4, seen
        assert all(rail["up"] for rail in fast), seen
        tcp = [rail for rail in seen if rail["transport"] == 1]
        assert [(rail["up"], rail["bytes_in"], rail["bytes_out"]) for rail in tcp] == [(1, 0, 0)]


def test_a_cable_that_is_pulled_costs_its_rails_and_nothing_else(one: Cluster, tmp_path: Path) -> None:
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

    with mounted(one, "work", directory) as point, working(round_trip) as work:
        work.wait_for_more(3)
        wait_for(lambda: all(r.up for d in ("rxe0", "rxe1") for r in rails(directory, d)), WAIT_S, "all rails are up")
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
