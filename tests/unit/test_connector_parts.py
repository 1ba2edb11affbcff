"""What connectors decide by themselves: keys, plans, and what becomes of blocks when there is no room or no kvfs."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from commands import kill_daemon, kvfs, running_for_a_test, stopped, wait_gone
from kvfs_usrbio import BlockStore
from kvfs_usrbio.connectors import transfer
from kvfs_usrbio.connectors.finding import Finder, Lookups
from kvfs_usrbio.connectors.keys import (
    PART_MAX,
    Keyring,
    fingerprint,
    model_facts,
    parts_of,
    weights,
    without_paths,
)
from kvfs_usrbio.connectors.link import Link
from kvfs_usrbio.connectors.transfer import Load, Loader, Pages, Saver, Staging, Transfers
from kvfs_usrbio.connectors.vllm import planner as vllm_planner
from kvfs_usrbio.connectors.vllm.planner import Plan, Planner, Remembered
from waiting import wait_for

BLOCK = 16
FACTS = fingerprint({"model": "one"})


# -- keys


def test_importing_connectors_imports_no_engine() -> None:
    code = (
        "import sys, kvfs_usrbio.connectors, kvfs_usrbio.connectors.vllm, kvfs_usrbio.connectors.vllm.worker;"
        "print([name for name in ('vllm', 'torch', 'numpy', 'sglang', 'lmcache') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_keys_differ_by_everything_that_makes_bytes_differ() -> None:
    rings = [
        Keyring(FACTS, 1, 1),
        Keyring(FACTS, 2, 1),
        Keyring(FACTS, 2, 2),
        Keyring(fingerprint({"model": "two"}), 1, 1),
        Keyring(FACTS, 1, 1).salted(b"salt"),
    ]
    keys = [key for ring in rings for block in (b"a" * 32, b"b" * 32) for key in ring.of_all([block])]
    assert len(set(keys)) == len(keys) == 2 * (1 + 2 + 4 + 1 + 1)
    assert {len(key) for key in keys} == {32}


def test_keys_of_all_ranks_are_those_of_each() -> None:
    ring = Keyring(FACTS, 2, 3)
    blocks = [b"x", b"y"]
    assert ring.of_all(blocks) == [key for block in blocks for rank in range(2) for key in ring.of_rank(block, rank)]
    assert ring.of_all(blocks) == Keyring(FACTS, 2, 3).of_all(blocks)


def test_fingerprint_is_the_same_in_any_order_and_of_any_type() -> None:
    assert fingerprint({"a": 1, "b": Path("x")}) == fingerprint({"b": Path("x"), "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_weights_are_known_by_what_they_are(tmp_path: Path) -> None:
    for name in ("one", "copy", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(200_000))
    assert weights(tmp_path / "one") == weights(tmp_path / "copy")
    with (tmp_path / "other" / "model.safetensors").open("r+b") as file:
        file.seek(100_001)
        file.write(b"x")
    assert weights(tmp_path / "one") != weights(tmp_path / "other")
    (tmp_path / "copy" / "config.json").write_text('{"a": 1}')
    assert weights(tmp_path / "one") != weights(tmp_path / "copy")


def safetensors(path: Path, tensors: Sequence[bytes], metadata: str = "") -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "of": metadata}}
    at = 0
    for i, tensor in enumerate(tensors):
        header[f"layers.{i}.weight"] = {
            "dtype": "BF16",
            "shape": [len(tensor) // 2],
            "data_offsets": [at, at + len(tensor)],
        }
        at += len(tensor)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors))


def test_every_tensor_decides_what_weights_these_are(tmp_path: Path) -> None:
    """As where an adapter was merged into few of many."""
    tensors = [os.urandom(100_000 if i % 3 else 1000) for i in range(120)]
    model = tmp_path / "model.safetensors"
    safetensors(model, tensors)
    known = {weights(tmp_path)}
    for i in range(0, 120, 7):
        changed = list(tensors)
        middle = len(tensors[i]) // 2
        changed[i] = tensors[i][: middle - 50] + os.urandom(100) + tensors[i][middle + 50 :]
        safetensors(model, changed)
        known.add(weights(tmp_path))
    assert len(known) == 1 + len(range(0, 120, 7))
    safetensors(model, tensors)
    assert weights(tmp_path) in known
    assert weights(model) == weights(model)
    assert weights(model) != weights(tmp_path)
    model.write_bytes((5).to_bytes(8, "little") + b"[1,2]" + bytes(100_000))  # no such file, whatever its name says
    assert weights(tmp_path) not in known


def test_a_model_is_known_by_what_it_is_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.gguf").write_bytes(bytes(1000))
    directories = [model_facts(str(tmp_path / name), None, None) for name in ("one", "two")]
    files = [model_facts(str(tmp_path / name / "model.gguf"), None, None) for name in ("one", "two")]
    assert directories[0] == directories[1]
    assert files[0] == files[1]
    assert model_facts("acme/llama", "main", "1234") == {"model": "acme/llama", "revision": "1234"}
    config = {"_name_or_path": "/models/a", "layers": 3, "text_config": {"_name_or_path": "/models/a", "heads": [1, 2]}}
    assert without_paths(config) == {"layers": 3, "text_config": {"heads": [1, 2]}}


def test_ranks_with_fewer_layers_have_as_many_parts() -> None:
    assert parts_of([6 << 20] * 3, 2) == [range(1), range(1, 3)]
    assert len(parts_of([6 << 20] * 4)) == 2
    with pytest.raises(ValueError, match="other ranks"):
        parts_of([6 << 20], 2)
    with pytest.raises(ValueError, match="does not fit"):
        parts_of([6 << 20] * 5, 2)


def test_parts_are_few_and_fit() -> None:
    assert parts_of([64 << 10] * 24) == [range(24)]
    parts = parts_of([512 << 10] * 80)  # 40 MiB
    assert len(parts) == 3
    assert [i for part in parts for i in part] == list(range(80))
    assert all(len(part) * (512 << 10) <= PART_MAX for part in parts)
    with pytest.raises(ValueError, match="one layer"):
        parts_of([PART_MAX + 1])


# -- plans


class Asked:
    """A request as vLLM has them."""

    def __init__(self, name: str, tokens: int) -> None:
        self.request_id = name
        self.num_tokens = tokens
        self.block_hashes: Sequence[bytes] = [b"%s/%d" % (b"shared", i) for i in range(tokens // BLOCK)]
        self.lora_request: Any = None
        self.skip_reading_prefix_cache = False


class Shelf:
    """Says which of all keys are there, or that it does not know yet."""

    def __init__(self) -> None:
        self.there: set[bytes] = set()
        self.late = False

    def find(self, name: str, keys: Sequence[bytes]) -> list[int] | None:
        return None if self.late else [100 if key in self.there else -2 for key in keys]

    def forget(self, name: str) -> None:
        pass


RING = Keyring(FACTS, 2, 2)


def planner(shelf: Shelf, *, may_wait: bool = True, saves: bool = True, loads: bool = True) -> Planner:
    return Planner(RING, shelf, tokens=BLOCK, per_hash=BLOCK, may_wait=may_wait, saves=saves, loads=loads)


def step(plans: Planner, *scheduled: tuple[str, int]) -> Plan:
    return plans.step((name, computed, lambda: range(100, 200)) for name, computed in scheduled)


def test_a_block_is_there_if_all_its_parts_are() -> None:
    shelf, request = Shelf(), Asked("a", 5 * BLOCK + 3)
    shelf.there.update(RING.of_all(request.block_hashes[:3]))
    shelf.there.discard(RING.of_rank(request.block_hashes[2], 1)[1])
    plans = planner(shelf)
    assert plans.match(request, 0) == (2 * BLOCK, False)
    plans.allocated(request, range(100, 106), 2 * BLOCK)
    plan = step(plans, ("a", request.num_tokens))
    assert [(load.hashes, load.blocks, load.later) for load in plan.loads] == [
        (request.block_hashes[:2], [100, 101], False)
    ]
    assert (plan.save_hashes, plan.save_blocks) == (request.block_hashes[2:], [102, 103, 104])


def test_one_token_is_always_left_to_compute() -> None:
    shelf, request = Shelf(), Asked("a", 3 * BLOCK)
    shelf.there.update(RING.of_all(request.block_hashes))
    assert planner(shelf).match(request, 0) == (2 * BLOCK, False)
    assert planner(shelf).match(request, 2 * BLOCK) == (0, False)


def test_what_the_engine_has_is_not_asked_for() -> None:
    shelf, request = Shelf(), Asked("a", 5 * BLOCK)
    shelf.there.update(RING.of_all(request.block_hashes))
    plans = planner(shelf)
    assert plans.match(request, 2 * BLOCK) == (2 * BLOCK, False)
    plans.allocated(request, range(100, 105), 2 * BLOCK)
    assert step(plans).loads[0].blocks == [102, 103]


def test_who_cannot_be_answered_yet_asks_again() -> None:
    shelf, request = Shelf(), Asked("a", 5 * BLOCK)
    shelf.there.update(RING.of_all(request.block_hashes))
    shelf.late = True
    plans = planner(shelf)
    assert plans.match(request, 0) == (None, False)
    shelf.late = False
    assert plans.match(request, 0) == (4 * BLOCK, False)


def test_loads_wait_outside_the_schedule_while_others_run_or_ranks_are_many() -> None:
    shelf, request = Shelf(), Asked("a", 5 * BLOCK)
    shelf.there.update(RING.of_all(request.block_hashes))
    assert planner(shelf, may_wait=False).match(request, 0) == (4 * BLOCK, True)
    plans = planner(shelf)
    step(plans, ("other", 1))
    assert plans.match(request, 0) == (4 * BLOCK, True)
    plans.finished("other")
    assert plans.match(request, 0) == (4 * BLOCK, False)


def test_blocks_are_saved_once_as_they_fill() -> None:
    plans, request, other = planner(Shelf()), Asked("a", 4 * BLOCK), Asked("b", 4 * BLOCK)
    for one in (request, other):
        assert plans.match(one, 0) == (0, False)
        plans.allocated(one, range(100, 104), 0)
    assert step(plans, ("a", 2 * BLOCK + 5)).save_blocks == [100, 101]
    assert step(plans, ("a", 3 * BLOCK), ("b", 3 * BLOCK)).save_blocks == [102]
    assert step(plans, ("a", 4 * BLOCK), ("b", 4 * BLOCK)).save_blocks == [103]
    assert step(plans, ("b", 4 * BLOCK + 1)).save_blocks == []


def test_dropped_blocks_are_saved_when_they_come_again() -> None:
    plans, request = planner(Shelf()), Asked("a", 3 * BLOCK)
    plans.allocated(request, [], 0)
    step(plans, ("a", 3 * BLOCK))
    plans.outcome([], request.block_hashes[1:2], 0)
    plans.finished("a")
    again = Asked("b", 3 * BLOCK)
    plans.allocated(again, [], 0)
    assert step(plans, ("b", 3 * BLOCK)).save_hashes == request.block_hashes[1:2]


def test_evicted_blocks_are_saved_again() -> None:
    shelf, request = Shelf(), Asked("a", 3 * BLOCK + 1)
    plans = planner(shelf)
    plans.allocated(request, [], 0)
    step(plans, ("a", 3 * BLOCK))
    plans.finished("a")
    shelf.there.update(RING.of_all(request.block_hashes[:1]))
    again = Asked("b", 3 * BLOCK + 1)
    assert plans.match(again, 0) == (BLOCK, False)
    plans.allocated(again, range(100, 104), BLOCK)
    assert step(plans, ("b", 3 * BLOCK)).save_hashes == request.block_hashes[1:]


def test_what_could_not_be_loaded_is_a_miss_until_it_is_saved_again() -> None:
    shelf, request = Shelf(), Asked("a", 4 * BLOCK + 1)
    shelf.there.update(RING.of_all(request.block_hashes))
    plans = planner(shelf)
    assert plans.match(request, 0) == (4 * BLOCK, False)
    plans.allocated(request, range(100, 105), 4 * BLOCK)
    assert step(plans, ("a", request.num_tokens)).seen == 0
    plans.outcome(request.block_hashes[1:2], [], 1)
    assert plans.match(Asked("b", 4 * BLOCK + 1), 0) == (BLOCK, True)
    plans.rewound("a", BLOCK)
    plan = step(plans, ("a", request.num_tokens))
    assert (plan.save_hashes, plan.seen) == (request.block_hashes[1:2], 1)
    assert plans.match(Asked("b", 4 * BLOCK + 1), 0) == (4 * BLOCK, True)


def test_adapters_and_prompts_that_skip_the_cache_are_left_alone() -> None:
    shelf, request, skipping = Shelf(), Asked("a", 4 * BLOCK), Asked("b", 4 * BLOCK)
    shelf.there.update(RING.of_all(request.block_hashes))
    request.lora_request = object()
    skipping.skip_reading_prefix_cache = True
    plans = planner(shelf)
    assert plans.match(request, 0) == (0, False)
    assert plans.match(skipping, 0) == (0, False)
    plans.allocated(request, range(100, 104), 0)
    assert step(plans, ("a", 4 * BLOCK)).save_blocks == []


def test_hashes_of_part_of_a_block() -> None:
    """vLLM's hashes may be of fewer tokens than a block; each stands for all that comes before it."""
    shelf, request = Shelf(), Asked("a", 6 * BLOCK)
    plans = Planner(RING, shelf, tokens=2 * BLOCK, per_hash=BLOCK, may_wait=True)
    plans.allocated(request, [], 0)
    assert step(plans, ("a", 5 * BLOCK)).save_hashes == [request.block_hashes[1], request.block_hashes[3]]


