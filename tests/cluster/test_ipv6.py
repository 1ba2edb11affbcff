"""A chunk server at an IPv6 address: what names it, and blocks and files over it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from servers import Cluster, Server, cluster_of, free_port
from test_remote_mount import mounted

from commands import kvfs
from kvfs_usrbio import MISS, BlockStore

SIZES = (1, 4096, 65537, 1 << 20, 5 << 20)


class Server6(Server):
    @property
    def url(self) -> str:
        return f"tcp://[::1]:{self.port}"

    @property
    def host(self) -> str:
        return f"[::1]:{self.port}"


def free_port6() -> int:
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
            return int(s.getsockname()[1])
    except OSError as e:
        pytest.skip(f"this machine has no [::1]: {e.strerror}")


def test_blocks_and_files_over_ipv6(tmp_path: Path) -> None:
    port = free_port6()
    with cluster_of([lambda directory: Server6(directory, port, free_port())]) as made:
        blocks_come_back(made)
        content = os.urandom(3_000_000)
        directory = tmp_path / "names"
        with mounted(made, directory, made.token("home:rw")) as point:
            (point / "file").write_bytes(content)
            seen = json.loads(kvfs("status", "--dir", directory, "--json"))
            assert seen["remote"] == f"kvfs://[::1]:{port}/acme/home"
            assert [(rail["name"], rail["up"]) for rail in seen["rails"]] == [(f"tcp://[::1]:{port}", 1)]
            assert (point / "file").read_bytes() == content
        with mounted(made, directory, made.token("home:rw")) as point:
            assert (point / "file").read_bytes() == content


def blocks_come_back(made: Cluster) -> None:
    with BlockStore.open(made.url("cache"), token=made.token("cache:rw")) as store:
        keys = [os.urandom(32) for _ in SIZES]
        values = [os.urandom(size) for size in SIZES]
        assert store.put(keys, values) == [1] * len(SIZES)
        assert store.exists([*keys, b"nobody"]) == [*SIZES, MISS]
        into = [bytearray(size) for size in SIZES]
        assert store.get(keys, into) == list(SIZES)
        assert into == values
        made.servers[0].kill()
        made.servers[0].start()
        assert store.put([b"after"], [b"value"]) == [1]
