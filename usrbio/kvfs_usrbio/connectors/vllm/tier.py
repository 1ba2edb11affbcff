# pyright: basic, reportMissingImports=false
"""KvfsTier: kvfs as the secondary tier of vLLM's OffloadingConnector, which is how KV in a GPU's memory gets there.

vLLM moves chunks between the device and its primary tier, a mapping in /dev/shm; KvfsTier moves them between that and kvfs,
through staging memory as everything here (transfer.py says why). It runs in the scheduler's process and never holds it up:
lookups, loads and stores have a thread each.
"""

from __future__ import annotations

import ctypes
import os
import queue as queues
import threading
import time
from collections.abc import Collection, Iterable
from typing import Any, ClassVar

import vllm
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import LookupResult, Medium, RequestOffloadingContext
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvfs_usrbio.connectors.finding import DEADLINE, Lookups
from kvfs_usrbio.connectors.keys import Keyring, fingerprint, model_facts
from kvfs_usrbio.connectors.link import Link, opener
from kvfs_usrbio.connectors.transfer import TIMEOUT, Load, Loader, Pages, Saver, Staging, Transfers
from kvfs_usrbio.connectors.vllm.facts import of_model

logger = init_logger("vllm.kvfs")

MAX_STORES = 64  # jobs waiting to be stored; more fail at once
PIECE = 4 << 20  # a chunk is cut into pieces of this size, of which a value of kvfs holds some
FIRST_WAIT = 5.0


class _Lookups(AsyncLookupManager):
    """vLLM's own thread for lookups, asking kvfs."""

    def __init__(self, tier_type: str, keyring: Keyring, connect: Any) -> None:
        self._keyring = keyring
        self.link: Link[Lookups] = Link(lambda: Lookups(store := connect(), store.queue()))
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[Any], req_context: Any) -> Iterable[bool]:
        connection = self.link.current()
        if connection is None:
            return [False] * len(keys)
        asked = self._keyring.of_all([bytes(key) for key in keys])
        try:
            operation = connection.store.submit_exists(connection.queue, asked)
            until = time.monotonic() + DEADLINE
            while not operation.done:
                connection.queue.wait(max(until - time.monotonic(), 0.001))
            statuses = operation.result()
            self.link.worked()
        except OSError as error:
            self.link.lose(connection, error)
            return [False] * len(keys)
        parts = self._keyring.parts
        return [min(statuses[i : i + parts]) > 0 for i in range(0, len(statuses), parts)]


def _of_model(name: str, version: str | None) -> dict[str, object]:
    """What is known of the model here: all of it if vLLM's configuration is at hand, else its name, and whoever set it up says
    with `version` which weights these are, how they were loaded and what was overridden."""
    config = get_current_vllm_config_or_none()
    if config is not None:
        if config.lora_config is not None:
            raise ValueError(
                "KvfsTier: vLLM's hashes name an adapter, not its weights: with LoRA nothing can be stored"
            )
        return of_model(config)
    if version is None and not os.path.isdir(name):
        raise ValueError(
            f'KvfsTier: {name} is no local directory, and which weights it stands for is not known here: give the tier a "version", to'
            " be changed with the weights and with how they are loaded"
        )
    return {"model": model_facts(name, None, None)}