def test_after_a_reset_nothing_stored_before_is_found() -> None:
    shelf, request = Shelf(), Asked("a", 4 * BLOCK)
    shelf.there.update(RING.of_all(request.block_hashes))
    plans = planner(shelf)
    plans.reset()
    assert plans.match(request, 0) == (0, False)
    assert step(plans).salt


def test_what_could_not_be_loaded_is_asked_for_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an engine that stores nothing, too."""
    monkeypatch.setattr(vllm_planner, "BAD_S", 0.2)
    shelf, request = Shelf(), Asked("a", 4 * BLOCK + 1)
    shelf.there.update(RING.of_all(request.block_hashes))
    plans = planner(shelf, saves=False)
    plans.outcome(request.block_hashes[:1], [], 1)
    assert plans.match(request, 0) == (0, False)
    time.sleep(0.3)
    assert plans.match(request, 0) == (4 * BLOCK, False)


def test_blocks_lost_with_a_connection_are_saved_when_they_come_again() -> None:
    plans, request = planner(Shelf()), Asked("a", 3 * BLOCK)
    plans.allocated(request, [], 0)
    step(plans, ("a", 3 * BLOCK))
    plans.outcome([], [], 0, lost=True)
    plans.finished("a")
    again = Asked("b", 3 * BLOCK)
    plans.allocated(again, [], 0)
    assert step(plans, ("b", 3 * BLOCK)).save_hashes == request.block_hashes


def test_memory_of_hashes_is_bounded() -> None:
    known = Remembered(3)
    for i in range(10):
        known.add(b"%d" % i)
    assert len(known) == 3
    assert b"9" in known
    assert b"6" not in known


# -- transfers


@pytest.fixture
def directory() -> Iterator[Path]:
    with running_for_a_test("256M") as data:
        yield data


class Memory:
    """Three layers of eight blocks, as an engine has them."""

    def __init__(self, fill: int = 0) -> None:
        self.layers = [bytearray([fill]) * (8 * size) for size in (4096, 1000, 8192)]
        held = [ctypes.c_char.from_buffer(layer) for layer in self.layers]
        places = [(ctypes.addressof(one), len(layer) // 8) for one, layer in zip(held, self.layers, strict=True)]
        self.pages = Pages(places, held)

    def paint(self, block: int) -> None:
        for layer in self.layers:
            size = len(layer) // 8
            layer[block * size : (block + 1) * size] = bytes((block * 7 + i) % 251 for i in range(size))

    def block(self, block: int) -> list[bytes]:
        return [bytes(layer[block * len(layer) // 8 : (block + 1) * len(layer) // 8]) for layer in self.layers]


@pytest.mark.parametrize("stride", [None, PART_MAX + 4096])
def test_each_part_of_a_block_goes_to_its_layers_and_comes_from_them(stride: int | None) -> None:
    size, blocks = PART_MAX // 2, 3
    step = stride or size
    layers = [bytearray(os.urandom(step * blocks)) for _ in range(3)]
    expected = [bytes(layer) for layer in layers]
    held = [ctypes.c_char.from_buffer(layer) for layer in layers]
    pages = Pages([(ctypes.addressof(one), size) for one in held], held, stride)
    assert pages.sizes == [size, 2 * size]
    staged = [(ctypes.c_char * (2 * size))() for _ in range(2)]
    places = [ctypes.addressof(one) for one in staged]
    for part, run in enumerate((range(1), range(1, 3))):
        pages.gather([2, 0], part, places)
        for block, one in zip((2, 0), staged, strict=True):
            wanted = b"".join(expected[i][block * step : block * step + size] for i in run)
            assert one.raw[: pages.sizes[part]] == wanted
        pages.scatter([0, 1], part, places)
        for i in run:
            start, middle = bytes(layers[i][:size]), bytes(layers[i][step : step + size])
            assert (start, middle) == (expected[i][2 * step : 2 * step + size], expected[i][:size])
            assert layers[i][size:step] == expected[i][size:step]  # what lies between blocks
            assert layers[i][2 * step :] == expected[i][2 * step :]


def staged(directory: Path, size: int, part: int) -> Transfers:
    store = BlockStore.open(directory, "test/connectors")
    return Transfers(store, store.queue(), Staging.of(store, size, part))


def link_to(directory: Path, slots: int, part: int) -> Link[Transfers]:
    return Link(lambda: staged(directory, slots * 16384, part))


def opens(link: Link[Any]) -> None:
    """Nothing in the test holds the connection afterwards."""
    if link.wait(10) is None:
        pytest.fail("no connection")


def key(i: int) -> list[bytes]:
    return [b"key %d" % i]


def load(loader: Loader, keys: Sequence[bytes], blocks: Sequence[int]) -> Load:
    made = Load("name", keys, blocks)
    loader.submit(made)
    assert made.done.wait(30)
    return made


def test_blocks_come_back_in_other_places_and_missing_ones_are_named(directory: Path) -> None:
    ours, theirs = Memory(), Memory(255)
    for block in range(8):
        ours.paint(block)
    saver = Saver(link_to(directory, 16, ours.pages.block_bytes), ours.pages)
    assert saver.link.wait(10)
    assert saver.save(range(8), key).dropped == []
    assert saver.drain(10)
    assert (saver.stored, saver.refused) == (8, 0)
    loader = Loader(link_to(directory, 3, ours.pages.block_bytes), theirs.pages)
    assert loader.link.wait(10)
    done = load(loader, [b"key 6", b"none", b"key 0", b"key 1", b"key 5"], [1, 2, 3, 4, 5])
    assert (done.failed, done.damaged) == ({1}, [])
    assert [theirs.block(i) for i in (1, 3, 4, 5)] == [ours.block(i) for i in (6, 0, 1, 5)]
    assert theirs.block(2) == Memory(255).block(2)
    loader.close()


def test_a_value_of_another_length_is_of_no_use(directory: Path) -> None:
    memory = Memory()
    loader = Loader(link_to(directory, 3, memory.pages.block_bytes), memory.pages)
    connection = loader.link.wait(10)
    assert connection is not None
    connection.store.put([b"short"], [b"short"])
    done = load(loader, [b"short"], [1])
    assert (done.failed, done.damaged) == ({0}, [b"short"])
    assert memory.block(1) == Memory().block(1)
    loader.close()


def test_a_kvfs_that_hangs_is_given_up_and_found_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anything that waits for it, and when it goes on, what it had not yet answered changes nothing in the pages."""
    monkeypatch.setattr(transfer, "TIMEOUT", 0.5)
    memory = Memory()
    memory.paint(0)
    saver = Saver(link_to(directory, 8, memory.pages.block_bytes), memory.pages)
    loader = Loader(link_to(directory, 8, memory.pages.block_bytes), memory.pages)
    opens(saver.link)
    opens(loader.link)
    assert saver.save([0], key).dropped == []
    assert saver.drain(10)
    with stopped(directory):
        begun = time.monotonic()
        assert load(loader, [b"key 0"], [1]).failed == {0}
        assert loader.link.lost == 1
        assert saver.save([0], lambda i: [b"another"]).dropped == []
        assert not saver.drain(5)
        assert saver.link.lost == 1
        assert saver.lost == 1
        assert time.monotonic() - begun < 5  # of which each waited 0.5 s
    wait_for(lambda: not load(loader, [b"key 0"], [2]).failed, 30)
    assert loader.link.opened > 1
    assert memory.block(2) == memory.block(0)
    assert memory.block(1) == Memory().block(1)
    loader.close()


