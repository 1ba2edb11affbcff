"""Hosts that are network namespaces: nothing of them is there after whoever made them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kvfs_tools.hosts import network
from waiting import wait_for


def in_namespaces(wanted: set[str]) -> list[int]:
    """Processes that are in one of them."""
    found: list[int] = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(place / "ns/net") in wanted:
                found.append(int(place.name))
        except OSError:
            continue
    return found


def test_a_thread_that_enters_a_host_comes_back() -> None:
    def here() -> str:
        return os.readlink("/proc/thread-self/ns/net")

    with network() as net:
        host = net.host("one")
        outside = here()
        with host.entered():
            assert here() == os.readlink(host.namespace) != outside
        assert here() == outside
        there = {os.readlink(host.namespace)}
        assert in_namespaces(there) == [host.holder]
    assert in_namespaces(there) == []


def test_nothing_is_left_of_a_process_that_is_killed() -> None:
    code = (
        "import os, sys; from kvfs_tools.hosts import network\n"
        "with network() as net:\n"
        "    hosts = net.host('one'), net.host('other'); net.cable(*hosts)\n"
        "    print(*(os.readlink(host.namespace) for host in hosts), flush=True)\n"
        "    sys.stdin.read()"
    )
    line = [sys.executable, "-c", code]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as maker:
        try:
            assert maker.stdout is not None
            there = set(maker.stdout.readline().split())
            assert len(there) == 2
            assert len(in_namespaces(there)) == 2
        finally:
            maker.kill()
    wait_for(lambda: in_namespaces(there) == [], 10)
