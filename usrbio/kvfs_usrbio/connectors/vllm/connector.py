# pyright: basic, reportMissingImports=false
"""KvfsConnector: vLLM's interface of KV connectors on one side, Planner and Worker on the other."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvfs_usrbio.connectors.finding import Finder, Lookups
from kvfs_usrbio.connectors.keys import Keyring, fingerprint, parts_of
from kvfs_usrbio.connectors.link import Link, opener
from kvfs_usrbio.connectors.vllm.facts import of_model
from kvfs_usrbio.connectors.vllm.planner import Plan, Planner
from kvfs_usrbio.connectors.vllm.worker import FIRST_WAIT, Outcome, Settings, Worker

logger = init_logger("vllm.kvfs")

OPTIONS = {"where", "namespace", "version", "load_buffer_mib", "save_buffer_mib", "trace"}
COUNTERS = {
    "lookups": "Questions for the stored prefix of a request",
    "lookup_seconds": "Time of the scheduler in these",
    "lookup_blocks": "Blocks that were asked for",
    "found_blocks": "Blocks of these that could be loaded",
    "loads": "Loads of one request's blocks",
    "load_blocks": "Blocks loaded",
    "load_bytes": "Bytes loaded",
    "load_seconds": "Time of loads",
    "load_failed_blocks": "Blocks that were computed after all because they could not be loaded",
    "save_blocks": "Blocks given to kvfs to store",
    "save_bytes": "Bytes of these",
    "save_seconds": "Time of the worker in copying these",
    "save_dropped_blocks": "Blocks not stored since kvfs was too slow or not there",
    "stored_values": "Values that kvfs has stored, or had",
    "refused_values": "Values that kvfs did not store",
}


@dataclass
class KvfsMetadata(KVConnectorMetadata):
    plan: Plan


@dataclass
class KvfsWorkerMetadata(KVConnectorWorkerMetadata):
    outcome: Outcome

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, KvfsWorkerMetadata)
        mine, theirs = self.outcome, other.outcome
        return KvfsWorkerMetadata(
            Outcome(
                mine.failed | theirs.failed,
                mine.dropped | theirs.dropped,
                mine.lost or theirs.lost,
                max(mine.failures, theirs.failures),
            )
        )


@dataclass
class KvfsStats(KVConnectorStats):
    """Sums since the last report."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {f"kvfs_{name}": round(value, 6) for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not self.data


class KvfsPromMetrics(KVConnectorPromMetrics):
    """vllm:kvfs_NAME, a counter each."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        made = {
            name: self._counter_cls(name=f"vllm:kvfs_{name}", documentation=f"{what}.", labelnames=labelnames)
            for name, what in COUNTERS.items()
        }
        self._counters = {
            engine: {name: counter.labels(*values) for name, counter in made.items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            self._counters[engine_idx][name].inc(value)


class Trace:
    """One line of JSON for each thing done, for `kvfs bench ttft --breakdown`."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - as long as the engine
        self._lock = threading.Lock()

    def __call__(self, event: dict[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps({"at": time.time(), **event}) + "\n")


def _refuse(why: str) -> ValueError:
    return ValueError(f"KvfsConnector: {why}")


def _group(kv_cache_config: Any) -> Any:
    """The model's one kind of KV. Models with sliding windows have one, too, since vLLM's hybrid manager is off with this
    connector: their blocks then hold all tokens."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise _refuse(
            f"the model has {len(groups)} groups of KV caches (a hybrid of attention and state layers, or the hybrid manager"
            " is on: --disable-hybrid-kv-cache-manager); only models with one can be stored"
        )
    spec = groups[0].kv_cache_spec
    if type(spec) not in (FullAttentionSpec, MLAAttentionSpec):
        raise _refuse(f"KV of kind {type(spec).__name__} cannot be stored by blocks of tokens")
    return groups[0]


def _cpu_layout(config: Any, spec: Any) -> str:
    """vLLM's CPU backend lays a block out as its vector unit likes it."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return ""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(config.model_config.dtype, spec.block_size, spec.head_size, config.cache_config.cache_dtype)


def _stages(config: Any, group: Any) -> list[int]:
    """Layers of each pipeline stage: alike in every process, which the scheduler's own view of the KV, that of one rank, is
    not."""
    stages = config.parallel_config.pipeline_parallel_size
    if stages == 1:
        return [len(group.layer_names)]
    total = config.model_config.get_total_num_hidden_layers()
    return [end - start for start, end in (get_pp_indices(total, stage, stages) for stage in range(stages))]


def _facts(config: Any, kv_cache_config: Any, group: Any, stages: list[int], version: str) -> dict[str, object]:
    """All that decides which bytes a block has."""
    cache, parallel = config.cache_config, config.parallel_config
    spec = group.kv_cache_spec
    return {
        "format": 2,
        "engine": ["vllm", *vllm.__version__.split(".")[:2]],
        **of_model(config),
        "version": version,
        "hash": cache.prefix_caching_hash_algo,
        "spec": repr(spec),
        "layers": stages,
        "layout": [kv_cache_config.kv_cache_layout, _cpu_layout(config, spec)],
        "parallel": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size, kv_cache_config.kv_tp_replicas],
        "speculative": config.speculative_config is not None,
    }