def test_a_scheduler_does_not_wait_for_a_kvfs_that_hangs(directory: Path) -> None:
    def connect() -> Lookups:
        store = BlockStore.open(directory, "test/connectors")
        return Lookups(store, store.queue())

    finder = Finder(Link(connect))
    opens(finder.link)
    with stopped(directory):
        begun, longest = time.monotonic(), 0.0
        found: list[int] | None = None
        while (asked := time.monotonic()) - begun < 20:
            found = finder.find("one", [b"a"])
            longest = max(longest, time.monotonic() - asked)
            if found is not None:
                break
        assert found == []
        assert finder.link.lost == 1
        assert longest < 1
        assert time.monotonic() - begun < 5
        begun = time.monotonic()
        finder.link.close()
        assert time.monotonic() - begun < 1


def test_a_load_finds_the_kvfs_that_was_started_again(directory: Path) -> None:
    memory = Memory()
    memory.paint(0)
    saver = Saver(link_to(directory, 8, memory.pages.block_bytes), memory.pages)
    loader = Loader(link_to(directory, 8, memory.pages.block_bytes), memory.pages)
    assert saver.link.wait(10)
    assert loader.link.wait(10)
    assert saver.save([0], key).dropped == []
    assert saver.drain(10)
    kill_daemon(directory)
    kvfs("up", "--dir", directory, "--detach")
    assert load(loader, [b"key 0"], [1]).failed == set()
    assert memory.block(1) == memory.block(0)
    loader.close()


