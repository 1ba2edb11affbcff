"""kvfs in vLLM 0.32 on the CPU, as released: whatever happens to kvfs, the greedy output is that of an engine without it."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from vllm_process import BLOCK, PROMPTS, WHOLE, cached, engine, prompt, tokens

from commands import kill_daemon, kvfs
from environments import Environment
from kvfs_usrbio import BlockStore

NAMESPACE = "test/vllm"

pytestmark = pytest.mark.timeout(900)


def connector(directory: Path) -> dict[str, object]:
    return {
        "kv_connector": "KvfsConnector",
        "kv_connector_module_path": "kvfs_usrbio.connectors.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"where": str(directory), "namespace": NAMESPACE},
    }


def tier(directory: Path) -> dict[str, object]:
    """vLLM's OffloadingConnector; its primary tier holds fewer blocks than one prompt of six."""
    secondary = {
        "type": "KvfsTier",
        "module_path": "kvfs_usrbio.connectors.vllm",
        "where": str(directory),
        "namespace": NAMESPACE,
    }
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "vllm_cpu_tiering",
            "cpu_bytes_to_use": 24 << 18,
            "secondary_tiers": [secondary],
        },
    }


def wait_for_blocks(directory: Path, count: int) -> list[tuple[bytes, int]]:
    """Stores run beside the engine. (key, bytes) of each block once there are so many."""
    deadline = time.monotonic() + 30
    while True:
        with BlockStore.open(directory, NAMESPACE) as store:
            found = [(entry.key, entry.length) for entry in store.scan()]
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline, (len(found), count)
        time.sleep(0.1)


