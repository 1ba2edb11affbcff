# pyright: basic, reportMissingImports=false
"""KvfsHiCache: SGLang's third level of cache (HiCacheStorage) on kvfs.

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "kvfs",
      "module_path": "kvfs_usrbio.connectors.sglang", "class_name": "KvfsHiCache", "interface_v1": 1,
      "allocator": "shm", "kvfs": "/mnt/kvfs"}'

Pages move between kvfs and SGLang's host pool without a copy if the pool can be shared ("allocator": "shm" makes it so);
pages.py knows how a page lies in a pool. What goes wrong is a miss: SGLang computes it again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.observability.metrics_collector import StorageMetrics
from sglang.srt.runtime_context import get_context

from kvfs_usrbio.connectors.keys import model_facts
from kvfs_usrbio.connectors.lossy import Keys, LossyStore
from kvfs_usrbio.connectors.pages import Gatherer, PagePool

FORMAT: Final = "sglang-2"  # to be changed with the meaning of what is stored
NAMESPACE: Final = "sglang"
V1: Final = 'extra config: "interface_v1": 1 is needed; pages as tensors are not offered'
LORA: Final = "SGLang names an adapter by its path, not its weights: kvfs does not store pages of engines with LoRA"
TAG: Final = "-unified-token-major"  # which SGLang appends to the model's name for pools of this layout
DECIDES: Final = (  # of SGLang's arguments for the model, as resolved, those that decide which bytes a page has
    "revision",
    "load_format",
    "model_loader_extra_config",
    "custom_weight_loader",
    "model_impl",
    "json_model_override_args",
    "dtype",
    "quantization",
    "quantization_param_path",
    "modelopt_quant",
    "rl_quant_profile",
    "kv_cache_dtype",
    "qsa_indexer_dtype",
)
DECIDES_DRAFT: Final = (
    "speculative_draft_model_revision",
    "speculative_draft_load_format",
    "speculative_draft_model_quantization",
    "speculative_draft_kv_cache_dtype",
)
MAX_FIGURES: Final = 1024  # transfers whose figures wait to be asked for

logger: Final = logging.getLogger(__name__)


class KvfsHiCache(HiCacheStorage):
    """SGLang calls it from a thread that loads and from one that stores."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Mapping[str, Any] | None = None) -> None:
        self._config = storage_config
        extra = storage_config.extra_config or {}
        if "kvfs" not in extra:
            raise ValueError('extra config: "kvfs" must name a mount point, a data directory or a kvfs:// URL')
        if not extra.get("interface_v1"):
            raise ValueError(V1)
        self._model = {"version": extra.get("model_version"), **_model(storage_config.model_name or "")}
        self._draft = _draft()
        self._store = LossyStore(extra["kvfs"], extra.get("namespace"), NAMESPACE)
        self._gatherer = Gatherer(self._store)
        self._pools: dict[str, PagePool] = {}
        self._shared: set[int] = set()
        self._figures = StorageMetrics()

    def close(self) -> None:
        self._store.close()

    # -- pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        # DeepSeek V4's anchor has no memory of its own: its pages lie in other pools.
        if mem_pool_host.kv_buffer is not None:
            self._add(PoolName.KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool_name not in self._pools and getattr(host_pool, "kv_buffer", True) is not None:
            self._add(host_pool_name, host_pool)

    def _add(self, name: str, pool: Any) -> None:
        replicated = self._config.is_mla_model and name != PoolName.MAMBA and not isinstance(pool, MHATokenToKVPoolHost)
        self._pools[str(name)] = PagePool(
            pool, lambda facts: self._keys(str(name), replicated, facts), self._store, self._gatherer
        )
        for buffer in _buffers(pool):
            storage = buffer.untyped_storage()
            if storage.nbytes() == 0 or storage.data_ptr() in self._shared:
                continue
            self._shared.add(storage.data_ptr())
            # The whole of it, under whatever views of it the pool has.
            memory = torch.empty(0, dtype=torch.uint8).set_(storage)
            how = (
                "in place"
                if self._store.share(memory)
                else 'by copying: see "allocator" and --shared in docs/engines.md'
            )
            logger.info("kvfs moves pages of pool %s (%d MiB) %s", name, storage.nbytes() >> 20, how)

    def _keys(self, name: str, replicated: bool, facts: Mapping[str, object]) -> Keys:
        """`replicated`: every tensor-parallel rank has the same, and one of them stores it."""
        config = self._config
        return Keys(
            {
                "format": FORMAT,
                "model": self._model,
                "draft": self._draft if name.startswith(PoolName.DRAFT.value) else None,
                "pool": name,
                "tensor": None if replicated else (config.tp_rank, config.tp_size),
                "pipeline": (config.pp_rank, config.pp_size),
                "context": (config.attn_cp_rank, config.attn_cp_size),
                "decode context": (config.dcp_rank, config.dcp_size),
                **facts,
            }
        )

    # -- pages of the main pool

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many of the first are all there."""
        pool = self._pools.get(PoolName.KV.value)
        return len(keys) if pool is None else pool.match_prefix(keys)

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        pool = self._pools.get(PoolName.KV.value)
        if pool is None:
            return [True] * len(keys)
        figures = self._figures
        return self._timed(pool, pool.get, keys, host_indices, figures.prefetch_pgs, figures.prefetch_bandwidth)

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        pool = self._pools.get(PoolName.KV.value)
        if pool is None:
            return [True] * len(keys)
        figures = self._figures
        return self._timed(pool, pool.put, keys, host_indices, figures.backup_pgs, figures.backup_bandwidth)

    def _timed(
        self,
        pool: PagePool,
        transfer: Callable[[Sequence[str], torch.Tensor], list[bool]],
        keys: list[str],
        host_indices: torch.Tensor,
        pages: list[int],
        bandwidth: list[float],
    ) -> list[bool]:
        begun = time.perf_counter()
        done = transfer(keys, host_indices)
        if self._config.enable_storage_metrics and len(pages) < MAX_FIGURES:
            pages.append(len(keys))
            bandwidth.append(done.count(True) * pool.page_bytes / (time.perf_counter() - begun) / (1 << 30))
        return done

    def get_stats(self) -> StorageMetrics:
        """Since the last call."""
        figures, self._figures = self._figures, StorageMetrics()
        return figures

    # -- pages of several pools

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[PoolTransfer] | None = None, extra_info: Any = None
    ) -> PoolTransferResult:
        """The prefixes that every pool has all it needs for."""
        count = self.batch_exists(keys)
        hits: dict[str, int] = {PoolName.KV: count} if count else {}
        usable = list(range(1, count + 1))
        for transfer in pool_transfers or []:
            if not usable:
                break
            pool = self._pools.get(str(transfer.name))
            there = [False] * count if pool is None else pool.exists(keys[:count])
            if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
                prefix = there.index(False) if False in there else count
                fits = set(range(1, prefix + 1))
            elif transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                window = max(1, len(transfer.keys or ()))
                fits = {end for end in range(1, count + 1) if all(there[max(0, end - window) : end])}
            else:
                continue  # does not decide what is usable, and is computed again if nothing is said of it
            if fits:
                hits[transfer.name] = max(fits)
            usable = [end for end in usable if end in fits]
        return PoolTransferResult(usable[-1] if usable else 0, hits, usable)

    def batch_get_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> dict[str, list[bool]]:
        return self._each(transfers, PagePool.get)

    def batch_set_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> dict[str, list[bool]]:
        return self._each(transfers, PagePool.put)

    def _each(
        self,
        transfers: list[PoolTransfer],
        act: Callable[[PagePool, Sequence[str], torch.Tensor], list[bool]],
    ) -> dict[str, list[bool]]:
        done: dict[str, list[bool]] = {}
        for transfer in transfers:
            keys, indices, pool = transfer.keys or [], transfer.host_indices, self._pools.get(str(transfer.name))
            if pool is None or indices is None or indices.numel() != len(keys) * pool.page_size:
                logger.error("kvfs: pool %s: %d keys do not fit what is to be moved", transfer.name, len(keys))
                done[transfer.name] = [False] * len(keys)
            else:
                done[transfer.name] = act(pool, keys, indices)
        return done

    # -- the rest of the interface

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def clear(self) -> bool:
        """What this rank has stored, and others of the same model and rank."""
        return self._store.evict_all(pool.keys for pool in self._pools.values())

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        raise NotImplementedError(V1)

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> Any:
        raise NotImplementedError(V1)

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        raise NotImplementedError(V1)

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        raise NotImplementedError(V1)


def _published(name: str) -> Any:
    """SGLang's resolved arguments of this kind; None in a program that has only a pool of SGLang's."""
    try:
        return get_context().config_bag(name)
    except ValueError:
        return None


def _model(name: str) -> dict[str, object]:
    """Which model, and how it was made of its files. `name`: what SGLang calls it, its path mostly."""
    lora, model = _published("lora"), _published("model")
    if lora is not None and (lora.enable_lora or lora.lora_paths):
        raise ValueError(LORA)
    if model is None:
        return {"weights": model_facts(name.removesuffix(TAG), None, None)}
    return {
        "weights": model_facts(model.model_path, model.revision, None),
        **{one: getattr(model, one, None) for one in DECIDES},
    }


def _draft() -> dict[str, object] | None:
    """The same for the model that guesses tokens, whose pages have pools of their own."""
    spec = _published("spec")
    if spec is None or spec.speculative_draft_model_path is None:
        return None
    return {
        "weights": model_facts(spec.speculative_draft_model_path, None, None),
        **{one: getattr(spec, one, None) for one in DECIDES_DRAFT},
    }


def _buffers(pool: Any) -> list[torch.Tensor]:
    """All memory of a host pool."""
    main = getattr(pool, "kv_buffer", None)
    main = list(main) if isinstance(main, list | tuple) else [main]
    more = getattr(pool, "get_hybrid_pool_buffer", list)()
    return [buffer for buffer in (*main, *more) if isinstance(buffer, torch.Tensor)]
