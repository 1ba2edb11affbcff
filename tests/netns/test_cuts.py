"""Networks between hosts that are cut, silent, or lose packets: callers get results or a stated errno within the stated
deadline, all works again without a restart, and what was acknowledged is there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from machines import Site, lossy

from cluster.load import ALLOWED, SLACK, Load, check, loaded
from kvfs_usrbio import BlockStore
from waiting import wait_for

TIMEOUT = 2.0  # of a call
BACK_S = 20.0  # a busy machine's; connecting is tried again after 2 s at most
SIZES = (4096, 8192, 8192, 70_000, 1 << 20)
PAUSE = 0.03  # so that the servers, which the tests share, have room


def check_and_evict(store: BlockStore, *loads: Load) -> None:
    for load in loads:
        check(store, load)
        keys = [key for key, _ in load.acknowledged]
        assert store.evict(keys) == [0] * len(keys)


def works(store: BlockStore) -> bool:
    """On every server."""
    return store.put([os.urandom(32) for _ in range(40)], [b"x"] * 40) == [1] * 40


def unplugged(site: Site) -> AbstractContextManager[None]:
    """The first server's end of its cable."""
    return site.cables[0][0].a.unplugged()


def unplugged_here(site: Site) -> AbstractContextManager[None]:
    """The client's end."""
    return site.cables[0][0].b.unplugged()


def silent(site: Site) -> AbstractContextManager[None]:
    """The client's end of the first cable drops everything."""
    return site.cables[0][0].b.silent()


def half_open(site: Site) -> AbstractContextManager[None]:
    """The first server's host drops everything but its own loopback."""
    return site.servers[0].filtered("iifname != lo drop", "oifname != lo drop")


@pytest.mark.parametrize("cut", [unplugged, unplugged_here, silent, half_open])
def test_a_cut_longer_than_the_deadline_costs_the_deadline_and_heals(
    apart: Site, cut: Callable[[Site], AbstractContextManager[None]]
) -> None:
    server = apart.cluster.servers[0]
    with apart.opened("kept", TIMEOUT) as store:
        wait_for(lambda: works(store), BACK_S)
        with loaded(store, SIZES, PAUSE) as load:
            time.sleep(0.3)
            with cut(apart):
                time.sleep(TIMEOUT + 0.5)
                assert load.errors, "nothing was cut"
            wait_for(lambda: works(store), BACK_S)
            done = len(load.acknowledged)
            wait_for(lambda: len(load.acknowledged) >= done + 2 * len(SIZES), BACK_S)
        assert load.errors <= ALLOWED, load.errors
        assert load.longest < TIMEOUT + SLACK
        check_and_evict(store, load)
        # What the server has of connections that the client gave up is gone.
        wait_for(lambda: server.metric("kvfs_server_connections") == 2, BACK_S)
        wait_for(lambda: server.metric("kvfs_server_buffers_used") == 0, BACK_S)


def test_a_cut_shorter_than_the_deadline_fails_nothing(apart: Site) -> None:
    with apart.opened("kept", 6.0) as store:
        with loaded(store, SIZES, PAUSE) as load:
            time.sleep(0.3)
            with silent(apart):
                time.sleep(2.0)  # longer than connections are waited for
            done = len(load.acknowledged)
            wait_for(lambda: len(load.acknowledged) >= done + 2 * len(SIZES), BACK_S)
        assert load.errors == set()
        check_and_evict(store, load)


def test_lost_packets_change_no_result(apart: Site) -> None:
    with apart.opened("kept", 30.0) as store, lossy(apart.client, 3):
        with loaded(store, SIZES, PAUSE) as load, loaded(store, pause=PAUSE) as other:
            wait_for(lambda: len(load.acknowledged) >= 12 * len(SIZES), 60.0)
        assert load.errors | other.errors == set()
        check_and_evict(store, load, other)


def test_a_client_that_is_killed_while_nothing_gets_through_leaves_the_others_alone(apart: Site) -> None:
    code = (
        "import sys; from kvfs_usrbio import BlockStore\n"
        "store = BlockStore.open(sys.argv[1], token=sys.argv[2]); store.put([b'k'], [b'v'])\n"
        "print('ready', flush=True)\n"
        "while True: store.put([b'k'], [bytes(1 << 20)])"
    )
    line = [sys.executable, "-c", code, apart.cluster.url("cache"), str(apart.cluster.token("cache:rw"))]
    with (
        apart.opened("kept", TIMEOUT) as store,
        subprocess.Popen(apart.client.command(*line), stdout=subprocess.PIPE) as client,
    ):
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == b"ready\n"
            with half_open(apart):
                client.send_signal(signal.SIGKILL)
                client.wait(10)
        finally:
            client.kill()
        wait_for(lambda: works(store), BACK_S)
        wait_for(lambda: apart.cluster.servers[0].metric("kvfs_server_buffers_used") == 0, BACK_S)


class Writer(threading.Thread):
    """Writes files and makes them durable; remembers which of them are."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place
        self.durable: dict[str, bytes] = {}
        self.errors: set[int] = set()
        self.longest = 0.0
        self.enough = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                name, data = os.urandom(8).hex(), os.urandom(200_000)
                begin = time.monotonic()
                try:
                    with open(self.place / name, "wb", buffering=0) as f:
                        assert f.write(data) == len(data)
                        os.fsync(f.fileno())
                    self.durable[name] = data
                except OSError as e:
                    self.errors.add(e.errno or 0)
                self.longest = max(self.longest, time.monotonic() - begin)
        except BaseException as e:
            self.failure = e


def test_a_mount_goes_on_after_a_cut(apart: Site, tmp_path: Path) -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse here")
    token = apart.cluster.token("home:rw", "cache:rw")
    with apart.mounted(tmp_path / "names", token, KVFS_REMOTE_DEADLINE=str(TIMEOUT)) as point:
        writer = Writer(point)
        writer.start()
        try:
            wait_for(lambda: bool(writer.durable), BACK_S)
            with unplugged(apart):
                time.sleep(TIMEOUT + 0.5)
            done = len(writer.durable)
            wait_for(lambda: len(writer.durable) > done + 2, BACK_S)
        finally:
            writer.enough.set()
            writer.join(BACK_S)
        assert not writer.is_alive()
        assert writer.failure is None
        assert writer.errors, "nothing was cut"
        assert writer.errors <= {errno.EIO, errno.ETIMEDOUT, errno.EREMOTEIO}, writer.errors
        for name, data in writer.durable.items():
            assert (point / name).read_bytes() == data
