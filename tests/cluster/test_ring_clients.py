"""Ring clients of a mount daemon whose data is on chunk servers: blocks and files over the local ring, while the servers serve
and while they fail."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from load import ALLOWED, SLACK
from servers import Cluster, Server, cluster
from test_remote_mount import mounted

from commands import kill_daemon, kvfs
from hf3fs_fuse import io
from kvfs import daemon
from kvfs_usrbio import MISS, BlockStore
from ring_clients import (
    BACK_S,
    CHUNK,
    CLIENT_TIMEOUT,
    FILE_ERRORS,
    SIZE,
    STEPS,
    Way,
    clients_at_work,
    go_on,
    new_ring,
    old_ring,
    plain,
    within,
)
from waiting import wait_for

DEADLINE = 3.0  # of the mount daemon's operations on the servers
LONG = DEADLINE + 2
CLOSE_S = 5.0  # a daemon waits that long for its connections to end


@dataclass
class Mount:
    """A volume's mount and its daemon."""

    cluster: Cluster
    directory: Path
    point: Path

    def pid(self) -> int:
        """Asks the daemon, which answers at once whatever its servers do."""
        begin = time.monotonic()
        status = daemon.ask(self.directory, "status").status
        assert status is not None
        assert time.monotonic() - begin < SLACK
        return status.pid

    def served(self, name: str) -> float:
        """By the servers, together."""
        return sum(server.metric(f"kvfs_server_{name}_total") for server in self.cluster.servers)


@contextmanager
def made_at(directory: Path) -> Generator[Mount]:
    with ExitStack() as stack:
        made = stack.enter_context(cluster(2))
        token = made.token("home:rw", "cache:rw", "kept:rw")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KVFS_REMOTE_DEADLINE", str(DEADLINE))
            point = stack.enter_context(mounted(made, directory, token))
        yield Mount(made, directory, point)


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with made_at(tmp_path_factory.mktemp("mount") / "names") as made:
        yield made


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Mount]:
    """Whose daemon will not outlive the test."""
    with made_at(tmp_path / "names") as made:
        yield made


def test_blocks_of_a_ring_client_are_the_ones_that_mount_and_cluster_show(mount: Mount) -> None:
    sizes = (1, 4096, 65537, 1 << 20, (1 << 20) + 1, 5 << 20, 16 << 20)
    keys = [os.urandom(32) for _ in sizes]
    values = [os.urandom(size) for size in sizes]
    view = mount.point / ".kvfs/blocks/acme/cache"
    before = mount.served("puts"), mount.served("gets")
    with BlockStore.open(mount.point, "acme/cache", timeout=CLIENT_TIMEOUT) as store:
        assert store.put(keys, values) == [1] * len(sizes)
        assert store.put(keys, values) == [0] * len(sizes)
        assert store.put([keys[0]], [b"longer"]) == [-errno.EEXIST]
        assert store.exists([*keys, b"nobody"]) == [*sizes, MISS]
        assert store.match_prefix([*keys, b"nobody"]) == len(keys)
        into = [bytearray(size) for size in sizes]
        assert store.get(keys, into) == list(sizes)
        assert into == values
        part = bytearray(100_000)
        assert store.get([keys[5]], [part], [1_000_000]) == [100_000]
        assert part == values[5][1_000_000:1_100_000]
        many = [b"many-%04d" % i for i in range(1000)]
        buffer = store.alloc(1000 * 4096)
        buffer.view[:] = whole = os.urandom(len(buffer))
        assert store.put_from(many, buffer, 4096) == [1] * 1000
        buffer.view[:] = bytes(len(buffer))
        assert store.get_into(many, buffer, 4096) == [4096] * 1000
        assert bytes(buffer.view) == whole
        assert {e.key for e in store.scan()} >= {*keys, *many}
        assert mount.served("puts") - before[0] >= len(keys) + 1000, "over the network"
        assert mount.served("gets") - before[1] >= len(keys) + 1000
        assert not (mount.directory / "store.kvfs").exists()

        for key, value in zip(keys, values, strict=True):
            assert (view / key.hex()[:2] / key.hex()).read_bytes() == value
        key, value = os.urandom(32), os.urandom(300_000)
        (view / key.hex()[:2]).mkdir(exist_ok=True)
        (view / key.hex()[:2] / key.hex()).write_bytes(value)
        got = bytearray(len(value))
        assert store.get([key], [got]) == [len(value)]
        assert got == value
        with BlockStore.open(mount.cluster.url("cache"), token=mount.cluster.token("cache:rw")) as direct:
            got = bytearray(len(value))
            assert direct.get([key], [got]) == [len(value)]
            assert got == value
            assert direct.evict([*keys, key]) == [0] * (len(keys) + 1)
        assert store.exists([*keys, key]) == [MISS] * (len(keys) + 1)
        assert store.evict([*many, b"nobody"]) == [0] * 1000 + [MISS]


