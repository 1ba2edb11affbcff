"""`kvfs bench net`: blocks of a chunk server over loopback TCP and shared memory, beside Mooncake Store, a plain sender, and the
local ring; and over two shaped rails, beside one.

One chunk server process and one client process, as two machines would have. Rounds alternate; a figure is the median of the rounds,
a ratio the median of the rounds' ratios. Owns the processes it starts.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import subprocess
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from kvfs_tools.bench import plain_pair, rails
from kvfs_tools.bench.chunkserver import ChunkServer, Result, Workers, child, cpu_seconds, free_port, wait_until
from kvfs_tools.bench.measure import KB4, MB1, Listener
from kvfs_tools.bench.programs import BenchError
from kvfs_tools.bench.report import Report, Row, Target, summarise
from kvfs_tools.bench.scratch import machine, scratch_directory
from kvfs_tools.hosts import Unavailable

BATCH, BIG_BATCH = 64, 16


@dataclass(frozen=True, slots=True)
class NetPlan:
    rounds: int = 5
    seconds: float = 2.0
    memory: int = 1 << 30
    hot: int = 64 << 20  # bytes of 4 KiB blocks in memory, and as many of 1 MiB
    cold: int = 512 << 20  # bytes of 4 KiB blocks that are read from disk

    @property
    def store(self) -> int:
        return 2 * (2 * self.hot + self.cold) + (512 << 20)


class Mooncake:
    """Mooncake's master, one process that holds the memory, and one client process."""

    def __init__(self, client: subprocess.Popen[bytes]) -> None:
        self.client = client

    def ask(self, op: str, size: int, count: int, *, batch: int = 1, seconds: float = 0.0, seed: int = 0) -> Result:
        line = {"op": op, "size": size, "count": count, "batch": batch, "seconds": seconds, "seed": seed}
        return msgspec.json.decode(self._exchange(msgspec.json.encode(line) + b"\n"), type=Result)

    def _exchange(self, line: bytes) -> bytes:
        to, back = self.client.stdin, self.client.stdout
        assert to is not None
        assert back is not None
        to.write(line)
        to.flush()
        return _line(back)

    @staticmethod
    @contextlib.contextmanager
    def running(python: Path, root: Path) -> Generator[Mooncake]:
        port, log = free_port(), root / "mooncake.log"
        worker = [str(python), str(Path(__file__).with_name("mooncake_worker.py")), str(port)]
        master = [str(python.with_name("mooncake_master")), "--rpc_address=127.0.0.1", f"--rpc_port={port}"]
        master += [f"--metrics_port={free_port()}", "--enable_metric_reporting=false"]
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(child(master, log))
            wait_until("Mooncake's master", first, log, lambda: _listens(port))
            holder = stack.enter_context(child([*worker, "server"], log, piped=True))
            client = stack.enter_context(child([*worker, "client"], log, piped=True))
            for process in (holder, client):
                assert process.stdout is not None
                if _line(process.stdout).strip() != b"ready":
                    raise BenchError(f"Mooncake did not start; {log} says why")
            yield Mooncake(client)


def _line(pipe: IO[bytes]) -> bytes:
    line = pipe.readline()
    if not line:
        raise BenchError("Mooncake's worker ended")
    return line


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


@dataclass(slots=True)
class _Bench:
    plan: NetPlan
    workers: Workers
    root: Path
    mooncake: Mooncake | None
    listen: Listener
    server: int = 0  # its process

    def get(self, size: int, count: int, batch: int, seed: int, *, remote: bool = True, shm: bool = False) -> Result:
        seconds = self.plan.seconds
        return self.workers.run("get", size, count, batch=batch, seconds=seconds, seed=seed, remote=remote, shm=shm)

    def with_server(self, size: int, count: int, batch: int, seed: int) -> float:
        """CPU seconds per get, of client and server."""
        before = cpu_seconds(self.server)
        found = self.get(size, count, batch, seed)
        return (cpu_seconds(self.server) - before + found.cpu_s) / found.ops

    def peer(self, size: int, count: int, batch: int, seed: int) -> float | None:
        if self.mooncake is None:
            return None
        return self.mooncake.ask("get", size, count, batch=batch, seconds=self.plan.seconds, seed=seed).per_s


def in_turn(number: int, takes: dict[str, Callable[[], float | None]]) -> dict[str, float | None]:
    """Each once; who comes first changes with the round's number."""
    order = list(takes)
    first = number % len(order)
    return {name: takes[name]() for name in order[first:] + order[:first]}


Pairs = list[tuple[float, float | None]]


def _memory_round(b: _Bench, number: int, small: int, big: int) -> dict[str, float | None]:
    def of_bytes(per_s: float | None) -> float | None:
        return per_s * MB1 / 1e6 if per_s is not None else None

    found = in_turn(
        number,
        {
            "small": lambda: b.get(KB4, small, BATCH, number).per_s,
            "shm small": lambda: b.get(KB4, small, BATCH, number, shm=True).per_s,
            "peer small": lambda: b.peer(KB4, small, BATCH, number),
        },
    )
    found |= in_turn(
        number,
        {
            "big": lambda: of_bytes(b.get(MB1, big, BIG_BATCH, number).per_s),
            "shm big": lambda: of_bytes(b.get(MB1, big, BIG_BATCH, number, shm=True).per_s),
            "peer big": lambda: of_bytes(b.peer(MB1, big, BIG_BATCH, number)),
            "plain": lambda: plain_pair.receive(b.plan.hot, BIG_BATCH * MB1, b.plan.seconds) / 1e6,
        },
    )
    return found | in_turn(
        number,
        {
            "cpu": lambda: b.with_server(KB4, small, BATCH, number) * 1e6,
            "cpu of one": lambda: b.with_server(KB4, small, 1, number) * 1e6,
        },
    )