def test_stores_notice_at_once_that_kvfs_has_gone(directory: Path) -> None:
    memory = Memory()
    saver = Saver(link_to(directory, 8, memory.pages.block_bytes), memory.pages)
    opens(saver.link)
    connection = saver.link.current()
    with stopped(directory) as pid:
        assert saver.save([0, 1], key).dropped == []
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)
        wait_for(lambda: connection is not None and not connection.store.alive, 20)
        saver.reap()
        assert (saver.link.lost, saver.lost) == (1, 2)
    kvfs("up", "--dir", directory, "--detach")
    opens(saver.link)
    assert saver.save([0], key).dropped == []
    assert saver.drain(10)
    connection = saver.link.current()
    assert connection is not None
    kill_daemon(directory)
    wait_for(lambda: not connection.store.alive, 20)  # the kernel may still be closing the process's sockets
    assert saver.save([1], key).dropped == [0]
    assert (saver.link.lost, saver.lost) == (2, 2)


def test_only_time_in_which_somebody_looked_counts_against_kvfs(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps of an engine nobody does, however long they take."""
    monkeypatch.setattr(transfer, "TIMEOUT", 0.2)
    monkeypatch.setattr(transfer, "GAP", 0.05)
    memory = Memory()
    saver = Saver(link_to(directory, 8, memory.pages.block_bytes), memory.pages)
    assert saver.link.wait(10)
    with stopped(directory):
        assert saver.save([0, 1], key).dropped == []
        time.sleep(0.5)
        saver.reap()
        assert saver.link.lost == 0
    assert saver.drain(10)
    assert (saver.stored, saver.lost) == (2, 0)


def test_more_values_than_a_ring_takes_are_stored_at_once_too(directory: Path) -> None:
    """What the ring has no room for is handed over by those who look."""
    layer = (ctypes.c_char * (600 * 100))()
    pages = Pages([(ctypes.addressof(layer), 100)], layer)
    saver = Saver(Link(lambda: staged(directory, 600 * 4096, 100)), pages)
    assert saver.link.wait(10)
    assert saver.save(range(600), key).dropped == []
    for _ in range(10):
        time.sleep(0.1)
        saver.reap()
    assert saver.stored == 600


def test_saves_that_find_no_room_are_dropped_not_waited_for(directory: Path) -> None:
    memory = Memory()
    saver = Saver(link_to(directory, 5, memory.pages.block_bytes), memory.pages)
    assert saver.link.wait(10)
    assert saver.save(range(8), key).dropped == [5, 6, 7]
    assert saver.drain(10)
    assert saver.save(range(5), key).dropped == []
    assert saver.drain(10)


def test_without_kvfs_loads_fail_and_saves_are_dropped_at_once(tmp_path: Path) -> None:
    memory = Memory()
    saver = Saver(link_to(tmp_path, 5, 16384), memory.pages)
    loader = Loader(link_to(tmp_path, 5, 16384), memory.pages)
    assert load(loader, [b"key 0", b"key 1"], [0, 1]).failed == {0, 1}
    assert saver.save(range(3), key).dropped == [0, 1, 2]
    loader.close()


def test_a_link_comes_back_and_holds_nobody_up() -> None:
    tries: list[float] = []
    may = threading.Event()

    def connect() -> Any:
        tries.append(time.monotonic())
        if not may.wait(20):
            raise OSError
        if len(tries) < 3:
            raise OSError("not yet")
        return object()

    link: Link[Any] = Link(connect)
    assert link.current() is None
    assert link.current() is None
    assert len(tries) == 1  # one attempt at a time
    may.set()
    wait_for(lambda: link.current() is not None, 20)
    assert len(tries) == 3


class Useless:
    """A connection that can be opened, and nothing else."""

    def __init__(self) -> None:
        self.store = self.queue = self
        self.alive = True

    def abandon(self) -> None:
        pass

    def fail(self, error: OSError) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_kvfs_that_opens_but_does_not_work_is_tried_less_and_less_often() -> None:
    opened: list[float] = []

    def connect() -> Any:
        opened.append(time.monotonic())
        return Useless()

    link: Link[Any] = Link(connect)
    begun = time.monotonic()
    while time.monotonic() - begun < 1.2:
        connection = link.current()
        if connection is not None:
            link.lose(connection, "no answer")
        time.sleep(0.005)
    assert 3 <= len(opened) <= 6  # after 0, 0, 0.1, 0.3, 0.7 s
    while link.current() is None:
        time.sleep(0.01)
    link.worked()
    link.lose(link.current(), "no answer")
    assert link.wait(5) is not None  # at once


def test_a_finder_says_what_is_there_and_nothing_without_kvfs(directory: Path, tmp_path: Path) -> None:
    def connect() -> Lookups:
        store = BlockStore.open(directory, "test/connectors")
        return Lookups(store, store.queue())

    def nowhere() -> Lookups:
        raise OSError

    finder = Finder(Link(connect))
    connection = finder.link.wait(10)
    assert connection is not None
    connection.store.put([b"a"], [b"value"])
    while (found := finder.find("one", [b"a", b"b"])) is None:
        pass
    assert found == [5, -2]
    assert Finder(Link(nowhere)).find("one", [b"a"]) == []
