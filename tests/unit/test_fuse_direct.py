"""Which requests of the kernel the node gives to the second socket. One socketpair stands in for /dev/fuse."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

pytest.importorskip("kvfs._node", reason="the native module is not built")

from kvfs.mount.blocks import VIEW_BIT
from kvfs.mount.direct import LEFT_MAX, DirectRequests
from kvfs.node import Node, NodeConfig, format_store

pytestmark = pytest.mark.timeout(30)

LOOKUP, GETATTR, STATFS, FLUSH = 1, 3, 17, 25


def _request(opcode: int, unique: int, nodeid: int, body: bytes = b"") -> bytes:
    return struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, nodeid, 0, 0, 0, 0, 0) + body


def _run(
    tmp_path: Path,
    check: Callable[[socket.socket, socket.socket, socket.socket], None],
    prepare: Callable[[Node], None] = lambda _: None,
) -> None:
    """`check` gets the kernel's, the daemon's and the second socket."""

    async def main() -> None:
        store = tmp_path / "store.kvfs"
        format_store(store, 64 << 20, segment_bytes=1 << 20, journal_bytes=4 << 20)
        async with Node.open(NodeConfig(store, socket=tmp_path / "sock")) as node:
            pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
            kernel, daemon, direct = (near for near, _ in pairs)
            for near, far in pairs:
                near.settimeout(10)
                for end in (near, far):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 212992)
            node.fuse_start(pairs[0][1].detach(), pairs[1][1].detach())
            node.fuse_direct(pairs[2][1].detach(), DirectRequests.OPCODES)
            prepare(node)
            try:
                await trio.to_thread.run_sync(check, kernel, daemon, direct)
            finally:
                await trio.to_thread.run_sync(node.fuse_stop)
                for near, _ in pairs:
                    near.close()

    trio.run(main)


def test_frequent_requests_on_the_tree_come_here(tmp_path: Path) -> None:
    def check(kernel: socket.socket, daemon: socket.socket, direct: socket.socket) -> None:
        for unique, (opcode, nodeid, there) in enumerate(
            [
                (LOOKUP, 1, direct),
                (LOOKUP, 1 | VIEW_BIT, daemon),
                (STATFS, 1, daemon),
                (FLUSH, 99, direct),
                (4096, 1, daemon),  # as of CUSE: beyond any bit
            ],
            start=1,
        ):
            sent = _request(opcode, unique, nodeid, b"name\0")
            kernel.send(sent)
            assert there.recv(4096) == sent
        daemon.send(struct.pack("<IiQ", 16, -38, 3))
        assert kernel.recv(4096) == struct.pack("<IiQ", 16, -38, 3)

    _run(tmp_path, check)


def test_none_is_lost_when_the_reader_is_slow(tmp_path: Path) -> None:
    def check(kernel: socket.socket, daemon: socket.socket, direct: socket.socket) -> None:
        count = 3000
        kernel.setblocking(False)
        sent = got = 0
        while got < count:
            try:
                while sent < count:
                    kernel.send(_request(LOOKUP, sent, 1, b"n" * 200 + b"\0"))
                    sent += 1
            except BlockingIOError:
                pass
            for _ in range(50):
                if got < count and got < sent:
                    (unique,) = struct.unpack_from("<Q", direct.recv(4096), 8)
                    assert unique == got
                    got += 1

    _run(tmp_path, check)


def test_the_node_answers_from_what_was_left_with_it(tmp_path: Path) -> None:
    def prepare(node: Node) -> None:
        for ino in range(100, 100 + LEFT_MAX):
            assert node.fuse_attr(ino, bytes([ino % 251]) * 104)
        assert not node.fuse_attr(1, bytes(104))  # no room
        assert node.fuse_attr(100, b"\xff" * 104)
        assert node.fuse_attr(101, None)
        assert not node.fuse_attr(101, bytes(103))

    def check(kernel: socket.socket, daemon: socket.socket, direct: socket.socket) -> None:
        for unique, (ino, known) in enumerate([(100, b"\xff" * 104), (102, bytes([102]) * 104), (101, b""), (1, b"")]):
            sent = _request(GETATTR, unique, ino, bytes(16))
            kernel.send(sent)
            if known:
                assert kernel.recv(4096) == struct.pack("<IiQ", 120, 0, unique) + known
            else:
                assert direct.recv(4096) == sent

    _run(tmp_path, check, prepare)


def test_without_a_mount_it_is_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        store = tmp_path / "store.kvfs"
        format_store(store, 64 << 20, segment_bytes=1 << 20, journal_bytes=4 << 20)
        async with Node.open(NodeConfig(store, socket=tmp_path / "sock")) as node:
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with near:
                near.settimeout(10)
                with pytest.raises(OSError, match="serves no mount"):
                    node.fuse_direct(far.detach(), [LOOKUP])
                assert not node.fuse_attr(1, bytes(104))
                assert near.recv(1) == b""  # it was the node's, which has closed it

    trio.run(main)