def test_file_bytes_are_the_same_over_both_rings_and_the_mount(mount: Mount) -> None:
    rng = random.Random(7)
    path = mount.point / "file"
    before = mount.served("writes"), mount.served("gets")
    model = bytearray()
    with old_ring(path) as old, new_ring(path) as new, plain(path) as through:
        ways: tuple[Way, ...] = (old, new, through)
        for _ in range(400):
            at, size = rng.randrange(SIZE), rng.choice((1, 100, 4096, 5000, CHUNK, 3 * CHUNK))
            if rng.random() < 0.1:
                at = at // CHUNK * CHUNK
            if rng.random() < 0.5:
                data = rng.randbytes(size)
                assert rng.choice(ways).write(at, data) == size
                if at > len(model):
                    model.extend(bytes(at - len(model)))
                model[at : at + size] = data
            else:
                assert rng.choice(ways).read(at, size) == model[at : at + size]
            if rng.random() < 0.02:
                size = rng.randrange(len(model) + 1)
                os.ftruncate(through.fd, size)
                del model[size:]
        new.file.sync()
        assert mount.served("writes") > before[0], "over the network"
        for way in ways:
            for at in range(0, len(model), 3 * CHUNK):
                assert way.read(at, 3 * CHUNK) == model[at : at + 3 * CHUNK]
        assert mount.served("gets") > before[1]
    assert path.read_bytes() == model
    assert io.read_file(str(path), block_size=CHUNK) == model


def killed(server: Server) -> Callable[[], None]:
    server.kill()
    return server.start


def hung(server: Server) -> Callable[[], None]:
    server.signal(signal.SIGSTOP)
    return lambda: server.signal(signal.SIGCONT)


def killed_while_hung(server: Server) -> Callable[[], None]:
    server.signal(signal.SIGSTOP)
    time.sleep(1)
    return killed(server)


@pytest.mark.parametrize(
    ("fail", "away"),
    [(killed, 0.5), (killed, LONG), (hung, 0.5), (hung, LONG), (killed_while_hung, LONG)],
    ids=["killed", "killed-long", "hung", "hung-long", "killed-while-hung"],
)
def test_ring_clients_outlive_a_server_that_fails_and_go_on_when_it_is_back(
    mount: Mount, fail: Callable[[Server], Callable[[], None]], away: float
) -> None:
    pid = mount.pid()
    place = mount.point / os.urandom(8).hex()
    place.mkdir()
    with clients_at_work("acme/kept", place, DEADLINE) as works:
        go_on(works)
        bring_back = fail(mount.cluster.servers[0])
        try:
            end = time.monotonic() + away
            while time.monotonic() < end:
                assert mount.pid() == pid
                time.sleep(0.2)
        finally:
            bring_back()
        go_on(works)
        assert away < LONG or any(work.errors for work in works), "the outage was not felt"
    assert mount.pid() == pid
    # Anew, after all of it, by clients that were there and ones that come now.
    data = os.urandom(SIZE)
    for name in ("new", "old", "plain"):
        with new_ring(place / name) as way:
            assert way.write(0, data) == SIZE
            way.file.sync()
        assert (place / name).read_bytes() == data
        assert io.read_file(str(place / name), block_size=CHUNK) == data


@pytest.mark.parametrize("fail", [killed, hung])
def test_with_all_servers_away_everything_ends_with_a_stated_errno_in_time(
    mount: Mount, fail: Callable[[Server], Callable[[], None]]
) -> None:
    data = os.urandom(SIZE)
    pid = mount.pid()
    there, new_key = os.urandom(32), os.urandom(32)
    with (
        BlockStore.open(mount.point, "acme/cache", timeout=CLIENT_TIMEOUT) as store,
        new_ring(mount.point / "file") as new,
        old_ring(mount.point / "file") as old,
    ):
        assert store.put([there], [data[:4096]]) == [1]
        assert new.write(0, data) == SIZE
        new.file.sync()
        bring_back = [fail(server) for server in mount.cluster.servers]
        try:

            def number(result: bytes | int) -> int:
                return result if isinstance(result, int) else len(result)

            def timed(what: Callable[[], int]) -> tuple[int, float]:
                begin = time.monotonic()
                return what(), time.monotonic() - begin

            asked: list[tuple[Callable[[], int], set[int], int]] = [
                (lambda: store.put([new_key], [b"value"])[0], ALLOWED, 1),
                (lambda: store.get([there], [bytearray(4096)])[0], ALLOWED, 1),
                (lambda: store.exists([there])[0], ALLOWED, 1),
                (lambda: store.evict([b"nothing"])[0], ALLOWED, 1),
                (lambda: number(new.read(0, CHUNK)), FILE_ERRORS, 1),
                (lambda: number(old.read(CHUNK, CHUNK)), FILE_ERRORS, 1),
                (lambda: new.write(2 * CHUNK, data[:CHUNK]), FILE_ERRORS, STEPS),
                (lambda: old.write(3 * CHUNK, data[:CHUNK]), FILE_ERRORS, STEPS),
                # It may be taken and fail later, which the next fsync tells.
                (lambda: new.write(4 * CHUNK + 5, b"part"), FILE_ERRORS | {4}, STEPS),
            ]
            with ThreadPoolExecutor(len(asked)) as threads:
                for (result, took), (_, allowed, steps) in zip(
                    threads.map(timed, [what for what, _, _ in asked]), asked, strict=True
                ):
                    assert result in allowed, errno.errorcode.get(-result, result)
                    assert took < within(DEADLINE, steps)
            with pytest.raises(OSError, match="sync") as caught:
                new.file.sync()
            assert -(caught.value.errno or 0) in FILE_ERRORS
            assert mount.pid() == pid
        finally:
            for back in bring_back:
                back()
        wait_for(lambda: store.put([os.urandom(32) for _ in range(20)], [b"x"] * 20) == [1] * 20, BACK_S)
        into = bytearray(4096)
        assert store.get([there], [into]) == [4096]
        assert into == data[:4096]
        assert new.read(0, CHUNK) == data[:CHUNK]
        assert new.write(0, data[::-1]) == SIZE
        new.file.sync()
        assert old.read(0, 4 * CHUNK) == data[::-1][: 4 * CHUNK]
    assert (mount.point / "file").read_bytes() == data[::-1]
    assert mount.pid() == pid


