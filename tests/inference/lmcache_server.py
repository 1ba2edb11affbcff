"""LMCache's multiprocess server as a test runs it: on the CPU, with a second level of the test's choice."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from environments import Environment

START_S = 90.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def kvfs_level(directory: Path) -> dict[str, object]:
    return {
        "type": "native_plugin",
        "module_path": "kvfs_usrbio.connectors.lmcache_l2",
        "class_name": "KvfsL2",
        "adapter_params": {"kvfs": str(directory)},
    }


def in_vllm(port: int) -> dict[str, object]:
    """vLLM's kv_transfer_config for the server at this port."""
    where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port, "lmcache.mp.mq_timeout": 60}
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": where,
    }


@contextmanager
def server(env: Environment, log: Path, level: Mapping[str, object]) -> Generator[int]:
    """Its port. `--supported-transfer-mode engine_driven`: an engine without CUDA can use no other."""
    port = free_port()
    options = ("--host", "127.0.0.1", "--port", str(port), "--chunk-size", "256", "--eviction-policy", "LRU")
    first = ("--l1-size-gb", "1", "--l1-init-size-gb", "1", "--supported-transfer-mode", "engine_driven")
    second = ("--disable-observability", "--l2-adapter", json.dumps(level))
    with log.open("wb") as said:
        process = subprocess.Popen(
            [env.python, "-m", "lmcache.v1.multiprocess.server", *options, *first, *second],
            env=env.variables({}),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_S
        while "server is running" not in log.read_text(errors="replace"):
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(0.1)
        yield port
        process.terminate()
        process.wait(30)
    finally:
        process.kill()
        process.wait(30)