class KvfsTier(SecondaryTierManager):
    """`where`, `namespace` and `version` as KvfsConnector's."""

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        where: str,
        namespace: str | None = None,
        version: str | None = None,
        load_buffer_mib: int = 64,
        save_buffer_mib: int = 128,
        backpressure_detector: Any = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._row = self.block_size_bytes
        base = ctypes.addressof(ctypes.c_char.from_buffer(primary_kv_view.cast("B")))
        pieces = [(base + at, min(PIECE, self._row - at)) for at in range(0, self._row, PIECE)]
        self._pages = Pages(pieces, primary_kv_view, stride=self._row)
        mapper = FileMapper.from_offloading_spec("", offloading_spec, offloading_spec.blocks_per_chunk)
        facts = {
            "format": 2,
            "engine": ["vllm tier", *vllm.__version__.split(".")[:2]],
            **_of_model(offloading_spec.config.model.name, version),
            "version": version,
            "run": {name: value for name, value in mapper.get_run_config().items() if name != "model_name"},
            "row": self._row,
            "layout": offloading_spec.config.kv_cache_layout,
        }
        self._keyring = Keyring(fingerprint(facts), 1, len(self._pages.sizes))

        connect = opener(where, namespace, "default/vllm")

        def link(size: int) -> Link[Transfers]:
            def transfers() -> Transfers:
                store = connect()
                return Transfers(
                    store, store.queue(), Staging.of(store, self._pages.room(size << 20), max(self._pages.sizes))
                )

            return Link(transfers)

        self._lookups = _Lookups(tier_type, self._keyring, connect)
        self._loader = Loader(link(load_buffer_mib), self._pages)
        self._saver = Saver(link(save_buffer_mib), self._pages)
        for one in (self._lookups.link, self._loader.link, self._saver.link):
            one.wait(FIRST_WAIT)
        self._loads: dict[int, tuple[list[Any], Load]] = {}
        self._stores: queues.Queue[TransferJob | list[bytes] | None] = queues.Queue(MAX_STORES)
        self._stored: queues.SimpleQueue[JobResult] = queues.SimpleQueue()
        self._thread = threading.Thread(target=self._store, name="kvfs-store", daemon=True)
        self._thread.start()
        logger.info("kvfs: chunks of %d KiB in %d parts", self._row >> 10, self._keyring.parts)

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: Any) -> None:
        self._lookups.flush()

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_load(self, job_metadata: TransferJob) -> None:
        keys = list(job_metadata.keys)
        load = Load(str(job_metadata.job_id), self._of(keys), [int(chunk) for chunk in job_metadata.chunk_ids])
        self._loads[job_metadata.job_id] = keys, load
        self._loader.submit(load)

    def submit_store(self, job_metadata: TransferJob) -> None:
        try:
            self._stores.put_nowait(job_metadata)
        except queues.Full:
            self._stored.put(JobResult(job_metadata.job_id, success=False))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results: list[JobResult] = []
        while not self._stored.empty():
            results.append(self._stored.get())
        for job in [job for job, (_, load) in self._loads.items() if load.done.is_set()]:
            keys, load = self._loads.pop(job)
            good = [key for i, key in enumerate(keys) if i not in load.failed]
            # Or vLLM would find them and try to load them for ever.
            self._lookups.mark_miss([keys[i] for i in load.failed])
            if load.damaged and not self._stores.full():
                self._stores.put_nowait(load.damaged)
            results.append(JobResult(job, not load.failed, good, load.seconds, load.bytes))
        return results

    def drain_jobs(self) -> None:
        for _, load in list(self._loads.values()):
            load.done.wait()
        self._stores.join()

    def shutdown(self) -> None:
        self._stores.put(None)
        self._thread.join(TIMEOUT)
        self._lookups.shutdown()
        self._loader.close()
        for link in (self._lookups.link, self._loader.link, self._saver.link):
            link.close()

    def _of(self, keys: Collection[Any]) -> list[bytes]:
        return self._keyring.of_all([bytes(key) for key in keys])

    def _store(self) -> None:
        while (job := self._stores.get()) is not None:
            if isinstance(job, list):  # keys whose values are damaged
                self._saver.evict(job)
                self._stores.task_done()
                continue
            begun, moved, left = time.monotonic(), 0, list(zip(job.keys, job.chunk_ids, strict=True))
            answered = True
            while left:
                batch = left
                saved = self._saver.save(
                    [int(chunk) for _, chunk in batch], lambda i, batch=batch: self._of([batch[i][0]])
                )
                moved += saved.bytes
                left = [batch[i] for i in saved.dropped]
                answered = self._saver.drain(TIMEOUT)
                if not answered or not saved.bytes:
                    break
            ok = answered and not left and self._saver.refused == self._saver.lost == 0
            self._saver.refused = self._saver.stored = self._saver.lost = 0
            self._stored.put(JobResult(job.job_id, ok, None, time.monotonic() - begun, moved))
            self._stores.task_done()
        self._stores.task_done()
