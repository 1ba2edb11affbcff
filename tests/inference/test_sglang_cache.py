"""kvfs as the third level of SGLang 0.5.23's cache on the CPU, as released: its host pools, and its whole engine, whose
greedy output is that of an engine without it whatever happens to kvfs."""

from __future__ import annotations

import mmap
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from commands import kill_daemon, kvfs, running_for_a_test
from environments import Environment, environment
from kvfs_usrbio import BlockStore

HERE = Path(__file__).parent
ENGINES = HERE.parent / "engines"
NAMESPACE = "sglang"  # the connector's own choice
PROMPT = 2100
PROMPT_PAGES = 2048  # tokens of the prompt's whole pages

pytestmark = pytest.mark.timeout(1800)


class PoolReport(msgspec.Struct):
    """What sglang_pool.py prints."""

    backend: str
    wrote: bool
    found: bool
    read: bool
    equal: bool


class RandomReport(msgspec.Struct):
    """What sglang_random.py prints."""

    ended: bool
    loaded: int
    loaded_later: int
    stored: int
    wrong: int


class Generated(msgspec.Struct):
    """What sglang_engine.py prints."""

    tokens: list[int]
    from_storage: int
    seconds: float


@pytest.fixture(scope="session")
def sglang() -> Environment:
    return environment("sglang")


@pytest.fixture
def directory() -> Iterator[Path]:
    with running_for_a_test("1G") as data:
        yield data


def variables(**added: str) -> dict[str, str]:
    return {"PYTHONPATH": str(ENGINES / "sglang_cpu"), **added}


@pytest.mark.parametrize(
    ("kind", "layout", "allocator"),
    [
        ("mha", "page_first", "shm"),
        ("mha", "page_first_direct", "shm"),
        ("mha", "layer_first", "shm"),
        ("mha", "page_first", "default"),
        ("mla", "page_first", "shm"),
        ("mla", "layer_first", "default"),
    ],
)
def test_host_pool(sglang: Environment, directory: Path, kind: str, layout: str, allocator: str) -> None:
    """Every bit of every page comes back, whether the pool can be shared with kvfs or not."""
    options = ("--kind", kind, "--allocator", allocator, "--kvfs", directory / "mnt", "--pages", "16", "--rounds", "2")
    done = sglang.run(ENGINES / "sglang_pool.py", "kvfs", layout, *options, variables=variables())
    report = msgspec.json.decode(done.stdout.splitlines()[-1], type=PoolReport)
    assert report == PoolReport("KvfsHiCache", wrote=True, found=True, read=True, equal=True)


@pytest.mark.parametrize("layout", ["page_first_direct", "layer_first"])
def test_random_requests_with_kvfs_killed_between(sglang: Environment, directory: Path, layout: str) -> None:
    """No page that is loaded ever differs from what computing it gives, and pages are loaded before kvfs is killed and
    after it has been started again, by the same process."""
    process = subprocess.Popen(
        [sglang.python, HERE / "sglang_random.py", directory / "mnt", layout, "120"],
        env=sglang.variables(variables()),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        kill_daemon(directory)
        kvfs("up", "--dir", directory, "--detach")
        out, _ = process.communicate("on\n", timeout=300)
    finally:
        process.kill()
        process.wait(30)
    report = msgspec.json.decode(out.splitlines()[-1], type=RandomReport)
    assert report.ended
    assert report.wrong == 0
    assert report.loaded > 100
    assert report.loaded_later > 0
    assert report.stored > 0


def test_pools_of_a_hybrid_model(sglang: Environment, directory: Path) -> None:
    """Only those prefixes are offered for which each pool has what it needs; clear leaves none."""
    done = sglang.run(HERE / "sglang_hybrid.py", directory / "mnt", variables=variables())
    assert done.stdout.endswith("as promised\n")


def generate(sglang: Environment, model: Path, where: Path | None, *options: str, **added: str) -> list[Generated]:
    backend = ("none",) if where is None else ("kvfs",)
    place = () if where is None else ("--kvfs", where)
    done = sglang.run(
        ENGINES / "sglang_engine.py",
        model,
        *backend,
        str(PROMPT),
        *place,
        *options,
        variables=variables(**added),
        seconds=500,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
    return [msgspec.json.decode(line, type=Generated) for line in lines]


def damage(directory: Path) -> int:
    """A byte of every other block on the device, behind kvfs's back; how many."""
    with BlockStore.open(directory, NAMESPACE) as store:
        keys = [entry.key for entry in store.scan()][::2]
        beginnings = [bytearray(512) for _ in keys]
        assert store.get(keys, beginnings) == [512] * len(keys)
    kvfs("down", "--dir", directory)
    with (directory / "store.kvfs").open("r+b") as file, mmap.mmap(file.fileno(), 0) as image:
        for beginning in beginnings:
            at = image.find(bytes(beginning))
            assert at > 0
            image[at + 3] ^= 1
    kvfs("up", "--dir", directory, "--detach")
    return len(keys)


def replace_by_zeros(directory: Path) -> None:
    with BlockStore.open(directory, NAMESPACE) as store:
        entries = list(store.scan())
        keys = [entry.key for entry in entries]
        assert store.evict(keys) == [0] * len(keys)
        assert store.put(keys, [bytes(entry.length) for entry in entries]) == [1] * len(keys)


def test_whole_engine(sglang: Environment, directory: Path, tmp_path: Path) -> None:
    """The second process, a new one, finds all of what the first has stored and says the same as one without any; so does
    one that finds every other block damaged, which computes instead. With zeros in kvfs it says something else: it is what
    was read that decides."""
    model, where = tmp_path / "model", directory / "mnt"
    (alone,) = generate(sglang, model, None)
    (first,) = generate(sglang, model, where)
    (second,) = generate(sglang, model, where)
    assert (alone.from_storage, first.from_storage, second.from_storage) == (0, 0, PROMPT_PAGES)
    assert first.tokens == alone.tokens
    assert second.tokens == alone.tokens
    assert damage(directory) > 0
    (hurt,) = generate(sglang, model, where)
    assert hurt.from_storage < PROMPT_PAGES
    assert hurt.tokens == alone.tokens
    replace_by_zeros(directory)
    (spoilt,) = generate(sglang, model, where)
    assert spoilt.from_storage > 0
    assert spoilt.tokens != alone.tokens


def test_whole_engine_with_failures_and_delays(sglang: Environment, directory: Path, tmp_path: Path) -> None:
    """SGLang's own hooks let calls of its storage fail or come late: what is found may be less, but never wrong."""
    hooks = {"SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.3", "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.05"}
    (wanted,) = generate(sglang, tmp_path / "model", None)
    for _ in range(2):
        (found,) = generate(sglang, tmp_path / "model", directory / "mnt", **hooks)
        assert found.tokens == wanted.tokens
        assert found.from_storage in range(0, PROMPT_PAGES + 1, 64)


def test_engine_outlives_kvfs(sglang: Environment, directory: Path, tmp_path: Path) -> None:
    """Killed between two prompts, kvfs is only missed."""
    model, where = tmp_path / "model", directory / "mnt"
    wanted = generate(sglang, model, None, "--between", "true")
    generate(sglang, model, where, "--between", "true")
    pid = shlex.join([sys.executable, "-c", f"from commands import kill_daemon; kill_daemon({str(directory)!r})"])
    environment = f"PYTHONPATH={shlex.quote(str(HERE.parent))}"
    found = generate(sglang, model, where, "--between", f"{environment} {pid}")
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    assert [one.from_storage for one in found] == [PROMPT_PAGES, 0]
