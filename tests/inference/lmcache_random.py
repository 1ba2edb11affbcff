# pyright: basic, reportMissingImports=false
"""Requests that share prefixes, in random order and several at a time, through LMCache's L2 adapter of the given JSON:

    python lmcache_random.py ADAPTER

What an object holds follows from its key, so that each one that is loaded is compared with what computing it anew would
give. Some are deleted on the way. Prints one line of JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import sys
from typing import Any

import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.native_plugin_l2_adapter import NativePluginL2AdapterConfig
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.platform import consume_fd
from prefixes import chain

SIZE = 64 << 10  # of an object
OBJECTS = 16  # of the longest request
REQUESTS = 80
TOGETHER = 3  # requests that load and store at the same time
WAIT_MS = 30_000


class Arena:
    """Shared memory, as the first level of LMCache's server is."""

    def __init__(self, count: int) -> None:
        fd = os.memfd_create("lmcache-arena")
        os.ftruncate(fd, count * SIZE)
        self.whole = torch.frombuffer(mmap.mmap(fd, count * SIZE), dtype=torch.uint8)
        os.close(fd)

    def object(self, number: int) -> TensorMemoryObj:
        data = self.whole[number * SIZE : (number + 1) * SIZE]
        about = MemoryObjMetadata(
            shape=torch.Size([SIZE]),
            dtype=torch.uint8,
            address=data.data_ptr(),
            phy_size=SIZE,
            fmt=MemoryFormat.KV_2LTD,
            ref_count=1,
        )
        return TensorMemoryObj(data, about, parent_allocator=None)


def computed(name: bytes) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(name[:6], "big"))
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=generator)


def wait(fd: int, ask: Any) -> Any:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while (found := ask()) is None:
        if not poller.poll(WAIT_MS):
            raise TimeoutError("the adapter does not answer")
        consume_fd(fd)
    return found


def main() -> None:
    adapter = create_l2_adapter(NativePluginL2AdapterConfig.from_dict(json.loads(sys.argv[1])))
    rng = random.Random(5)
    arena = Arena(TOGETHER * OBJECTS)
    report = {"loaded": 0, "missed": 0, "wrong": 0}
    for _ in range(REQUESTS // TOGETHER):
        requests = [chain(rng, OBJECTS) for _ in range(TOGETHER)]
        places = rng.sample(range(TOGETHER * OBJECTS), TOGETHER * OBJECTS)
        loads: list[tuple[int, list[bytes], list[Any]]] = []
        rests: list[tuple[list[bytes], list[Any]]] = []
        for i, names in enumerate(requests):
            keys = [ObjectKey(chunk_hash=name, model_name="m", kv_rank=0) for name in names]
            asked = adapter.submit_lookup_and_lock_task(keys, {})
            there = wait(
                adapter.get_lookup_and_lock_event_fd(),
                lambda: adapter.query_lookup_and_lock_result(asked),  # noqa: B023
            )
            count = there.count_leading_ones()
            objects = [arena.object(place) for place in places[i * OBJECTS :][: len(names)]]
            if count:
                loads.append((adapter.submit_load_task(keys[:count], objects[:count]), names, objects))
            rests.append((names[count:], objects[count:]))
            report["missed"] += len(names) - count
            adapter.submit_unlock(keys)
        for task, names, objects in loads:
            loaded = wait(adapter.get_load_event_fd(), lambda: adapter.query_load_result(task))  # noqa: B023
            for j in loaded.get_indices_list():
                report["loaded"] += 1
                report["wrong"] += not torch.equal(objects[j].raw_data, computed(names[j]))
        tasks = set()
        for names, objects in rests:
            for name, one in zip(names, objects, strict=True):
                one.raw_data.copy_(computed(name))
            if names:
                keys = [ObjectKey(chunk_hash=name, model_name="m", kv_rank=0) for name in names]
                tasks.add(adapter.submit_store_task(keys, objects))
        stored: dict[Any, Any] = {}
        while not tasks <= stored.keys():
            stored |= wait(adapter.get_store_event_fd(), lambda: adapter.pop_completed_store_tasks() or None)
        adapter.delete([ObjectKey(chunk_hash=rng.choice(rng.choice(requests)), model_name="m", kv_rank=0)])
    adapter.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