class KvfsConnector(KVConnectorBase_V1):
    """Options, in kv_connector_extra_config: `where` (a mount, data directory or kvfs:// URL), `namespace` (TENANT/NAME, unless
    the URL names it), `version` (to be changed with weights that are known by name only), `load_buffer_mib`,
    `save_buffer_mib`, `trace` (a file)."""

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer, parallel = self._kv_transfer_config, vllm_config.parallel_config
        options = transfer.kv_connector_extra_config
        if unknown := set(options) - OPTIONS:
            raise _refuse(f"there is no option {', '.join(sorted(unknown))} in kv_connector_extra_config")
        if "where" not in options:
            raise _refuse('kv_connector_extra_config needs "where", a mount or data directory of kvfs')
        if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
            raise _refuse("context parallelism spreads a block over ranks, which cannot be stored")
        if transfer.kv_load_failure_policy != "recompute":
            logger.info("kvfs: kv_load_failure_policy is set to recompute: what cannot be loaded is computed")
            transfer.kv_load_failure_policy = "recompute"
        group = _group(kv_cache_config)
        spec = group.kv_cache_spec
        tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        replicas = kv_cache_config.kv_tp_replicas
        holders = tp // replicas  # ranks of one pipeline stage that hold KV of their own
        # The same number of parts on each stage, also where layers cannot be divided evenly.
        stages = _stages(vllm_config, group)
        parts = len(parts_of([spec.page_size_bytes] * max(stages)))
        facts = _facts(vllm_config, kv_cache_config, group, stages, str(options.get("version", "")))
        keyring = Keyring(fingerprint(facts), holders * pp, parts)
        connect = opener(str(options["where"]), options.get("namespace"), "default/vllm")
        trace = Trace(options["trace"]) if options.get("trace") else None
        self._planner: Planner | None = None
        self._worker: Worker | None = None
        self._counts: dict[str, float] = {}
        self._trace = trace
        if role == KVConnectorRole.SCHEDULER:

            def lookups() -> Lookups:
                store = connect()
                return Lookups(store, store.queue())

            finder = Finder(Link(lookups))
            finder.link.wait(FIRST_WAIT)
            self._finder = finder
            self._planner = Planner(
                keyring,
                finder,
                tokens=spec.block_size,
                per_hash=kv_cache_config.hash_block_size or spec.block_size,
                may_wait=tp * pp == 1,
                loads=transfer.is_kv_consumer,
                saves=transfer.is_kv_producer,
            )
            return
        rank = parallel.rank % (tp * pp)
        stage, tp_rank = rank // tp, rank % tp
        settings = Settings(
            connect,
            load_buffer=int(options.get("load_buffer_mib", 64)) << 20,
            save_buffer=int(options.get("save_buffer_mib", 0)) << 20,
            step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            block_tokens=spec.block_size,
        )
        stores = transfer.is_kv_producer and tp_rank % replicas == 0
        self._worker = Worker(settings, keyring, stage * holders + tp_rank // replicas, stores)
        self._worker.trace = trace

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # what is not stored is computed again

    # -- the worker's side

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        assert self._worker is not None
        self._worker.register(kv_caches, self._kv_cache_config.num_blocks)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._began = time.perf_counter()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        assert self._worker is not None
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, KvfsMetadata)
        self._worker.start(metadata.plan)
        if not all(load.later for load in metadata.plan.loads):
            self._began = time.perf_counter()  # vLLM calls this before the model's work only for loads that it needs

    def wait_for_layer_load(self, layer_name: str) -> None:
        """A stored block holds all layers, so they come together, before the step."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are stored with all their layers, after the step."""

    def wait_for_save(self) -> None:
        assert self._worker is not None
        if self._trace is not None:
            self._trace({"what": "step", "forward": time.perf_counter() - self._began})
        self._worker.save()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        assert self._worker is not None
        return None, self._worker.finished_loads() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        assert self._worker is not None
        return self._worker.bad_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        assert self._worker is not None
        outcome = self._worker.outcome()
        return KvfsWorkerMetadata(outcome) if outcome is not None else None

    # -- the scheduler's side

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._planner is not None
        planner, begun = self._planner, time.perf_counter()
        asked, found = planner.asked, planner.found
        answer = planner.match(request, num_computed_tokens)
        spent = time.perf_counter() - begun
        more = {
            "lookups": int(answer[0] is not None),
            "lookup_seconds": spent,
            "lookup_blocks": planner.asked - asked,
            "found_blocks": planner.found - found,
        }
        for name, value in more.items():
            self._counts[name] = self._counts.get(name, 0) + value
        if self._trace is not None:
            self._trace({"what": "exists", "request": request.request_id, "seconds": spent, "tokens": answer[0]})
        return answer

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._planner is not None
        self._planner.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        assert self._planner is not None
        planner, output = self._planner, scheduler_output
        counts = output.num_scheduled_tokens
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for request in computed:
            planner.rewound(request, 0)
        cached = output.scheduled_cached_reqs
        for request, before in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            computed[request] = before
            planner.rewound(request, 0 if request in cached.resumed_req_ids else before)
        state = output.kv_connector_block_state
        plan = planner.step(
            (request, before + counts[request], lambda request=request: state.get_block_ids(request)[0])
            for request, before in computed.items()
        )
        return KvfsMetadata(plan)

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._planner is not None
        metadata = connector_output.kv_connector_worker_meta
        if isinstance(metadata, KvfsWorkerMetadata):
            outcome = metadata.outcome
            self._planner.outcome(outcome.failed, outcome.dropped, outcome.failures, outcome.lost)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._planner is not None
        self._planner.finished(request.request_id)
        return False, None

    def reset_cache(self) -> bool | None:
        """As after a change of the weights: what is stored is not found any more, by this engine."""
        if self._planner is not None:
            self._planner.reset()
        return True

    # -- both sides

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._worker is not None:
            counts = self._worker.take_counts()
        else:
            counts, self._counts = self._counts, {}
        return KvfsStats(data=counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return KvfsStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> KVConnectorPromMetrics | None:
        return KvfsPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        else:
            self._finder.link.close()
