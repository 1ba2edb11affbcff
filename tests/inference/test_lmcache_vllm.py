"""vLLM 0.32 with LMCache 0.5.6's own connector and server, as released, and kvfs below the server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from vllm_process import PROMPT, PROMPTS, cached, engine, tokens

from commands import kill_daemon, kvfs
from environments import Environment
from kvfs_tools.bench.lmcache_server import CHUNK, kvfs_level, server, transfer
from kvfs_usrbio import BlockStore
from kvfs_usrbio.connectors.lmcache_l2 import NAMESPACE

WHOLE = PROMPT // CHUNK * CHUNK
OBJECTS = len(PROMPTS) * (WHOLE // CHUNK)

pytestmark = pytest.mark.timeout(900)


def stored(directory: Path) -> list[tuple[bytes, int]]:
    with BlockStore.open(directory, f"default/{NAMESPACE}") as store:
        return [(entry.key, entry.length) for entry in store.scan()]


def wait_for_objects(directory: Path, count: int) -> list[tuple[bytes, int]]:
    deadline = time.monotonic() + 60
    while len(found := stored(directory)) < count:
        assert time.monotonic() < deadline, (len(found), count)
        time.sleep(0.1)
    return found


def test_server_and_engine_restarted(
    vllm: Environment, model: Path, alone: list[list[int]], directory: Path, tmp_path: Path
) -> None:
    """What one server and engine have stored in kvfs, a new server gives to a new engine. Killing kvfs costs the hits
    only, and other values under the same keys change the output."""
    level = kvfs_level(directory)
    with (
        server(vllm.python, tmp_path / "server1", level, environ=vllm.variables({})) as port,
        engine(vllm, model, tmp_path / "engine1", transfer(port)) as one,
    ):
        cold = one.generate(PROMPTS)
        assert tokens(cold) == alone
        assert cached(cold) == [0] * len(PROMPTS)
        wait_for_objects(directory, OBJECTS)
    with (
        server(vllm.python, tmp_path / "server2", level, environ=vllm.variables({})) as port,
        engine(vllm, model, tmp_path / "engine2", transfer(port)) as one,
    ):
        half = len(PROMPTS) // 2
        found = one.generate(PROMPTS[:half])
        assert tokens(found) == alone[:half]
        assert cached(found) == [WHOLE] * half
        kill_daemon(directory)
        without = one.generate(PROMPTS[half:])
        assert tokens(without) == alone[half:]
        assert cached(without) == [0] * half
    kvfs("up", "--dir", directory, "--detach")
    with BlockStore.open(directory, f"default/{NAMESPACE}") as store:
        for key, length in stored(directory):
            assert store.evict([key]) == [0]
            assert store.put([key], [bytes(length)]) == [1]
    with (
        server(vllm.python, tmp_path / "server3", level, environ=vllm.variables({})) as port,
        engine(vllm, model, tmp_path / "engine3", transfer(port)) as one,
    ):
        spoilt = one.generate(PROMPTS)
        assert cached(spoilt) == [WHOLE] * len(PROMPTS)
        assert tokens(spoilt) != alone
