"""One client process of `kvfs bench net`: gets blocks of one size in batches, through whatever BlockStore opens.

    python -m kvfs_tools.bench.blockworker put|get WHERE [NAMESPACE] --size N --count N [--batch N] [--seconds S] [--seed N]

Prints one JSON line: operations, seconds, CPU seconds of this process. Block number i holds its number in every eighth byte;
each batch's first block is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import sys
import time

from kvfs_usrbio import BlockStore

AREA = 64 << 20


def key(size: int, number: int) -> bytes:
    return f"net-{size}-{number}".encode()


def value(size: int, number: int) -> bytes:
    return struct.pack("<Q", number) * (size // 8)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("op", choices=("put", "get"))
    parser.add_argument("where")
    parser.add_argument("namespace", nargs="?", default="default")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    size, batch = a.size, min(a.batch, AREA // a.size)
    with BlockStore.open(a.where, a.namespace) as store:
        area = store.alloc(batch * size)
        order = list(range(a.count))
        if a.op == "get":
            random.Random(a.seed).shuffle(order)
        batches = [order[i : i + batch] for i in range(0, a.count, batch)]
        keys = [[key(size, n) for n in numbers] for numbers in batches]
        done = 0
        cpu, start = time.process_time(), time.perf_counter()
        end = start + a.seconds
        while True:
            for numbers, names in zip(batches, keys, strict=True):
                if a.op == "put":
                    for slot, number in enumerate(numbers):
                        area.view[slot * size : (slot + 1) * size] = value(size, number)
                    found = store.put_from(names, area, size)
                    wrong = [r for r in found if r not in (0, 1)]
                else:
                    found = store.get_into(names, area, size)
                    wrong = [r for r in found if r != size]
                    if not wrong and bytes(area.view[: min(size, 64)]) != value(min(size, 64), numbers[0]):
                        wrong = [-1]
                if wrong:
                    print(f"{len(wrong)} of {len(found)} blocks: {os.strerror(-wrong[0])}", file=sys.stderr)
                    return 1
                done += len(numbers)
                if a.seconds and time.perf_counter() >= end:
                    break
            if not a.seconds or time.perf_counter() >= end:
                break
        print(json.dumps({"ops": done, "seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
