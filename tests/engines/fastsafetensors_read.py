# pyright: basic, reportMissingImports=false
"""safetensors files read with fastsafetensor-3fs-reader, run by the Python that has it:

python fastsafetensors_read.py MOUNT cpp|python
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import fastsafetensor_3fs_reader as threefs
import numpy as np
from safetensors import deserialize
from safetensors.numpy import save_file

FILES, TENSORS = 4, 5
CHUNKS = (0, 1 << 20, 1_000_003)  # 0: the reader's own choice


BUFFER = 8 << 20


def read(reader: Any, backend: str, path: str, off: int, into: np.ndarray, chunk: int) -> None:
    """All of `into` from byte `off` of the file on."""
    if backend == "cpp":
        assert reader.read_chunked(path, into.ctypes.data, off, into.size, chunk) == into.size
        return
    # It copies with CUDA, except where a piece is wanted in the reader's own memory.
    step = min(chunk or BUFFER, BUFFER)
    for at in range(0, into.size, step):
        size = min(step, into.size - at)
        assert reader.read_chunked(path, reader.iov_base, off + at, size, step) == size
        into[at : at + size] = np.frombuffer(ctypes.string_at(reader.iov_base, size), np.uint8)


def main() -> None:
    mount, backend = sys.argv[1:]
    assert threefs.is_available()
    assert threefs.extract_mount_point(f"{mount}/any") in (mount, None)
    rng = np.random.default_rng(3)
    wanted: dict[str, dict[str, np.ndarray]] = {}
    for i in range(FILES):
        path = str(Path(mount) / f"model-{i}.safetensors")
        wanted[path] = {
            f"layer.{j}": rng.standard_normal((rng.integers(1, 700), 1000)).astype(np.float32) for j in range(TENSORS)
        }
        save_file(wanted[path], path)
    reader = threefs.create_reader(backend, mount_point=mount, buffer_size=BUFFER)
    headers = reader.read_headers_batch(list(wanted))
    assert headers.keys() == wanted.keys()
    equal = 0
    for chunk in CHUNKS:
        equal = 0
        for path, tensors in wanted.items():
            text, header_length, size = headers[path]
            assert size == Path(path).stat().st_size
            whole = np.zeros(size, np.uint8)
            head = Path(path).read_bytes()[:header_length]
            assert head[8:].decode().strip() == text.strip()
            whole[:header_length] = np.frombuffer(head, np.uint8)
            read(reader, backend, path, header_length, whole[header_length:], chunk)
            for name, tensor in deserialize(whole.tobytes()):
                assert bytes(tensor["data"]) == tensors[name].tobytes(), (path, name, chunk)
                equal += 1
    reader.close()
    print(f"{backend}: {len(wanted)} files, {equal} tensors equal")


if __name__ == "__main__":
    main()
