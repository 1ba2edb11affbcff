"""What is measured, against what, and in which order.

Each round runs every pair once, ours and fio's in turn, and the next round in the other order, so that a disk or a
neighbour that changes its speed changes it for both. Figures are medians over the rounds; a ratio is the median of the
rounds' ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvfs_tools.bench.programs import BenchError, Fio, FioResult, Ring, RingResult, ring_bench_path
from kvfs_tools.bench.report import Report, Row, Target, summarise
from kvfs_tools.bench.scratch import Scratch, machine, scratch

KB4, MB1 = 4096, 1 << 20
DEPTH, BIG_DEPTH, MOUNT_JOBS = 64, 8, 4
MIN_STORE = 512 << 20
MEMORY_SHARE = 4  # the memory-resident set is this part of the memory tier
MEMORY_SET_MAX = 64 << 20
SMALL, BIG, HOT = "bench/small", "bench/big", "bench/hot"


@dataclass(frozen=True, slots=True)
class Plan:
    rounds: int = 5
    seconds: float = 3.0
    store: int = 4 << 30
    memory: int = 512 << 20

    def __post_init__(self) -> None:
        if self.rounds < 1 or not self.seconds > 0:
            raise ValueError("at least one round and some time are needed")
        if self.store < MIN_STORE:
            raise ValueError(f"the store needs at least {MIN_STORE >> 20} MiB for the sets that are read")

    @property
    def small_set(self) -> int:
        """Bytes of 4 KiB blocks that are read from disk, and of fio's file."""
        return self.store // 4

    @property
    def big_set(self) -> int:
        return self.store // 8

    @property
    def file(self) -> int:
        """Bytes of the file on the mount."""
        return self.store // 16

    @property
    def puts(self) -> int:
        """Bytes put in one round, at most; evicted after it."""
        return self.store // 4

    @property
    def memory_set(self) -> int:
        return min(self.memory // MEMORY_SHARE, MEMORY_SET_MAX)


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told what goes on."""

    begin: Callable[[int], None] = lambda _: None  # steps in all
    step: Callable[[str], None] = lambda _: None  # what begins now
    command: Callable[[str], None] = lambda _: None
    say: Callable[[str], None] = lambda _: None  # what the user should know at once


@dataclass(slots=True)
class _Context:
    plan: Plan
    place: Scratch
    ring: Ring
    fio: Fio | None
    number: int = 0  # of keys put so far, so that each put is of a new one

    def fresh(self, count: int) -> int:
        first = self.number
        self.number += count
        return first


Numbers = list[tuple[float, float | None]]


@dataclass(slots=True)
class _Pair:
    """Ours and fio's way of one job, and the rounds so far."""

    title: str
    ours: Callable[[_Context], RingResult]
    other: Callable[[_Context, Fio], FioResult]
    results: list[tuple[RingResult, FioResult | None]] = field(
        default_factory=list[tuple[RingResult, FioResult | None]]
    )

    def round(self, c: _Context, fio_first: bool) -> None:
        other = self.other(c, c.fio) if c.fio and fio_first else None
        mine = self.ours(c)
        if c.fio and not fio_first:
            other = self.other(c, c.fio)
        self.results.append((mine, other))

    def numbers(self, mine: Callable[[RingResult], float], other: Callable[[FioResult], float]) -> Numbers:
        return [(mine(m), other(o) if o is not None else None) for m, o in self.results]

    def iops(self) -> Numbers:
        return self.numbers(lambda m: m.ops_per_s, lambda o: o.iops)

    def cpu(self) -> Numbers:
        return self.numbers(lambda m: m.cpu_us_per_op, lambda o: o.cpu_us_per_io)

    def rate(self) -> Numbers:
        return self.numbers(lambda m: m.bytes_per_s / 1e6, lambda o: o.bytes_per_s / 1e6)


def _get(target: str, block: int, depth: int, total: Callable[[Plan], int], op: str = "get"):
    def run(c: _Context) -> RingResult:
        where = str(c.place.mount / "file") if op == "read" else target
        count = total(c.plan) // block
        seed = c.fresh(1) + 1  # another order each round
        return c.ring.run(where, op, seconds=c.plan.seconds, size=block, depth=depth, count=count, seed=seed)

    return run


def _evict(c: _Context, first: int, count: int) -> None:
    # Durable: only then is the space free again, and the next puts need not push out blocks that are to be read.
    c.ring.run(HOT, "evict", flags=["--durable"], depth=DEPTH, first=first, count=count)


def _put(block: int, depth: int, *, durable: bool):
    def run(c: _Context) -> RingResult:
        count = c.plan.puts // block
        first = c.fresh(count)
        flags = ["--durable"] if durable else []
        done = c.ring.run(
            HOT, "put", seconds=c.plan.seconds, flags=flags, size=block, depth=depth, first=first, count=count
        )
        if done.there:
            raise BenchError(f"{done.there} blocks to be put were there already")
        _evict(c, first, done.ops)
        return done

    return run


def _fio(rw: str, block: int, depth: int, *more: str):
    def run(c: _Context, fio: Fio) -> FioResult:
        p = c.plan
        return fio.random(
            c.place.fio_file, rw, size=p.small_set, block=block, depth=depth, seconds=p.seconds, more=more
        )

    return run


def _pread(c: _Context, fio: Fio) -> FioResult:
    return fio.pread(c.place.mount / "file", size=c.plan.file, block=KB4, jobs=MOUNT_JOBS, seconds=c.plan.seconds)


def _prepare(c: _Context, listen: Listener) -> None:
    """Nine tenths of the store are written once, then the sets that are read; fio's file is laid out."""
    listen.step("writing the store full once")
    free = c.place.status().stats["free_bytes"]
    count = int(free * 0.9) // MB1
    first = c.fresh(count)
    c.ring.run(HOT, "put", size=MB1, depth=BIG_DEPTH, first=first, count=count)
    _evict(c, first, count)
    listen.step("writing the blocks that are read")
    c.ring.run(SMALL, "put", size=KB4, depth=DEPTH, count=c.plan.small_set // KB4)
    c.ring.run(BIG, "put", size=MB1, depth=BIG_DEPTH, count=c.plan.big_set // MB1)
    c.ring.run(str(c.place.mount / "file"), "write", size=MB1, depth=BIG_DEPTH, count=c.plan.file // MB1)
    listen.step("comparing every byte of them once")
    c.ring.run(SMALL, "get", flags=["--verify"], size=KB4, depth=DEPTH, count=c.plan.small_set // KB4)
    if c.fio:
        listen.step("laying out fio's file")
        c.fio.lay_out(c.place.fio_file, c.plan.small_set)


def _on_disk(c: _Context, listen: Listener) -> list[Row]:
    small: Callable[[Plan], int] = lambda p: p.small_set  # noqa: E731
    deep = _Pair("4 KiB reads, depth 64", _get(SMALL, KB4, DEPTH, small), _fio("randread", KB4, DEPTH))
    single = _Pair("4 KiB reads, depth 1", _get(SMALL, KB4, 1, small), _fio("randread", KB4, 1))
    mount = _Pair("4 KiB reads of a file", _get("", KB4, DEPTH, lambda p: p.file, "read"), _pread)
    big = _Pair("1 MiB reads", _get(BIG, MB1, BIG_DEPTH, lambda p: p.big_set), _fio("randread", MB1, BIG_DEPTH))
    puts = _Pair("1 MiB writes", _put(MB1, BIG_DEPTH, durable=False), _fio("randwrite", MB1, BIG_DEPTH))
    durable = _Pair(
        "durable 4 KiB writes", _put(KB4, DEPTH, durable=True), _fio("randwrite", KB4, DEPTH, f"--fdatasync={DEPTH}")
    )
    pairs = (deep, single, mount, big, puts, durable)
    for number in range(c.plan.rounds):
        for pair in pairs:
            listen.step(f"round {number + 1} of {c.plan.rounds}: {pair.title}")
            pair.round(c, fio_first=number % 2 == 1)
    return [
        summarise(
            "read-64",
            "4 KiB random gets from a client process, depth 64, from disk, checksums verified",
            "IOPS",
            "fio, depth 64",
            Target(0.95),
            deep.iops(),
        ),
        summarise(
            "read-64-cpu",
            "the same: CPU time of client and daemon",
            "us/read",
            "fio, depth 64",
            Target(1.0, at_most=True),
            deep.cpu(),
        ),
        summarise("read-1", "the same gets at depth 1", "IOPS", "fio, depth 1", Target(0.8), single.iops()),
        summarise(
            "read-file",
            "4 KiB random reads of a file on the mount, over the ring, depth 64",
            "IOPS",
            f"pread() of it through the mount, {MOUNT_JOBS} jobs, direct",
            Target(5.0),
            mount.iops(),
        ),
        summarise("get-1m", "1 MiB random gets, depth 8, from disk", "MB/s", "fio, depth 8", Target(0.95), big.rate()),
        summarise("put-1m", "1 MiB puts of new blocks, depth 8", "MB/s", "fio, depth 8", Target(0.90), puts.rate()),
        summarise(
            "put-durable",
            "4 KiB durable puts of new blocks, depth 64",
            "IOPS",
            "fio, random writes, fdatasync per 64",
            Target(0.5),
            durable.iops(),
        ),
    ]


def _in_memory(c: _Context, listen: Listener) -> list[Row]:
    count = max(1, c.plan.memory_set // KB4)
    listen.step("filling the memory tier")
    # Several passes: a policy that resists scans lets a block in only when it is asked for again.
    for seed in range(1, 5):
        c.ring.run(SMALL, "get", size=KB4, depth=DEPTH, count=count, seed=seed)
    for _ in range(2):
        c.ring.run(SMALL, "get", seconds=min(2.0, c.plan.seconds), size=KB4, depth=DEPTH, count=count)
    batches: Numbers = []
    singles: Numbers = []
    before = c.place.status().stats
    for number in range(c.plan.rounds):
        listen.step(f"round {number + 1} of {c.plan.rounds}: from memory")
        seed = number + 11
        seconds = c.plan.seconds
        batch = c.ring.run(
            SMALL, "get", seconds=seconds, flags=["--batch"], size=KB4, depth=DEPTH, count=count, seed=seed
        )
        one = c.ring.run(SMALL, "get", seconds=seconds, size=KB4, depth=1, count=count, seed=seed)
        batches.append((batch.ops_per_s, None))
        singles.append((one.ops_per_s, None))
    after = c.place.status().stats
    gets = max(1, after["gets"] - before["gets"])
    hits = (after["mem_hits"] - before["mem_hits"]) / gets
    note = "" if hits > 0.995 else f"only {hits * 100:.0f} % of these gets were answered from memory"
    what = f"4 KiB gets of blocks in memory ({c.plan.memory_set >> 20} MiB of them), one client process"
    million = Target(1.5e6, absolute=True)
    return [
        summarise("memory-64", f"{what}, batches of 64", "gets/s", "", million, batches, note),
        summarise("memory-1", f"{what}, one at a time", "gets/s", "", Target(150e3, absolute=True), singles, note),
    ]


def _notes(plan: Plan, fio: Fio | None) -> list[str]:
    notes = [
        f"Steady state: nine tenths of the store ({plan.store / 2**30:.2g} GiB) were written and freed once before; blocks read from"
        f" disk are {plan.small_set >> 20} MiB of 4 KiB and {plan.big_set >> 20} MiB of 1 MiB, read with the memory tier off."
    ]
    if fio:
        notes.append(
            f"fio: io_uring, --fixedbufs=1 --registerfiles=1 --direct=1; its file of {plan.small_set >> 20} MiB is on the same file system and was written in full before."
        )
    else:
        notes.append("fio is not installed, so there is nothing to compare with: apt-get install fio.")
    notes.append("A ratio is the median of the rounds' ratios; ours and fio's run in turn, in changing order.")
    return notes


def bench(beside: Path, plan: Plan, listen: Listener | None = None) -> Report:
    """Runs everything in a scratch directory in `beside`. BenchError if it cannot."""
    listen = listen or Listener()
    program = ring_bench_path()
    fio = Fio.find(listen.command)
    where = machine(fio.version() if fio else "")
    listen.begin(6 + plan.rounds * 7)
    needed = plan.store + (plan.small_set if fio else 0) + (256 << 20)
    with scratch(beside, needed) as place:
        listen.step("starting a daemon without memory tier")
        pid = place.up(size=plan.store, memory=0)
        c = _Context(plan, place, Ring(program, place.layout.socket, pid, listen.command), fio)
        _prepare(c, listen)
        rows = _on_disk(c, listen)
        place.down()
        listen.step("starting a daemon with memory tier")
        pid = place.up(size=plan.store, memory=plan.memory)
        c.ring = Ring(program, place.layout.socket, pid, listen.command)
        rows[4:4] = _in_memory(c, listen)
    return Report(where, plan.rounds, plan.seconds, plan.store, rows, _notes(plan, fio))
