# pyright: basic, reportMissingImports=false
"""Random objects through the client of LMCache's hf3fs connector, run by LMCache's own Python:

python lmcache_objects.py MOUNT
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from lmcache.v1.storage_backend.connector.hf3fs_connector import Hf3fsClient, Hf3fsClientConfig, Hf3fsFile

SHARED = 4 << 20  # bytes of the client's memory: larger objects take several operations


def main() -> None:
    mount = sys.argv[1]
    client = Hf3fsClient.get_instance(Hf3fsClientConfig(mount, iov_size=SHARED, ior_entries=16))
    rng = random.Random(7)
    wanted: dict[Path, bytes] = {}
    for i in range(24):
        path = Path(mount) / f"object-{i}"
        wanted[path] = rng.randbytes(rng.choice((1, 4095, 65536, 3 << 20, SHARED, SHARED + 1, 10_000_001)))
        with Hf3fsFile(path.with_suffix(".tmp"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, client) as file:
            file.write(memoryview(wanted[path]), len(wanted[path]), 0)
        Hf3fsFile.rename(path.with_suffix(".tmp"), path)
    for path, data in wanted.items():
        with Hf3fsFile(path, os.O_RDONLY, client) as file:
            read = bytearray(len(data))
            assert file.read(memoryview(read), len(data), 0) == len(data)
        assert read == data, path
        assert path.read_bytes() == data, path
    client.close()
    print(f"{len(wanted)} objects")


if __name__ == "__main__":
    main()
