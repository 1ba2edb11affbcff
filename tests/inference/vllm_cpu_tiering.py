# pyright: basic, reportMissingImports=false
"""vLLM's TieringOffloadingSpec on the CPU, which it refuses there since its worker needs a GPU's streams. Only that worker is
replaced, the copying of blocks between the device's memory, here the host's, and the primary tier; the OffloadingConnector, the manager, the
primary tier and its mapping are vLLM's own."""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class HostWorker(OffloadingWorker):
    def __init__(self, caches: Any, per_chunk: int, region: SharedOffloadRegion) -> None:
        self._per_chunk = per_chunk
        self._region = region
        self._groups = caches.group_data_refs
        self._device = [tensor.tensor.numpy() for tensor in caches.tensors]
        self._host = [
            region.create_next_worker_view(tensor.page_size_bytes * per_chunk).numpy() for tensor in caches.tensors
        ]
        self._ended: list[TransferResult] = []

    def _copy(self, job: Any, device: Any, host: Any, *, store: bool) -> bool:
        begun, moved, blocks_done, chunks_done = time.perf_counter(), 0, 0, 0
        for group, (count, first) in enumerate(zip(device.group_sizes, device.block_indices, strict=True)):
            if not count:
                continue
            skipped = first % self._per_chunk
            chunks = -(-(count + skipped) // self._per_chunk)
            blocks = device.block_ids[blocks_done : blocks_done + count]
            slots = host.block_ids[chunks_done : chunks_done + chunks]
            for ref in self._groups[group]:
                pages, rows = self._device[ref.tensor_idx], self._host[ref.tensor_idx]
                size = ref.page_size_bytes
                for i, block in enumerate(blocks, skipped):
                    row, at = slots[i // self._per_chunk], i % self._per_chunk * pages.shape[1]
                    if store:
                        rows[row, at : at + size] = pages[block, :size]
                    else:
                        pages[block, :size] = rows[row, at : at + size]
                    moved += size
            blocks_done += count
            chunks_done += chunks
        self._ended.append(TransferResult(job, True, moved, time.perf_counter() - begun))
        return True

    def submit_store(self, job_id: Any, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id: Any, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, dst_spec, src_spec, store=False)

    def get_finished(self) -> list[TransferResult]:
        ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids: Any) -> None:
        """They have ended when they were submitted."""

    def shutdown(self) -> None:
        self._device, self._host = [], []
        self._region.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):
    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = HostWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker
