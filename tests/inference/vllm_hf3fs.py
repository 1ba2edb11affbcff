# pyright: basic, reportMissingImports=false
"""vLLM's own client for 3FS, unmodified, on a machine without CUDA; run by vLLM's own Python:

    python vllm_hf3fs.py FILE_ON_THE_MOUNT

Replaced are CUDA's parts alone: streams and events do nothing, pinned memory is ordinary, and the two copies between tensors and
shared memory, which vLLM compiles with CUDA's headers, are made here. The last line of output is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

PAGE = 192 << 10
ENTRIES = 16
SIZE = 1 << 40  # as vLLM makes it: far larger than the store
ROUNDS = 6


def without_cuda() -> None:
    import torch
    import torch.utils.cpp_extension as extension

    def read_shm(shared: torch.Tensor, _pinned: torch.Tensor, tensors: list[torch.Tensor], _stream: int) -> None:
        at = 0
        for tensor in tensors:
            size = tensor.numel() * tensor.itemsize
            tensor.view(-1).view(torch.uint8).copy_(shared[at : at + size])
            at += size

    def write_shm(tensors: list[torch.Tensor], shared: torch.Tensor, _pinned: torch.Tensor, _stream: int) -> None:
        at = 0
        for tensor in tensors:
            size = tensor.numel() * tensor.itemsize
            shared[at : at + size].copy_(tensor.view(-1).view(torch.uint8))
            at += size

    class Stream:
        cuda_stream = 0

        def wait_event(self, _event: object) -> None: ...

    real = torch.empty

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return real(*shape, **options)

    torch.empty = empty
    torch.cuda.Stream = Stream
    torch.cuda.stream = lambda _stream: contextlib.nullcontext()
    extension.CUDA_HOME = "/"
    extension.load = lambda **_how: SimpleNamespace(read_shm=read_shm, write_shm=write_shm)


def main() -> None:
    path = sys.argv[1]
    without_cuda()
    import torch
    from vllm.distributed.kv_transfer.kv_connector.v1.hf3fs import hf3fs_client

    assert hf3fs_client.HF3FS_AVAILABLE
    torch.manual_seed(0)
    clients = [hf3fs_client.Hf3fsClient(path, SIZE, PAGE, ENTRIES) for _ in range(2)]
    event: Any = None
    wrong = results = 0
    for number in range(ROUNDS):
        writer, reader = clients[number % 2], clients[1 - number % 2]
        pages = [torch.randn(PAGE // 2).to(torch.bfloat16) for _ in range(ENTRIES)]
        # Scattered over the terabyte, another place in each round.
        offsets = [((i * 7919 + number) % (SIZE // PAGE)) * PAGE for i in range(ENTRIES)]
        results += sum(result == PAGE for result in writer.batch_write(offsets, pages, event))
        found = [torch.zeros(PAGE // 2, dtype=torch.bfloat16) for _ in range(ENTRIES)]
        results += sum(result == PAGE for result in reader.batch_read(offsets, found))
        wrong += sum(not torch.equal(one, other) for one, other in zip(pages, found, strict=True))
        writer.flush()
        with open(path, "rb", buffering=0) as file:  # through the mount
            for offset, page in zip(offsets, pages, strict=True):
                wrong += os.pread(file.fileno(), PAGE, offset) != page.view(torch.uint8).numpy().tobytes()
    try:
        clients[0].batch_read([SIZE], [torch.zeros(PAGE // 2, dtype=torch.bfloat16)])
        refused = False
    except ValueError:
        refused = True
    for client in clients:
        client.close()
    print(json.dumps({"results": results, "wrong": wrong, "refused": refused}))


if __name__ == "__main__":
    main()
