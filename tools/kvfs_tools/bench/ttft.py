"""`kvfs bench ttft`: the time to the first token in vLLM, with the prompt's KV in kvfs and without.

Each measurement is an engine process of its own, with vLLM's prefix cache off, so that every token that is not computed comes
from storage. The contenders run in turn, in changing order; a figure is the median of the rounds, a ratio the median of the
rounds' ratios.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from kvfs_tools.bench import lmcache_server
from kvfs_tools.bench.measure import Listener
from kvfs_tools.bench.programs import BenchError
from kvfs_tools.bench.report import Report, Row, Target, summarise
from kvfs_tools.bench.scratch import Scratch, machine, scratch
from kvfs_usrbio.blocks import BlockStore

ENGINE: Final = Path(__file__).with_name("ttft_engine.py")
ENGINE_S: Final = 3600.0
REST: Final = 4  # tokens of a prompt behind its last whole block
QUESTION: Final = 28
COMPUTE, STORE, HIT = "recompute", "store", "hit"
EXAMPLE, LMCACHE = "vLLM's ExampleConnector", "LMCache's server on files"
FILES_S: Final = 120.0  # until LMCache has its files

SHAPES: Final = {
    "tiny": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
    },
    "small": {  # Qwen2.5-0.5B's: 12 KiB of KV a token
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
    },
}


@dataclass(frozen=True, slots=True)
class TtftPlan:
    """`tokens`: lengths of prompts. `contexts` and `questions` over each of them, of `context_tokens`: requests a second; none if
    0. `computed`: how many of a context's questions are asked without kvfs too, where the rate does not depend on it.
    `example`: also vLLM's own connector that keeps files. `lmcache`: also LMCache's, files being its second level."""

    python: Path
    shape: str = "small"
    tokens: tuple[int, ...] = (4096, 8192)
    rounds: int = 5
    contexts: int = 8
    questions: int = 20
    computed: int = 20
    context_tokens: int = 4096
    example: bool = True
    lmcache: bool = False
    store: int = 4 << 30
    memory: int = 512 << 20  # as the daemon has it by default

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"there is no shape {self.shape}, only {', '.join(SHAPES)}")
        if self.rounds < 1 or not all(64 <= count <= 32000 for count in (*self.tokens, self.context_tokens)):
            raise ValueError("at least one round is needed, and prompts have 64 to 32000 tokens")


class Order(msgspec.Struct, frozen=True):
    """For ttft_engine.py. `prompts`: (tokens, tokens behind them) of each."""

    model: Path
    shape: dict[str, int]
    transfer: dict[str, Any] | None
    prompts: list[tuple[int, int]]
    questions: int
    seed: str
    trace: str | None


class Measured(msgspec.Struct, frozen=True):
    """Seconds of one engine process; those in the connector are 0 without kvfs."""

    seconds: float
    cpu: float
    cached: int
    tokens: list[int]
    exists: float
    load: float
    get: float
    copy: float
    bytes: int
    blocks: int
    save: float
    forward: float

    @property
    def kvfs(self) -> float:
        return self.exists + self.load


@dataclass(frozen=True, slots=True)
class _Round:
    """By contender. `gets`: seconds of a plain client for what a hit loaded."""

    found: dict[str, Measured]
    gets: float


@dataclass(slots=True)
class _Bench:
    plan: TtftPlan
    place: Scratch
    listen: Listener

    def run(
        self, transfer: dict[str, Any] | None, prompts: Sequence[tuple[int, int]], seed: str, questions: int = 0
    ) -> Measured:
        plan, root = self.plan, self.place.root
        trace = str(root / "trace") if transfer is not None and "where" in str(transfer) else None
        order = Order(root / "model", SHAPES[plan.shape], transfer, list(prompts), questions, seed, trace)
        line = [str(plan.python), str(ENGINE), msgspec.json.encode(order, enc_hook=str).decode()]
        self.listen.command(" ".join(line))
        try:
            done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, timeout=ENGINE_S, check=False)
        except OSError as e:
            raise BenchError(f"{plan.python} cannot be run: {e.strerror}") from e
        except subprocess.TimeoutExpired:
            raise BenchError(f"an engine did not end within {ENGINE_S:g} s") from None
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise BenchError(f"an engine ended with {done.returncode}: {said[-1] if said else ''}")
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=Measured)

    def kvfs(self, namespace: str) -> dict[str, Any]:
        extra = {
            "where": str(self.place.layout.root),
            "namespace": f"bench/{namespace}",
            "trace": str(self.place.root / "trace"),
        }
        return {
            "kv_connector": "KvfsConnector",
            "kv_connector_module_path": "kvfs_usrbio.connectors.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }

    def gets(self, blocks: int, size: int, name: str) -> float:
        """Seconds that a client of the same kvfs takes for as many blocks of this size, through its ring into its own memory."""
        with BlockStore.open(self.place.layout.root, f"bench/{name}-gets") as store:
            memory = store.alloc(blocks * size)
            ctypes.memset(memory.address, 0x5A, len(memory))
            keys = [f"{name} {i}".encode() for i in range(blocks)]
            stored = store.put_from(keys, memory, size)
            begun = time.perf_counter()
            got = store.get_into(keys, memory, size)
            seconds = time.perf_counter() - begun
            if stored != [1] * blocks or got != [size] * blocks:
                raise BenchError("a client's own blocks could not be stored and read")
            return seconds

    def with_lmcache(self, name: str, prompts: Sequence[tuple[int, int]]) -> Measured:
        """With a server of its own, of which only the files are left."""
        place = self.place.root / f"lmcache-{name}"
        place.mkdir(exist_ok=True)
        level = lmcache_server.files_level(place)
        with lmcache_server.server(self.plan.python, self.place.root / "lmcache-log", level) as port:
            measured = self.run(lmcache_server.transfer(port), prompts, name)
            wanted = sum(count // lmcache_server.CHUNK for count, _ in prompts)
            deadline = time.monotonic() + FILES_S
            while sum(1 for _ in place.rglob("*.data")) < wanted:
                if time.monotonic() > deadline:
                    raise BenchError(f"LMCache has not stored {wanted} objects within {FILES_S:g} s")
                time.sleep(0.1)
        return measured

    def example(self, folder: str) -> dict[str, Any]:
        place = self.place.root / folder
        place.mkdir(exist_ok=True)
        return {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"shared_storage_path": str(place)},
        }


def _first_tokens(bench: _Bench, count: int, number: int) -> _Round:
    """One round for prompts of this length: what stores goes before what finds it."""
    name = f"{count}-{number}"
    prompts = [(count, REST)]
    kvfs, example = bench.kvfs(name), bench.example(name) if bench.plan.example else None
    groups: list[list[tuple[str, Callable[[], Measured]]]] = [
        [(COMPUTE, lambda: bench.run(None, prompts, name))],
        [(STORE, lambda: bench.run(kvfs, prompts, name)), (HIT, lambda: bench.run(kvfs, prompts, name))],
    ]
    if example is not None:
        run: Callable[[], Measured] = lambda: bench.run(example, prompts, name)  # noqa: E731
        groups.append([(f"{EXAMPLE}, storing", run), (EXAMPLE, run)])
    if bench.plan.lmcache:
        run = lambda: bench.with_lmcache(name, prompts)  # noqa: E731
        groups.append([(f"{LMCACHE}, storing", run), (LMCACHE, run)])
    first = number % len(groups)
    found: dict[str, Measured] = {}
    for group in groups[first:] + groups[:first]:
        for who, take in group:
            bench.listen.step(f"{count} tokens, round {number + 1} of {bench.plan.rounds}: {who}")
            found[who] = take()
    if len({found[who].tokens[0] for who in (COMPUTE, STORE, HIT)}) != 1:
        raise BenchError(f"the first tokens differ: {[found[who].tokens for who in (COMPUTE, STORE, HIT)]}")
    hit = found[HIT]
    if not hit.cached or not hit.blocks:
        raise BenchError("nothing was loaded from kvfs")
    return _Round(found, bench.gets(hit.blocks, hit.bytes // hit.blocks, name))


def _rows(count: int, rounds: list[_Round]) -> list[Row]:
    def pairs(mine: str, other: str) -> list[tuple[float, float | None]]:
        return [(one.found[mine].seconds, one.found[other].seconds) for one in rounds]

    hit = f"TTFT, {count} tokens, KV stored by another process"
    rows = [
        summarise(f"hit-{count}", hit, "s", "recompute", Target(0.03, at_most=True), pairs(HIT, COMPUTE)),
        summarise(
            f"hit-kvfs-{count}",
            f"the same: inside kvfs's calls, for {rounds[0].found[HIT].bytes / 2**20:.0f} MiB",
            "ms",
            "",
            Target(100, at_most=True, absolute=True),
            [(one.found[HIT].kvfs * 1e3, None) for one in rounds],
        ),
        summarise(
            f"store-{count}",
            f"TTFT, {count} tokens, seen for the first time and stored",
            "s",
            "no connector",
            Target(1.03, at_most=True),
            pairs(STORE, COMPUTE),
        ),
        summarise(
            f"load-{count}",
            f"loading a hit of {count} tokens into the engine's memory",
            "MB/s",
            "gets of the same blocks through a ring",
            Target(0.9),
            [
                (one.found[HIT].bytes / one.found[HIT].load / 1e6, one.found[HIT].bytes / one.gets / 1e6)
                for one in rounds
            ],
        ),
    ]
    for key, other in (("example", EXAMPLE), ("lmcache", LMCACHE)):
        if all(_hit(one, other, count) for one in rounds):
            rows.append(summarise(f"hit-{key}-{count}", hit, "s", other, Target(1.0, at_most=True), pairs(HIT, other)))
    return rows


def _hit(one: _Round, who: str, count: int) -> bool:
    """Whether it found most of the prompt and says what a computing engine says."""
    found = one.found.get(who)
    return found is not None and found.cached * 2 > count and found.tokens == one.found[COMPUTE].tokens


def _misses(count: int, rounds: list[_Round]) -> list[str]:
    return [
        f"{who} did not find the prompt of {count} tokens again in {missed} of {len(rounds)} rounds: no figure."
        for who in (EXAMPLE, LMCACHE)
        if who in rounds[0].found and (missed := sum(not _hit(one, who, count) for one in rounds))
    ]


def _breakdown(count: int, rounds: list[_Round]) -> str:
    def middle(of: Callable[[Measured], float]) -> str:
        return f"{statistics.median(of(one.found[HIT]) for one in rounds) * 1e3:.1f}"

    return (
        f"A hit of {count} tokens, ms: exists {middle(lambda m: m.exists)}, waiting for gets {middle(lambda m: m.get)}, copying"
        f" {middle(lambda m: m.copy)} (the load in all {middle(lambda m: m.load)}), forward {middle(lambda m: m.forward)},"
        f" scheduling and the rest {middle(lambda m: m.seconds - m.exists - m.load - m.forward)}; storing it took the worker"
        f" {statistics.median(one.found[STORE].save for one in rounds) * 1e3:.1f} ms in copies."
    )


def _requests(bench: _Bench) -> Row:
    plan = bench.plan
    prompts = [(plan.context_tokens, QUESTION)] * plan.contexts
    pairs: list[tuple[float, float | None]] = []
    for number in range(plan.rounds):
        name = f"contexts-{number}"
        bench.listen.step(f"round {number + 1} of {plan.rounds}: storing the contexts")
        bench.run(bench.kvfs(name), prompts, name)
        rates: dict[bool, float] = {}
        for ours in (True, False) if number % 2 == 0 else (False, True):
            each = plan.questions if ours else plan.computed
            asked = plan.contexts * each
            bench.listen.step(f"round {number + 1} of {plan.rounds}: {asked} questions, {'kvfs' if ours else COMPUTE}")
            rates[ours] = asked / bench.run(bench.kvfs(name) if ours else None, prompts, name, each).seconds
        pairs.append((rates[True], rates[False]))
    return summarise(
        "questions",
        f"{plan.questions} questions over each of {plan.contexts} contexts of {plan.context_tokens} tokens",
        "requests/s",
        "recompute without reuse",
        Target(9.3),
        pairs,
    )


def bench_ttft(beside: Path, plan: TtftPlan, *, breakdown: bool = False, listen: Listener | None = None) -> Report:
    """Runs everything in a scratch directory in `beside`. BenchError if it cannot."""
    listen = listen or Listener()
    where = machine("")
    per_round = 3 + 2 * plan.example + 2 * plan.lmcache
    listen.begin(1 + plan.rounds * (per_round * len(plan.tokens) + (3 if plan.questions else 0)))
    rows: list[Row] = []
    notes: list[str] = []
    with scratch(beside, 2 * plan.store + (2 << 30)) as place:
        listen.step("starting kvfs")
        place.up(size=plan.store, memory=plan.memory)
        bench = _Bench(plan, place, listen)
        for count in plan.tokens:
            rounds = [_first_tokens(bench, count, number) for number in range(plan.rounds)]
            rows += _rows(count, rounds)
            notes += _misses(count, rounds)
            if breakdown:
                notes.append(_breakdown(count, rounds))
            spent = {who: statistics.median(one.found[who].cpu for one in rounds) for who in rounds[0].found}
            notes.append(
                f"CPU of the engine's process, {count} tokens, s: "
                + ", ".join(f"{who} {seconds:.2f}" for who, seconds in spent.items())
                + "."
            )
        if plan.questions and plan.contexts:
            rows.append(_requests(bench))
    notes.append(f"A model of the shape {plan.shape} with random weights, vLLM on the CPU, a new engine process each.")
    return Report(where, plan.rounds, 0, plan.store, rows, notes)