def _from_memory(b: _Bench) -> list[Row]:
    plan = b.plan
    small, big = plan.hot // KB4, plan.hot // MB1
    b.listen.step("putting the blocks that stay in memory")
    for size, count in ((KB4, small), (MB1, big)):
        b.workers.run("put", size, count, batch=BATCH)
        for seed in range(3):  # large blocks are kept at the second read
            b.workers.run("get", size, count, batch=BATCH, seed=seed)
        if b.mooncake is not None:
            b.mooncake.ask("put", size, count)
    rounds: list[dict[str, float | None]] = []
    for number in range(plan.rounds):
        b.listen.step(f"round {number + 1} of {plan.rounds}: from memory")
        rounds.append(_memory_round(b, number, small, big))

    def pairs(mine: str, other: str) -> Pairs:
        return [(found[mine] or 0.0, found[other]) for found in rounds]

    what = f"1 MiB gets from memory over TCP loopback, batches of {BIG_BATCH}"
    return [
        summarise(
            "net-4k",
            f"4 KiB random gets from memory over TCP loopback, batches of {BATCH}",
            "gets/s",
            "Mooncake Store, batch_get_into",
            Target(3.0),
            pairs("small", "peer small"),
        ),
        summarise("net-1m", what, "MB/s", "plain sender and receiver", Target(0.85), pairs("big", "plain")),
        summarise("net-1m-mooncake", "the same", "MB/s", "Mooncake Store", Target(1.2), pairs("big", "peer big")),
        summarise(
            "shm-4k",
            f"4 KiB random gets from memory through shared memory, batches of {BATCH}",
            "gets/s",
            "the same over TCP loopback",
            Target(1.0),
            pairs("shm small", "small"),
        ),
        summarise(
            "shm-1m",
            f"1 MiB gets from memory through shared memory, batches of {BIG_BATCH}",
            "MB/s",
            "the same over TCP loopback",
            Target(1.0),
            pairs("shm big", "big"),
        ),
        summarise(
            "net-cpu",
            f"CPU of client and server per 4 KiB get, batches of {BATCH}",
            "us",
            "one at a time",
            Target(0.4, at_most=True),
            pairs("cpu", "cpu of one"),
        ),
    ]


def _disk_round(b: _Bench, number: int, count: int) -> dict[str, float | None]:
    server = b.workers.server

    def remote() -> float:
        with server.running(0):
            return b.get(KB4, count, BATCH, number).per_s

    def local() -> float:
        with server.ring():
            return b.get(KB4, count, BATCH, number, remote=False).per_s

    return in_turn(number, {"remote": remote, "local": local})


def _from_disk(b: _Bench) -> Row:
    plan = b.plan
    count = plan.cold // KB4
    b.listen.step("putting the blocks that are read from disk")
    with b.workers.server.running(0):
        b.workers.run("put", KB4, count, batch=BATCH)
    pairs: Pairs = []
    for number in range(plan.rounds):
        b.listen.step(f"round {number + 1} of {plan.rounds}: from disk")
        found = _disk_round(b, number, count)
        pairs.append((found["remote"] or 0.0, found["local"]))
    what = f"4 KiB random gets from disk over TCP loopback, batches of {BATCH}"
    return summarise("net-disk", what, "gets/s", "the same store over its own ring", Target(0.7), pairs)


def bench_net(beside: Path, plan: NetPlan, *, mooncake: Path | None = None, listen: Listener | None = None) -> Report:
    """Runs everything in a scratch directory in `beside`. `mooncake`: a Python that has Mooncake. BenchError if it cannot."""
    listen = listen or Listener()
    where = machine("")
    listen.begin(3 + 3 * plan.rounds)
    with scratch_directory(beside, plan.store + rails.DISK + (256 << 20)) as root, contextlib.ExitStack() as stack:
        server = ChunkServer(root, plan.store)
        peer = stack.enter_context(Mooncake.running(mooncake, root)) if mooncake is not None else None
        b = _Bench(plan, Workers(server, listen.command), root, peer, listen)
        with server.running(plan.memory) as b.server:
            rows = _from_memory(b)
        rows.append(_from_disk(b))
        try:
            rows += rails.two_rails(root, plan.rounds, plan.seconds, listen)
            lacking = ""
        except Unavailable as e:
            lacking = f"Two rails were not measured, for want of hosts to join by them: {e}."
    spent = statistics.median(mine for mine, _ in next(row for row in rows if row.name == "net-cpu").rounds)
    notes = [
        f"One chunk server with one device, one client process; {plan.hot >> 20} MiB of blocks in memory, {plan.cold >> 20} MiB on disk.",
        f"End-to-end checksums on; {spent:.1f} us of CPU per 4 KiB get in batches, both sides.",
        "A ratio is the median of the rounds' ratios; contenders run in turn, in changing order.",
        *([lacking] if lacking else []),
    ]
    return Report(where, plan.rounds, plan.seconds, plan.store, rows, notes)
