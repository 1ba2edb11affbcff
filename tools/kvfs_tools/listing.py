"""Lists the blocks of a namespace over the ring."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvfs_usrbio._native import ffi, lib
from kvfs_usrbio.client import Client, check

ROOM = 64 << 10  # bytes of one answer
TIMEOUT_NS = 30_000_000_000


class Block(msgspec.Struct, frozen=True, order=True):
    """As the mount names it: the key in hexadecimal, with `.long` after the hash of a key above 32 bytes."""

    key: str
    size: int
    mtime: int  # seconds since 1970


def blocks(socket: Path, tenant: str, name: str) -> Iterator[Block]:
    """Every block, in no order; one that is moved or put meanwhile may come twice or not at all."""
    client = Client(str(socket))
    namespace = client.open_namespace(tenant, name, read_only=True)
    ring = client.ring(2)
    room = client.alloc(ROOM)
    done = ffi.new("struct kvfs_cqe[1]")
    size = ffi.sizeof("struct kvfs_scan_entry")
    cursor = 0
    while True:
        entry = lib.kvfs_prep(ring.handle)
        entry.opcode = lib.KVFS_OP_SCAN
        entry.handle = namespace
        entry.iov = room.iov
        entry.off = cursor
        entry.len = ROOM
        check(lib.kvfs_submit(ring.handle), "list")
        check(lib.kvfs_wait(ring.handle, done, 1, 1, TIMEOUT_NS), "list")
        count = check(done[0].result, "list") // size
        if count == 0:
            return
        found = ffi.from_buffer("struct kvfs_scan_entry[]", room.view)
        for i in range(count):
            key = bytes(ffi.buffer(found[i].key, min(found[i].key_len, lib.KVFS_KEY_MAX))).hex()
            yield Block(key + (".long" if found[i].key_len > lib.KVFS_KEY_MAX else ""), found[i].length, found[i].mtime)
        cursor = found[count - 1].cursor
