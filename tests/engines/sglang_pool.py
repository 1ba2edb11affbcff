# pyright: basic, reportMissingImports=false
"""SGLang's host pool of KV pages through one of its storage backends, run by SGLang's own Python:

    python sglang_pool.py BACKEND LAYOUT [--kind mha|mla] [--pages N] [--page-size TOKENS] [--rounds N] [--seed N]
      [--daemon PID] [--kvfs WHERE] [--allocator default|shm]

BACKEND is `kvfs` (at WHERE), `hf3fs` (with the real USRBIO client; configured by SGLANG_HICACHE_HF3FS_CONFIG_PATH), `file`, or
`memcpy`, which only copies. Random pages are written from one half of the pool and read back into the other. CPU time is
this process's and the daemon's. Prints one line of JSON, as test_sglang.PoolReport.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from typing import Any

import torch
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo, MLABufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

LAYERS, HEADS, HEAD_DIM = 28, 8, 128  # of a 7B model with grouped queries
LATENT, ROPE = 512, 64  # of a model with latent attention
BATCH = 128  # pages of one call, as SGLang's controller makes them


def latent_pool(layout: str, tokens: int, page_size: int, allocator: str) -> Any:
    rows = tuple(torch.zeros(8, 1, LATENT + ROPE, dtype=torch.bfloat16) for _ in range(LAYERS))
    device = MLABufferInfo(
        buffers=rows,
        data_ptrs=torch.tensor([layer.data_ptr() for layer in rows], dtype=torch.uint64),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=page_size,
        kv_lora_rank=LATENT,
        qk_rope_head_dim=ROPE,
        kv_cache_dim=LATENT + ROPE,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return MLATokenToKVPoolHost(
        device,
        2.0,
        0,
        page_size,
        layout,
        pin_memory=False,
        device="cpu",
        allocator_type=allocator,
        device_capacity_tokens=8,
        start_layer=0,
        end_layer=LAYERS - 1,
        target_layer_num=LAYERS,
        host_token_capacity=tokens,
    )


def host_pool(layout: str, tokens: int, page_size: int, allocator: str = "default") -> Any:
    """Room for `tokens`. Of the device's pool, which is tiny, only the geometry matters."""
    keys, values = (
        tuple(torch.zeros(8, HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(LAYERS)) for _ in range(2)
    )
    pointers = [torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.uint64) for layers in (keys, values)]
    buffers = KVBuffers(k=keys, v=values, k_data_ptrs=pointers[0], v_data_ptrs=pointers[1], layout=KVBufferLayout.NHD)
    device = MHABufferInfo(
        buffers=buffers,
        page_size=page_size,
        head_num=HEADS,
        head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return MHATokenToKVPoolHost(
        device,
        2.0,
        0,
        page_size,
        layout,
        pin_memory=False,
        device="cpu",
        allocator_type=allocator,
        device_capacity_tokens=8,
        start_layer=0,
        end_layer=LAYERS - 1,
        host_token_capacity=tokens,
    )


class Copies:
    """Not a backend, but what each of them does at least: every byte moved once."""

    def __init__(self, pool: Any, half: int) -> None:
        self._pool = pool
        self._half = half
        self._there: set[str] = set()
        self._kept = torch.zeros(pool.get_size_per_token() * half, dtype=torch.uint8)

    def batch_exists(self, keys: list[str]) -> int:
        return sum(key in self._there for key in keys)

    def _copy(self, indices: Any, back: bool) -> None:
        kept = self._kept.data_ptr()
        addresses, sizes = self._pool.get_page_buffer_meta(indices)
        at = int(indices[0]) % self._half * self._pool.get_size_per_token()
        for address, size in zip(addresses, sizes, strict=True):
            ctypes.memmove(*((address, kept + at) if back else (kept + at, address)), size)
            at += size

    def batch_set_v1(self, keys: list[str], indices: Any) -> list[bool]:
        self._copy(indices, False)
        self._there.update(keys)
        return [True] * len(keys)

    def batch_get_v1(self, keys: list[str], indices: Any) -> list[bool]:
        self._copy(indices, True)
        return [True] * len(keys)


def backend_of(name: str, pool: Any, kind: str, where: str | None = None) -> Any:
    """As SGLang's controller makes it and lets it know the pool."""
    config = HiCacheStorageConfig(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=kind == "mla",
        enable_storage_metrics=False,
        is_page_first_layout=pool.layout == "page_first",
        model_name="tiny",
        extra_config={
            "backend_name": "kvfs",
            "module_path": "kvfs_usrbio.connectors.sglang",
            "class_name": "KvfsHiCache",
            "interface_v1": 1,
            "kvfs": where,
        },
    )
    backend = StorageBackendFactory.create_backend("dynamic" if name == "kvfs" else name, config, pool)
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    return backend


def cpu_seconds(daemon: int | None) -> float:
    """User and system time of this process and of the daemon, if there is one."""
    own = time.process_time()
    if daemon is None:
        return own
    with open(f"/proc/{daemon}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return own + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Pages:
    """The way SGLang's controller takes for each backend: page by page for file, in place for the others."""

    def __init__(self, backend: Any, pool: Any, page_size: int, in_place: bool) -> None:
        self._backend = backend
        self._pool = pool
        self._page_size = page_size
        self._in_place = in_place

    def write(self, keys: list[str], indices: Any) -> bool:
        if self._in_place:
            return all(self._backend.batch_set_v1(keys, indices))
        data = [self._pool.get_data_page(indices[i * self._page_size]) for i in range(len(keys))]
        return bool(self._backend.batch_set(keys, data))

    def read(self, keys: list[str], indices: Any) -> bool:
        if self._in_place:
            return all(self._backend.batch_get_v1(keys, indices))
        pages = self._backend.batch_get(keys, [self._pool.get_dummy_flat_data_page() for _ in keys])
        if pages is None or any(page is None for page in pages):
            return False
        for i, page in enumerate(pages):
            self._pool.set_from_flat_data_page(int(indices[i * self._page_size]), page)
        return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backend", choices=("kvfs", "hf3fs", "file", "memcpy"))
    parser.add_argument("layout")
    parser.add_argument("--kind", choices=("mha", "mla"), default="mha")
    parser.add_argument("--pages", type=int, default=32)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--daemon", type=int)
    parser.add_argument("--kvfs")
    parser.add_argument("--allocator", default="default")
    options = parser.parse_args()
    size, count = options.page_size, options.pages
    half = size * count
    make = host_pool if options.kind == "mha" else latent_pool
    pool = make(options.layout, 2 * half, size, options.allocator)
    if options.backend == "memcpy":
        backend: Any = Copies(pool, half)
    else:
        backend = backend_of(options.backend, pool, options.kind, options.kvfs)
    pages = Pages(backend, pool, size, options.backend != "file")
    torch.manual_seed(options.seed)
    source, target = torch.arange(half), torch.arange(half, 2 * half)
    spent: dict[str, float] = dict.fromkeys(("write_s", "read_s", "write_cpu_s", "read_cpu_s"), 0.0)
    done = {"wrote": True, "found": True, "read": True, "equal": True}

    def timed(kind: str, transfer: Any, keys: list[str], indices: Any) -> bool:
        wall, cpu, good = time.perf_counter(), cpu_seconds(options.daemon), True
        for first in range(0, count, BATCH):
            part = keys[first : first + BATCH]
            good &= transfer(part, indices[first * size : (first + len(part)) * size])
        spent[f"{kind}_s"] += time.perf_counter() - wall
        spent[f"{kind}_cpu_s"] += cpu_seconds(options.daemon) - cpu
        return good

    for round_ in range(options.rounds):
        pool.kv_buffer.view(torch.int16).random_(-30000, 30000)
        keys = [f"{options.seed:016x}{round_:016x}{i:032x}" for i in range(count)]
        done["found"] &= backend.batch_exists(keys) == 0
        done["wrote"] &= timed("write", pages.write, keys, source)
        done["found"] &= backend.batch_exists(keys) == count
        done["read"] &= timed("read", pages.read, keys, target)
        for i in range(count):
            here, there = (pool.get_data_page(int(half_[i * size])) for half_ in (source, target))
            # As integers: random bits have many a NaN.
            done["equal"] &= torch.equal(here.contiguous().view(torch.int16), there.contiguous().view(torch.int16))
    clients = getattr(backend, "clients", [])
    report = {
        "backend": type(backend).__name__,
        "client": type(clients[0]).__name__ if clients else "",
        "bytes": pool.get_size_per_token() * half * options.rounds,
        **done,
        **spent,
    }
    print(json.dumps(report), flush=True)
    os._exit(0)  # SGLang's exit handlers would close its memory under tensors that still use it


if __name__ == "__main__":
    main()
