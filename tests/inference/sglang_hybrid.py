# pyright: basic, reportMissingImports=false
"""Two host pools of SGLang's, of which one keeps only windows, through KvfsHiCache's interface for hybrid models:

python sglang_hybrid.py WHERE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engines"))
from sglang_pool import backend_of, host_pool, latent_pool

PAGE_SIZE = 16
PAGES = 6


def main() -> None:
    tokens = 2 * PAGES * PAGE_SIZE
    full, window = (
        host_pool("page_first", tokens, PAGE_SIZE, "shm"),
        latent_pool("page_first", tokens, PAGE_SIZE, "shm"),
    )
    for pool in (full, window):
        pool.kv_buffer.view(torch.int16).random_(-30000, 30000)
    backend = backend_of("kvfs", full, "mha", sys.argv[1])
    backend.register_mem_host_pool_v2(full, PoolName.KV)
    backend.register_mem_host_pool_v2(window, PoolName.SWA)
    keys = [f"{i:064x}" for i in range(PAGES)]
    source, target = torch.arange(PAGES * PAGE_SIZE), torch.arange(PAGES * PAGE_SIZE, tokens)

    def part(indices: torch.Tensor, first: int, last: int) -> PoolTransfer:
        """Of the window pool's pages."""
        return PoolTransfer(
            name=PoolName.SWA,
            keys=keys[first:last],
            host_indices=indices[first * PAGE_SIZE : last * PAGE_SIZE],
            hit_policy=PoolHitPolicy.TRAILING_PAGES,
        )

    assert backend.batch_exists_v2(keys, [part(source, 0, 2)]).kv_hit_pages == 0
    assert all(backend.batch_set_v1(keys[:5], source[: 5 * PAGE_SIZE]))
    # Pages 0, 2 and 3 of the windows: a window of two pages can end behind the first page (it is all there is) or the fourth.
    for first, last in ((0, 1), (2, 4)):
        assert backend.batch_set_v2([part(source, first, last)]) == {PoolName.SWA: [True] * (last - first)}
    found = backend.batch_exists_v2(keys, [part(source, 2, 4)])
    assert found.kv_hit_pages == 4, found
    assert found.restorable_prefix_pages == [1, 4], found
    assert found.extra_pool_hit_pages == {PoolName.KV: 5, PoolName.SWA: 4}, found
    all_pages = PoolTransfer(name=PoolName.SWA, hit_policy=PoolHitPolicy.ALL_PAGES)
    assert backend.batch_exists_v2(keys, [all_pages]).kv_hit_pages == 1
    assert backend.batch_get_v2([part(target, 1, 4)]) == {PoolName.SWA: [False, True, True]}
    for page in (2, 3):
        here, there = (window.get_data_page(int(half[page * PAGE_SIZE])).view(torch.int16) for half in (source, target))
        assert torch.equal(here, there)
    assert backend.clear()
    assert backend.batch_exists(keys) == 0
    print("as promised", flush=True)
    os._exit(0)  # SGLang's exit handlers would close its memory under tensors that still use it


if __name__ == "__main__":
    main()
