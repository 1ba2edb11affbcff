# pyright: basic, reportMissingImports=false
"""Mooncake Store over loopback TCP, as the peer of `kvfs bench net`. Run by a Python that has mooncake-transfer-engine-non-cuda
and numpy; imports nothing of kvfs.

    python mooncake_worker.py RPC_PORT server               holds the memory until its standard input ends
    python mooncake_worker.py RPC_PORT client               reads JSON requests, one a line, answers each with a JSON line:
        {"op": "put"|"get", "size": N, "count": N, "batch": N, "seconds": S, "seed": N}

The client mounts no segment, so every byte crosses the connection, into a registered buffer.
"""

import json
import os
import random
import sys
import time

import numpy
from mooncake.store import MooncakeDistributedStore

SEGMENT, LOCAL, AREA = 1536 << 20, 64 << 20, 64 << 20


def connect(port: int, own: int, segment: int, local: int) -> MooncakeDistributedStore:
    store = MooncakeDistributedStore()
    host = f"127.0.0.1:{port + own}"
    if store.setup(host, "P2PHANDSHAKE", segment, local, "tcp", "", f"127.0.0.1:{port}") != 0:
        raise SystemExit("Mooncake's client cannot be set up")
    return store


def answer(store: MooncakeDistributedStore, area: numpy.ndarray, request: dict) -> dict:
    size, count = request["size"], request["count"]
    batch = min(request["batch"], AREA // size)
    base = area.ctypes.data
    slots = [base + i * size for i in range(batch)]
    order = list(range(count))
    if request["op"] == "put":
        for number in order:
            area[:size].view(numpy.uint64)[:] = number
            if store.put_from(f"net-{size}-{number}", base, size) != 0:
                raise SystemExit(f"Mooncake did not take block {number} of {size} bytes")
        return {"ops": count, "seconds": 0.0, "cpu_s": 0.0}
    random.Random(request["seed"]).shuffle(order)
    batches = [order[i : i + batch] for i in range(0, count, batch)]
    keys = [[f"net-{size}-{n}" for n in numbers] for numbers in batches]
    sizes = [size] * batch
    done, cpu, start = 0, time.process_time(), time.perf_counter()
    end = start + request["seconds"]
    while time.perf_counter() < end:
        for numbers, names in zip(batches, keys, strict=True):
            n = len(names)
            found = store.batch_get_into(names, slots[:n], sizes[:n])
            if any(r != size for r in found) or int(area[:8].view(numpy.uint64)[0]) != numbers[0]:
                raise SystemExit("Mooncake returned other bytes than were put")
            done += n
            if time.perf_counter() >= end:
                break
    return {"ops": done, "seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}


def main() -> None:
    # Its log goes to standard error; the answers are to be alone on standard output.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    port = int(sys.argv[1])
    if sys.argv[2] == "server":
        store = connect(port, 1, SEGMENT, LOCAL)
        print("ready", file=out)
        sys.stdin.read()
    else:
        store = connect(port, 2, 0, 4 * AREA)
        area = numpy.zeros(AREA, dtype=numpy.uint8)
        if store.register_buffer(area.ctypes.data, area.nbytes) != 0:
            raise SystemExit("Mooncake cannot register the buffer")
        print("ready", file=out)
        for line in sys.stdin:
            print(json.dumps(answer(store, area, json.loads(line))), file=out)
    store.close()


main()
