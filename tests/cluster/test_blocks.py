"""BlockStore over chunk servers, without a daemon: what is put comes back, from wherever it is."""

from __future__ import annotations

import errno
import os
import time

import pytest
from servers import Cluster, new_key

from kvfs_usrbio import MISS, BlockStore

SIZES = (1, 100, 4096, 4097, 65536, 1 << 20, (1 << 20) + 1, 5 << 20, 16 << 20)


def test_values_of_all_sizes_come_back_and_are_where_the_map_says(three: Cluster) -> None:
    with BlockStore.open(three.url("cache"), token=three.token("cache:rw")) as store:
        keys = [os.urandom(32) for _ in SIZES]
        values = [os.urandom(size) for size in SIZES]
        assert store.put(keys, values) == [1] * len(SIZES)
        assert store.put(keys, values) == [0] * len(SIZES)
        assert store.exists([*keys, b"nobody"]) == [*SIZES, MISS]
        into = [bytearray(size) for size in SIZES]
        assert store.get(keys, into) == list(SIZES)
        assert into == values
        part = bytearray(1000)
        assert store.get([keys[5]], [part], [4000]) == [1000]
        assert part == values[5][4000:5000]
        assert store.put([keys[0]], [b"longer"]) == [-errno.EEXIST]
        assert {e.key for e in store.scan()} >= set(keys)
        assert store.evict([*keys, b"nobody"]) == [0] * len(keys) + [MISS]
        assert store.exists(keys) == [MISS] * len(keys)


def test_batches_are_spread_over_all_servers(three: Cluster) -> None:
    count, size = 2000, 4096
    before = [server.metric("kvfs_target_block_chunks") for server in three.servers]
    with BlockStore.open(three.url("cache"), token=three.token("cache:rw")) as store:
        buffer = store.alloc(count * size)
        buffer.view[:] = os.urandom(len(buffer))
        whole = bytes(buffer.view)
        keys = [b"batch-%06d" % i for i in range(count)]
        assert store.put_from(keys, buffer, size) == [1] * count
        buffer.view[:] = bytes(len(buffer))
        assert store.match_prefix([*keys, b"no"]) == count
        assert store.get_into(keys, buffer, size) == [size] * count
        assert bytes(buffer.view) == whole
        assert sorted(e.key for e in store.scan() if e.key.startswith(b"batch-")) == keys
        there = [server.metric("kvfs_target_block_chunks") - b for server, b in zip(three.servers, before, strict=True)]
        assert sum(there) == count
        assert min(there) > count / 5
        assert set(store.evict(keys)) == {0}


async def _round(store: BlockStore, key: bytes, value: bytes) -> bytes:
    assert await store.aput([key], [value]) == [1]
    into = bytearray(len(value))
    assert await store.aget([key], [into]) == [len(value)]
    return bytes(into)


@pytest.mark.trio
async def test_the_awaitable_form(three: Cluster) -> None:
    value = os.urandom(100_000)
    with BlockStore.open(three.url("cache"), token=three.token("cache:rw")) as store:
        assert await _round(store, os.urandom(32), value) == value


def test_two_processes_worth_of_stores_see_the_same_blocks(three: Cluster) -> None:
    token = three.token("cache:rw")
    key, value = os.urandom(32), os.urandom(70_000)
    with (
        BlockStore.open(three.url("cache"), token=token) as one,
        BlockStore.open(three.url("cache"), token=token) as two,
    ):
        assert one.put([key], [value], durable=True) == [1]
        into = bytearray(len(value))
        assert two.get([key], [into]) == [len(value)]
        assert into == value
        assert two.put([key], [value]) == [0]


def test_a_token_gives_what_it_says_and_no_more(three: Cluster) -> None:
    key = os.urandom(32)
    with BlockStore.open(three.url("cache"), token=three.token("cache:rw")) as store:
        assert store.put([key], [b"value"]) == [1]
    with BlockStore.open(three.url("cache"), token=three.token("cache:ro")) as store:
        assert store.get([key], [bytearray(5)]) == [5]
        assert store.put([os.urandom(32)], [b"value"]) == [-errno.EACCES]
        assert store.evict([key]) == [-errno.EACCES]
    with BlockStore.open(three.url("cache"), token=three.token("cache:put")) as store:
        assert store.put([os.urandom(32)], [b"value"]) == [1]
        assert store.evict([key]) == [-errno.EACCES]
    # The other tenant's token names another namespace: nothing of this one can be seen or done.
    stranger = three.token("cache:rw", tenant="other")
    with BlockStore.open(three.url("cache"), token=stranger) as store:
        assert store.get([key], [bytearray(5)]) == [-errno.EACCES]
        assert store.exists([key]) == [-errno.EACCES]
        assert store.put([os.urandom(32)], [b"value"]) == [-errno.EACCES]
    with BlockStore.open(three.url("cache", "other"), token=stranger) as store:
        assert store.exists([key]) == [MISS]
    assert sum(server.metric("kvfs_server_denied_total") for server in three.servers) >= 5


def test_tokens_of_other_keys_expired_ones_and_none_are_refused(three: Cluster) -> None:
    other = new_key(three.directory / "other.key")
    for token in (three.token("cache:rw", key=other), None):
        with pytest.raises(OSError, match=r".") as caught:
            BlockStore.open(three.url("cache"), token=token)
        assert caught.value.errno == errno.EACCES
    short = three.token("cache:rw", seconds=1)
    time.sleep(1.2)
    with pytest.raises(ValueError, match="has expired"):
        BlockStore.open(three.url("cache"), token=short)


def test_what_cannot_be_opened_says_why(three: Cluster) -> None:
    token = three.token("cache:rw")
    with pytest.raises(FileNotFoundError, match="no namespace acme/nothing"):
        BlockStore.open(three.url("nothing"), token=token)
    with pytest.raises(ValueError, match="is a volume"):
        BlockStore.open(three.url("home"), token=token)
    with pytest.raises(ValueError, match="is not kvfs://"):
        BlockStore.open("kvfs://127.0.0.1/acme/cache", token=token)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1") as caught:
        BlockStore.open("kvfs://127.0.0.1:1/acme/cache", token=token)
    assert caught.value.errno == errno.ECONNREFUSED
    with BlockStore.open(f"kvfs://127.0.0.1:1,{three.servers[0].host}/acme/cache", token=token) as store:
        assert store.exists([b"nobody"]) == [MISS]  # the map came from the second
