"""Servers that are killed, hang, or are cut off: operations end with a result or a stated errno in time, and what was
acknowledged as durable is there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest
from load import ALLOWED, SLACK, check, loaded
from servers import Cluster, cluster

from kvfs_usrbio import BlockStore
from waiting import wait_for

TIMEOUT = 6.0  # of a call


@pytest.fixture
def three() -> Iterator[Cluster]:
    with cluster(3) as made:
        yield made


def test_a_server_killed_and_started_again_under_load_loses_nothing_durable(three: Cluster) -> None:
    with BlockStore.open(three.url("kept"), token=three.token("kept:rw"), timeout=TIMEOUT) as store:
        with loaded(store) as load:
            time.sleep(1)
            three.servers[1].kill()
            time.sleep(1)
            three.servers[1].start()
            time.sleep(2)
        assert load.errors <= ALLOWED, load.errors
        assert load.longest < TIMEOUT + SLACK
        check(store, load)
        assert store.put([os.urandom(32) for _ in range(50)], [b"x"] * 50) == [1] * 50


def test_a_server_that_stays_away_fails_its_operations_in_time_and_no_others(three: Cluster) -> None:
    with BlockStore.open(three.url("cache"), token=three.token("cache:rw"), timeout=TIMEOUT) as store:
        three.servers[2].kill()
        begin = time.monotonic()
        results = store.put([os.urandom(32) for _ in range(90)], [b"x"] * 90)
        assert time.monotonic() - begin < TIMEOUT + SLACK
        assert set(results) <= ALLOWED | {1}
        assert results.count(1) > 30
        assert any(result != 1 for result in results)


def test_a_server_that_hangs_is_waited_for_no_longer_than_stated_and_used_again_after(three: Cluster) -> None:
    with BlockStore.open(three.url("kept"), token=three.token("kept:rw"), timeout=TIMEOUT) as store:
        with loaded(store) as load:
            time.sleep(0.5)
            three.servers[0].signal(signal.SIGSTOP)
            time.sleep(TIMEOUT + 1)
            three.servers[0].signal(signal.SIGCONT)
            time.sleep(2)
        assert load.errors <= ALLOWED, load.errors
        assert load.longest < TIMEOUT + SLACK
        check(store, load)
        assert store.put([os.urandom(32) for _ in range(50)], [b"x"] * 50) == [1] * 50


def test_a_client_that_is_killed_leaves_nothing_behind_at_the_servers(three: Cluster) -> None:
    code = (
        "import sys, time; from kvfs_usrbio import BlockStore\n"
        "store = BlockStore.open(sys.argv[1], token=sys.argv[2]); store.put([b'k'], [b'v'])\n"
        "print('ready', flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", code, three.url("cache"), str(three.token("cache:rw"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        assert sum(s.metric("kvfs_server_sessions") for s in three.servers) >= 1
        client.kill()
    wait_for(lambda: not any(s.metric("kvfs_server_sessions") for s in three.servers), 30)
    assert [s.metric("kvfs_server_buffers_used") for s in three.servers] == [0, 0, 0]


@contextmanager
def dropping(ports: list[int]) -> Generator[None]:
    """Nothing arrives at these ports of loopback, nor anything from them: a cut network, without a word to either side."""
    table = f"kvfs_test_{os.getpid()}"
    rules = "\n".join(f"tcp dport {p} drop\ntcp sport {p} drop" for p in ports)
    text = f"table inet {table} {{\nchain c {{\ntype filter hook input priority 0\n{rules}\n}}\n}}\n"
    subprocess.run(["nft", "-f", "-"], input=text.encode(), check=True, timeout=20)
    try:
        yield
    finally:
        subprocess.run(["nft", "delete", "table", "inet", table], check=True, timeout=20)


def test_a_network_that_is_cut_without_a_word_fails_operations_in_time_and_heals(three: Cluster) -> None:
    if os.geteuid() != 0 or shutil.which("nft") is None:
        pytest.skip("needs root and nft")
    if subprocess.run(["nft", "list", "tables"], capture_output=True, check=False, timeout=20).returncode != 0:
        pytest.skip("this kernel has no nftables")
    with BlockStore.open(three.url("kept"), token=three.token("kept:rw"), timeout=TIMEOUT) as store:
        with loaded(store) as load:
            time.sleep(0.5)
            with dropping([three.servers[0].port]):
                time.sleep(TIMEOUT + 1)
            time.sleep(3)
        assert load.errors <= ALLOWED, load.errors
        assert load.longest < TIMEOUT + SLACK
        check(store, load)
        assert store.put([os.urandom(32) for _ in range(50)], [b"x"] * 50) == [1] * 50
