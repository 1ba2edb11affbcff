"""All tests here need several hosts, which are network namespaces; where these cannot be had they are skipped."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import machines
import pytest
from machines import Site, Vanished, site

from kvfs_tools.hosts import Unavailable


@pytest.fixture(scope="session", autouse=True)
def hosts() -> None:
    try:
        machines.probe()
    except Unavailable as why:
        pytest.skip(f"no hosts of network namespaces: {why}")
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed: apt-get install util-linux")


@pytest.fixture(scope="module")
def apart() -> Iterator[Site]:
    """Two servers, a cable to each."""
    with site(2, 1) as made:
        yield made


@pytest.fixture(scope="module")
def railed() -> Iterator[Site]:
    """One server, two cables to it."""
    with site(1, 2) as made:
        yield made


@pytest.fixture(scope="session", autouse=True)
def vanished(hosts: None) -> Iterator[Vanished]:
    """Made first, since the server needs the time of all other tests to notice it."""
    code = (
        "import os, sys; from kvfs_usrbio import BlockStore\n"
        "store = BlockStore.open(sys.argv[1], token=sys.argv[2]); keys = [b'%d' % i for i in range(8)]\n"
        "store.put(keys, [bytes(1 << 20)] * 8); print('ready', flush=True)\n"
        "while True: store.get(keys, [bytearray(1 << 20) for _ in keys])"
    )
    with site(1, 1) as made:
        server = made.cluster.servers[0]
        cable = made.cables[0][0]
        cable.shape(100)  # so that answers are under way at any moment
        line = [sys.executable, "-c", code, made.cluster.url("cache"), str(made.cluster.token("cache:rw"))]
        with subprocess.Popen(made.client.command(*line), stdout=subprocess.PIPE) as client:
            try:
                assert client.stdout is not None
                assert client.stdout.readline() == b"ready\n"
                time.sleep(0.3)
                cable.a.link("down")
            finally:
                client.kill()
        made.client.end()
        yield Vanished(server, server.metric("kvfs_server_connections"))