def test_a_client_that_waits_less_long_than_the_daemon_is_told_when_its_time_is_over(mount: Mount) -> None:
    there = os.urandom(32)
    with BlockStore.open(mount.point, "acme/cache", timeout=1.0) as store:
        assert store.put([there], [b"value"]) == [1]
        for server in mount.cluster.servers:
            server.signal(signal.SIGSTOP)
        try:
            for _ in range(3):
                begin = time.monotonic()
                with pytest.raises(TimeoutError):
                    store.get([there], [bytearray(5)])
                assert time.monotonic() - begin < 1 + SLACK
        finally:
            for server in mount.cluster.servers:
                server.signal(signal.SIGCONT)
        into = bytearray(5)
        wait_for(lambda: got_in_time(store, there, into), BACK_S)
        assert into == b"value"


def got_in_time(store: BlockStore, key: bytes, into: bytearray) -> bool:
    try:
        return store.get([key], [into]) == [len(into)]
    except TimeoutError:
        return False


CLIENT = """
import sys
from kvfs_usrbio import BlockStore
store = BlockStore.open(sys.argv[1], "acme/cache", timeout=None)
keys = [b"%d" % i for i in range(64)]
assert set(store.put(keys, [bytes(100_000)] * 64)) <= {0, 1}
queue = store.queue()
print("ready", flush=True)
sys.stdin.readline()
operations = [store.submit_get(queue, keys[i::8], [bytearray(100_000) for _ in keys[i::8]]) for i in range(8)]
print("asked", flush=True)
done = []
while len(done) < len(operations):
    done += queue.wait()
print([operation.result() for operation in done], flush=True)
"""


@contextmanager
def client_that_waits(mount: Mount) -> Generator[subprocess.Popen[bytes]]:
    """It has gets under way at servers that hang."""
    command = [sys.executable, "-c", CLIENT, str(mount.point)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        try:
            assert client.stdin is not None
            assert client.stdout is not None
            assert client.stdout.readline() == b"ready\n"
            for server in mount.cluster.servers:
                server.signal(signal.SIGSTOP)
            client.stdin.write(b"\n")
            client.stdin.flush()
            assert client.stdout.readline() == b"asked\n"
            yield client
        finally:
            client.kill()
            for server in mount.cluster.servers:
                server.signal(signal.SIGCONT)


def test_a_ring_client_killed_while_servers_hang_leaves_the_daemon_well(mount: Mount) -> None:
    pid = mount.pid()
    with client_that_waits(mount) as client:
        client.kill()
        client.wait(30)
        time.sleep(0.5)
        assert mount.pid() == pid
    with BlockStore.open(mount.point, "acme/cache", timeout=CLIENT_TIMEOUT) as store:
        wait_for(lambda: store.get([b"1"], [bytearray(100_000)]) == [100_000], BACK_S)
    assert mount.pid() == pid


def test_a_daemon_killed_while_servers_hang_ends_its_clients_at_once(mortal: Mount) -> None:
    with client_that_waits(mortal) as client:
        begin = time.monotonic()
        kill_daemon(mortal.directory)
        _, said = client.communicate(timeout=30)
        assert time.monotonic() - begin < SLACK
        assert client.returncode == 1
        assert b"Errno" in said
        assert b"TimeoutError" not in said


def test_a_daemon_stops_in_order_while_servers_hang(mortal: Mount) -> None:
    with client_that_waits(mortal) as client:
        begin = time.monotonic()
        kvfs("down", "--dir", mortal.directory)
        assert time.monotonic() - begin < within(DEADLINE, STEPS) + CLOSE_S + SLACK
        client.wait(30)
