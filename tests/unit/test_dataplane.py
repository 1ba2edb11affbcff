"""DataPlane and Node against a real store in a temporary file."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

pytest.importorskip("kvfs._node", reason="the native module is not built")

from kvfs.dataplane import DataPlane, HashedKey
from kvfs.node import Node, NodeConfig, format_store

pytestmark = pytest.mark.timeout(60)

SIZE = 512 << 20


@asynccontextmanager
async def plane_on(data: Path) -> AsyncGenerator[DataPlane]:
    async with Node.open(NodeConfig(data)) as node, DataPlane.open(node) as plane:
        yield plane


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    format_store(path, SIZE, segment_bytes=16 << 20, journal_bytes=16 << 20)
    return path


def test_format_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"\w") as e:
        format_store(tmp_path / "missing" / "data", SIZE)
    assert e.value.errno == errno.ENOENT


def test_start_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(1 << 20))
    with pytest.raises(OSError, match=r"\w"):
        Node.start(NodeConfig(path))


@pytest.mark.trio
async def test_files(data: Path) -> None:
    content = os.urandom(3 << 20)
    async with plane_on(data) as plane:
        with pytest.raises(OSError, match="read inode 7") as e:
            await plane.read(7, 0, 10)
        assert e.value.errno == errno.EBADF
        plane.inode_open(7, 0)
        assert await plane.write(7, 5000, content) == len(content)
        assert plane.inode_size(7) == 5000 + len(content)
        assert await plane.read(7, 0, 8000) == bytes(5000) + content[:3000]
        assert await plane.read(7, 5000, len(content) + 99) == content
        assert await plane.read(7, 1 << 40, 4096) == b""
        assert plane.inode_show(7).written_ns == plane.inode_take(7).written_ns > 0
        assert plane.inode_take(7).written_ns == 0
        await plane.fsync(7)
        await plane.truncate(7, 6000)
        await plane.truncate(7, 7000)
        assert await plane.read(7, 0, 9000) == bytes(5000) + content[:1000] + bytes(1000)
        await plane.sync()
        assert plane.inode_close(7) == 0
    async with plane_on(data) as plane:
        plane.inode_open(7, 7000)
        assert await plane.read(7, 4000, 9000) == bytes(1000) + content[:1000] + bytes(1000)
        plane.inode_close(7)
        assert [(ino, chunk) async for ino, chunk, _ in plane.file_scan()] == [(7, 0)]
        await plane.delete(7, 7000)
        assert [ino async for ino, _, _ in plane.file_scan()] == []


@pytest.mark.trio
async def test_blocks(data: Path) -> None:
    value = os.urandom(300_001)
    long_key = b"k" * 100
    async with plane_on(data) as plane:
        assert await plane.block_exists(3, b"a") is None
        with pytest.raises(OSError, match="block") as e:
            await plane.block_get(3, b"a", 0, 100)
        assert e.value.errno == errno.ENOENT
        assert await plane.block_put(3, b"a", value) is True
        assert await plane.block_put(3, b"a", value, durable=True) is False
        with pytest.raises(OSError, match="block") as e:
            await plane.block_put(3, b"a", value[:-1])
        assert e.value.errno == errno.EEXIST
        assert await plane.block_exists(3, b"a") == len(value)
        assert await plane.block_exists(4, b"a") is None
        assert await plane.block_get(3, b"a", 0, 1 << 20) == value
        assert await plane.block_get(3, b"a", 1001, 5000) == value[1001:6001]
        assert await plane.block_put(3, long_key, b"long") is True
        assert await plane.block_get(3, long_key, 0, 10) == b"long"
        found = {key: length async for key, length, _ in plane.block_scan(3)}
        assert sorted(found.values()) == [4, len(value)]
        hashed = next(key for key in found if isinstance(key, HashedKey))
        assert await plane.block_get(3, hashed, 0, 10) == b"long"
        assert await plane.block_evict(3, b"a") is True
        assert await plane.block_evict(3, b"a") is False
        stats = plane.stats()
        assert stats["block_chunks"] == 1


@pytest.mark.trio
async def test_scan_of_many_blocks_finds_each(data: Path) -> None:
    keys = {i.to_bytes(4, "big") for i in range(3000)}
    async with plane_on(data) as plane:
        for key in keys:
            await plane.block_put(1, key, key * 10)
        assert {key async for key, _, _ in plane.block_scan(1)} == keys


@pytest.mark.trio
async def test_many_at_once(data: Path) -> None:
    values = {i: os.urandom(1000 + 317 * i) for i in range(200)}
    async with plane_on(data) as plane:

        async def one(i: int) -> None:
            key = i.to_bytes(8, "big")
            assert await plane.block_put(1, key, values[i])
            for _ in range(5):
                assert await plane.block_get(1, key, 0, 1 << 17) == values[i]

        async with trio.open_nursery() as nursery:
            for i in values:
                nursery.start_soon(one, i)


@pytest.mark.trio
async def test_cancelled_operation_ends_first(data: Path) -> None:
    """A cancelled caller gets the result: the native side was using its memory."""
    async with plane_on(data) as plane:
        plane.inode_open(9, 0)
        with trio.CancelScope() as scope:
            scope.cancel()
            await plane.write(9, 0, bytes(8 << 20))
        assert plane.inode_size(9) == 8 << 20
        plane.inode_close(9)


@pytest.mark.trio
async def test_cancelled_from_outside_all_ends(data: Path) -> None:
    """Operations under way when everything is cancelled still end, and so does the plane."""
    ended: list[int] = []
    with trio.move_on_after(10) as limit, trio.CancelScope() as scope:
        async with plane_on(data) as plane, trio.open_nursery() as nursery:

            async def one(i: int) -> None:
                await plane.block_put(1, i.to_bytes(4, "big"), bytes(4 << 20), durable=True)
                ended.append(i)

            for i in range(8):
                nursery.start_soon(one, i)
            await trio.sleep(0)
            scope.cancel()
    assert not limit.cancelled_caught
    assert sorted(ended) == list(range(8))