def test_cold_warm_restarted_and_shared(
    vllm: Environment, model: Path, alone: list[list[int]], directory: Path, tmp_path: Path
) -> None:
    """A second engine, and one after a restart, load what the first has stored; two of them at work at once as well."""
    with engine(vllm, model, tmp_path / "first", connector(directory)) as first:
        cold = first.generate(PROMPTS[:3])
        assert tokens(cold) == alone[:3]
        assert cached(cold) == [0, 0, 0]
        wait_for_blocks(directory, 3 * WHOLE // BLOCK)
        warm = first.generate(PROMPTS[:3])
        assert tokens(warm) == alone[:3]
        assert cached(warm) == [WHOLE] * 3
        with engine(vllm, model, tmp_path / "second", connector(directory)) as second:
            assert cached(other := second.generate(PROMPTS[:3])) == [WHOLE] * 3
            assert tokens(other) == alone[:3]
            for one in (first, second):
                one.order(PROMPTS, together=True)
            for one in (first, second):
                assert [output.tokens for output in one.answer().outputs if output is not None] == alone
    with engine(vllm, model, tmp_path / "third", connector(directory)) as third:
        restarted = third.generate(PROMPTS)
        assert tokens(restarted) == alone
        assert cached(restarted) == [WHOLE] * 6


def test_kvfs_killed_and_restarted(
    vllm: Environment, model: Path, alone: list[list[int]], directory: Path, tmp_path: Path
) -> None:
    """In the middle of requests, which end as if nothing had happened; some seconds after its return kvfs is used again."""
    with engine(vllm, model, tmp_path / "log", connector(directory)) as one:
        assert tokens(one.generate(PROMPTS[:2])) == alone[:2]
        one.order(PROMPTS, together=True)
        time.sleep(0.2)
        kill_daemon(directory)
        assert [output.tokens for output in one.answer().outputs if output is not None] == alone
        without = one.generate(PROMPTS)
        assert tokens(without) == alone
        assert cached(without) == [0] * 6
        kvfs("up", "--dir", directory, "--detach")
        deadline = time.monotonic() + 60
        while not any(cached(back := one.generate(PROMPTS[:2]))):
            assert tokens(back) == alone[:2]
            assert time.monotonic() < deadline, one.log[-3000:]
            time.sleep(0.5)
        assert tokens(back) == alone[:2]


def test_damaged_block_on_disk(
    vllm: Environment, model: Path, alone: list[list[int]], directory: Path, tmp_path: Path
) -> None:
    """It is computed again and stored again; the blocks before it are loaded."""
    with engine(vllm, model, tmp_path / "before", connector(directory)) as one:
        assert tokens(one.generate(PROMPTS[:1])) == alone[:1]
        blocks = wait_for_blocks(directory, WHOLE // BLOCK)
    with BlockStore.open(directory, NAMESPACE) as store:
        key, length = blocks[0]
        value = bytearray(length)
        assert store.get([key], [value]) == [length]
    kvfs("down", "--dir", directory)
    data = (directory / "store.kvfs").read_bytes()
    place = data.find(bytes(value[:4096]))
    assert place >= 0
    with (directory / "store.kvfs").open("r+b") as file:
        file.seek(place + 100)
        file.write(os.urandom(1000))
    del data
    kvfs("up", "--dir", directory, "--memory", "0", "--detach")
    with engine(vllm, model, tmp_path / "after", connector(directory)) as one:
        again = one.generate(PROMPTS[:1])
        assert tokens(again) == alone[:1]
        assert "Recovered from KV load failure" in one.log
        wait_for_blocks(directory, WHOLE // BLOCK)
        repaired = one.generate(PROMPTS[:1])
        assert tokens(repaired) == alone[:1]
        assert cached(repaired) == [WHOLE]


def test_other_values_say_something_else(
    vllm: Environment, model: Path, alone: list[list[int]], directory: Path, tmp_path: Path
) -> None:
    """With values that kvfs holds to be whole but that are none of the engine's, the output changes: it is what is loaded that
    decides, and the other tests could fail."""
    with engine(vllm, model, tmp_path / "log", connector(directory)) as one:
        assert tokens(one.generate(PROMPTS[:1])) == alone[:1]
        with BlockStore.open(directory, NAMESPACE) as store:
            for key, length in wait_for_blocks(directory, WHOLE // BLOCK):
                assert store.evict([key]) == [0]
                assert store.put([key], [bytes(length)]) == [1]
        spoilt = one.generate(PROMPTS[:1])
        assert cached(spoilt) == [WHOLE]
        assert tokens(spoilt) != alone[:1]


def test_full_and_evicting(
    vllm: Environment, model: Path, alone: list[list[int]], directory: Path, tmp_path: Path
) -> None:
    """Others fill the store again and again meanwhile, so that the engine's blocks are evicted."""
    evicted = False
    with (
        engine(vllm, model, tmp_path / "log", connector(directory)) as one,
        BlockStore.open(directory, "test/others") as others,
    ):
        filling = os.urandom(1 << 20)
        for turn in range(3):
            found = one.generate(PROMPTS)
            assert tokens(found) == alone
            evicted = evicted or (turn > 0 and min(cached(found)) < WHOLE)
            for i in range(600):
                others.put([b"%d/%d" % (turn, i)], [filling])
    assert evicted


def test_random_requests_with_shared_prefixes(vllm: Environment, model: Path, directory: Path, tmp_path: Path) -> None:
    """Batches of requests that share prefixes, with chunked prefill, aborts, vLLM's own prefix cache beside kvfs and so few
    blocks that requests are preempted and its prefix cache is soon overwritten; each output is compared with a recomputation.
    In bfloat16 two tokens' logits are equal now and then, and which one is said depends on how a prompt is cut: so not here."""
    source = random.Random(4)
    pieces = [prompt(100 + i, source.choice((128, 256, 300))) for i in range(5)]

    def any_prompt() -> list[int]:
        made = [token for _ in range(source.randrange(1, 5)) for token in pieces[source.randrange(len(pieces))]]
        return made + prompt(source.randrange(1000, 1010), source.randrange(1, 200))

    batches = [[any_prompt() for _ in range(source.randrange(2, 7))] for _ in range(8)]
    with engine(vllm, model, tmp_path / "alone", None, dtype="float32") as one:
        wanted = [tokens(one.generate(batch)) for batch in batches]
    loaded = 0
    for attempt in range(2):
        with engine(
            vllm,
            model,
            tmp_path / f"log{attempt}",
            connector(directory),
            dtype="float32",
            max_num_batched_tokens=512,
            enable_prefix_caching=True,
            num_gpu_blocks_override=34,
        ) as one:
            for batch, outputs in zip(batches, wanted, strict=True):
                dropped = source.sample(range(len(batch)), source.randrange(2))
                found = one.generate(batch, together=True, abort=dropped)
                kept = [output for i, output in enumerate(outputs) if i not in dropped]
                # A request may have ended before it was aborted.
                assert tokens(found) in (kept, outputs)
                loaded += sum(cached(found))
    assert loaded > 0


def test_secondary_tier(
    vllm: Environment, model: Path, alone: list[list[int]], directory: Path, tmp_path: Path
) -> None:
    """kvfs below vLLM's own OffloadingConnector: loaded after a restart; with a value of no use, which must not be looked for
    again and again; with kvfs killed; and with other values the output changes."""
    count = len(PROMPTS) * (WHOLE // BLOCK)
    with engine(vllm, model, tmp_path / "first", tier(directory)) as one:
        assert tokens(one.generate(PROMPTS)) == alone
        blocks = wait_for_blocks(directory, count)
    with engine(vllm, model, tmp_path / "second", tier(directory)) as one:
        restarted = one.generate(PROMPTS)
        assert tokens(restarted) == alone
        assert cached(restarted) == [WHOLE] * len(PROMPTS)
    with BlockStore.open(directory, NAMESPACE) as store:
        for key, _ in blocks[::3]:
            assert store.evict([key]) == [0]
            assert store.put([key], [b"too short"]) == [1]
    with engine(vllm, model, tmp_path / "third", tier(directory)) as one:
        damaged = one.generate(PROMPTS)
        assert tokens(damaged) == alone
        assert sum(cached(damaged)) < WHOLE * len(PROMPTS)
        kill_daemon(directory)
        assert tokens(one.generate(PROMPTS)) == alone
    kvfs("up", "--dir", directory, "--detach")
    with BlockStore.open(directory, NAMESPACE) as store:
        for key, length in [(entry.key, entry.length) for entry in store.scan()]:
            assert store.evict([key]) == [0]
            assert store.put([key], [bytes(length)]) == [1]
    with engine(vllm, model, tmp_path / "fourth", tier(directory)) as one:
        spoilt = one.generate(PROMPTS)
        assert max(cached(spoilt)) > 0
        assert tokens(spoilt) != alone
