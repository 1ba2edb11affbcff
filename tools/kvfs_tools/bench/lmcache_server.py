"""LMCache's multiprocess server on the CPU, with a second level of the caller's choice, and how vLLM is told of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from kvfs_tools.bench.programs import BenchError

CHUNK: Final = 256  # tokens of an object, LMCache's default
START_S: Final = 120.0
END_S: Final = 30.0
STARTED: Final = "cache server is running..."  # the line it logs


def transfer(port: int) -> dict[str, Any]:
    """vLLM's kv_transfer_config for the server at this port."""
    where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port, "lmcache.mp.mq_timeout": 60}
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": where,
    }


def kvfs_level(directory: Path) -> dict[str, Any]:
    """`level`: kvfs's plug-in."""
    return {
        "type": "native_plugin",
        "module_path": "kvfs_usrbio.connectors.lmcache_l2",
        "class_name": "KvfsL2",
        "adapter_params": {"kvfs": str(directory)},
    }


def files_level(directory: Path) -> dict[str, Any]:
    """`level`: LMCache's own files, an object each."""
    return {"type": "fs", "base_path": str(directory)}


@contextmanager
def server(
    python: Path, log: Path, level: Mapping[str, Any], *, gib: int = 1, environ: Mapping[str, str] | None = None
) -> Generator[int]:
    """Its port; it is ended afterwards. `gib`: of its first level. BenchError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    options = {
        "host": "127.0.0.1",
        "port": str(port),
        "chunk-size": str(CHUNK),
        "eviction-policy": "LRU",
        "l1-size-gb": str(gib),
        "l1-init-size-gb": str(gib),
        "supported-transfer-mode": "engine_driven",  # the other one needs CUDA
        "l2-adapter": json.dumps(level),
    }
    line = [str(python), "-m", "lmcache.v1.multiprocess.server", "--disable-observability"]
    line += [word for name, value in options.items() for word in (f"--{name}", value)]
    with log.open("wb") as said:
        process = subprocess.Popen(
            line, env=environ or os.environ, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + START_S
        while STARTED not in (words := log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"LMCache's server does not start: {words.strip().splitlines()[-1:] or 'no word'}")
            time.sleep(0.1)
        yield port
        process.terminate()
        process.wait(END_S)
    finally:
        process.kill()
        process.wait(END_S)
