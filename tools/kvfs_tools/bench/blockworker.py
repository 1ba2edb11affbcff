"""One client process of `kvfs bench net`: gets blocks of one size in batches, through whatever BlockStore opens.

    python -m kvfs_tools.bench.blockworker put|get WHERE [NAMESPACE] --size N --count N [--batch N] [--flight N] [--seconds S]
        [--seed N]

Prints one JSON line: operations, seconds, CPU seconds of this process. Block number i holds its number in every eighth byte;
each batch's first block is compared. --flight: batches of gets under way at once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import sys
import time
from collections import deque

from kvfs_usrbio import BlockStore
from kvfs_usrbio.queue import Operation

AREA = 64 << 20


def key(size: int, number: int) -> bytes:
    return f"net-{size}-{number}".encode()


def value(size: int, number: int) -> bytes:
    return struct.pack("<Q", number) * (size // 8)


class Wrong(Exception):
    """A block is missing, or is another one."""


def check(found: list[int], wanted: tuple[int, ...]) -> None:
    wrong = [r for r in found if r not in wanted]
    if wrong:
        raise Wrong(f"{len(wrong)} of {len(found)} blocks: {os.strerror(-wrong[0]) if wrong[0] < 0 else wrong[0]}")


def put(store: BlockStore, size: int, batches: list[list[int]]) -> int:
    area = store.alloc(len(batches[0]) * size)
    for numbers in batches:
        for slot, number in enumerate(numbers):
            area.view[slot * size : (slot + 1) * size] = value(size, number)
        check(store.put_from([key(size, n) for n in numbers], area, size), (0, 1))
    return sum(map(len, batches))


def get(store: BlockStore, size: int, batches: list[list[int]], flight: int, end: float | None) -> int:
    """Until `end`, again and again; None: each once."""
    stride = len(batches[0]) * size
    area = store.alloc(flight * stride)
    keys = [[key(size, n) for n in numbers] for numbers in batches]
    done = 0

    def took(found: list[int], numbers: list[int], offset: int) -> None:
        nonlocal done
        check(found, (size,))
        head = min(size, 64)
        if bytes(area.view[offset : offset + head]) != value(head, numbers[0]):
            raise Wrong(f"block {numbers[0]} has another one's bytes")
        done += len(numbers)

    if flight == 1:
        while True:
            for numbers, names in zip(batches, keys, strict=True):
                took(store.get_into(names, area, size), numbers, 0)
                if end is not None and time.perf_counter() >= end:
                    return done
            if end is None:
                return done
    queue = store.queue()
    under_way: deque[tuple[Operation, list[int], int]] = deque()

    def reap() -> None:
        operation, numbers, offset = under_way.popleft()
        while not operation.done:
            queue.wait()
        took(operation.result(), numbers, offset)

    turn = 0
    while True:
        for numbers, names in zip(batches, keys, strict=True):
            if len(under_way) == flight:
                reap()
            offset = turn % flight * stride
            turn += 1
            under_way.append((store.submit_get_into(queue, names, area, size, offset=offset), numbers, offset))
            if end is not None and time.perf_counter() >= end:
                break
        if end is None or time.perf_counter() >= end:
            break
    while under_way:
        reap()
    return done


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("op", choices=("put", "get"))
    parser.add_argument("where")
    parser.add_argument("namespace", nargs="?", default="default")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--flight", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    batch = min(a.batch, AREA // a.size)
    order = list(range(a.count))
    if a.op == "get":
        random.Random(a.seed).shuffle(order)
    batches = [order[i : i + batch] for i in range(0, a.count, batch)]
    with BlockStore.open(a.where, a.namespace) as store:
        cpu, start = time.process_time(), time.perf_counter()
        try:
            if a.op == "put":
                done = put(store, a.size, batches)
            else:
                done = get(store, a.size, batches, a.flight, start + a.seconds if a.seconds else None)
        except Wrong as e:
            print(e, file=sys.stderr)
            return 1
        print(json.dumps({"ops": done, "seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
