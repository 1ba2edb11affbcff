"""Mounting through fusermount3 when it goes wrong, and the channel's descriptors. A script stands in for a broken tool."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.mount import channel
from kvfs.mount.channel import Channel, MountError, mount
from kvfs.node import Node, NodeConfig, format_store

pytestmark = pytest.mark.timeout(60)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where PATH finds fusermount3, if there is one."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place))
    return place / "fusermount3"


def script(tool: Path, body: str) -> None:
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)


def refused(point: Path) -> str:
    before = descriptors()
    with pytest.raises(MountError) as raised:
        mount(point, ["subtype=kvfs", "fsname=a"])
    assert descriptors() == before
    return str(raised.value)


def test_without_the_tool(tool: Path, tmp_path: Path) -> None:
    assert refused(tmp_path) == "fusermount3 is missing: install the package fuse3."
    tool.write_text("not executable")
    assert refused(tmp_path) == "fusermount3 is missing: install the package fuse3."


def test_what_the_tool_says_is_passed_on(tool: Path, tmp_path: Path) -> None:
    script(tool, 'echo noise >&2; echo "fusermount3: $*" >&2; exit 1')
    assert refused(tmp_path) == f"mounting at {tmp_path} failed: fusermount3: -o fsname=a,subtype=kvfs -- {tmp_path}."
    script(tool, "exit 3")
    assert refused(tmp_path) == f"mounting at {tmp_path} failed: fusermount3 gave no reason."


def test_a_tool_that_sends_no_descriptor(tool: Path, tmp_path: Path) -> None:
    script(tool, "exit 0")
    assert refused(tmp_path) == f"mounting at {tmp_path} failed: no descriptor came."
    tool.write_text(f"#!{sys.executable}\nimport os\nos.write(int(os.environ['_FUSE_COMMFD']), b'x')\n")
    assert refused(tmp_path) == f"mounting at {tmp_path} failed: no descriptor came."


def test_a_tool_that_hangs(tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MOUNT_TIMEOUT_S", 1)
    script(tool, "exec /bin/sleep 60")
    assert refused(tmp_path) == f"fusermount3 did not mount at {tmp_path} within 1 s."


@pytest.mark.skipif(shutil.which("fusermount3") is None, reason="fusermount3 is not installed")
def test_a_mount_point_that_is_not_there(tmp_path: Path) -> None:
    point = tmp_path / "none"
    said = refused(point)
    assert said.startswith(f"mounting at {point} failed: ")
    assert said.endswith("No such file or directory.")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    data = tmp_path / "data"
    format_store(data, 64 << 20, segment_bytes=1 << 20, journal_bytes=4 << 20)
    node = Node.start(NodeConfig(data))
    yield node
    node.stop()


def test_a_second_channel_is_refused_and_nothing_stays_open(node: Node) -> None:
    kernels = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    try:
        for near, _ in kernels:
            near.settimeout(20)
        first = Channel.open(node, kernels[0][1].detach())
        before = descriptors()
        with pytest.raises(OSError, match="serves a mount already") as raised:
            Channel.open(node, kernels[1][1].detach())
        assert raised.value.errno == errno.EBUSY
        assert descriptors() == before - 1
        assert kernels[1][0].recv(1) == b""
        place = Path(first.place)
        assert os.path.samestat(place.stat(), os.fstat(int(place.name)))
        os.close(int(place.name))
        first.close()
        assert kernels[0][0].recv(1) == b""
        first.close()  # once more does no harm
    finally:
        for near, far in kernels:
            near.close()
            far.close()
