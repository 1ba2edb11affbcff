"""`kvfs bench usrbio`: 3FS's own fio engine on a kvfs mount, beside the same fio on the disk below and through the mount.

The engine is 3FS's `benchmarks/fio_usrbio`, compiled by its user against `kvfs usrbio --print-flags`. Rounds alternate; a figure is
the median of the rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvfs_tools.bench.measure import KB4, MB1, Listener
from kvfs_tools.bench.programs import BenchError, Fio, FioResult, batches
from kvfs_tools.bench.report import Report, Target, summarise
from kvfs_tools.bench.scratch import machine, scratch, write_once

DEPTH: Final = 64
OURS, BATCHES, DISK, MOUNT = "usrbio", "disk-batches", "disk", "mount"


@dataclass(frozen=True, slots=True)
class UsrbioPlan:
    rounds: int = 5
    seconds: float = 3.0
    file: int = 1 << 30
    memory: int = 64 << 20

    def __post_init__(self) -> None:
        if self.file < MB1 or self.file % MB1:
            raise ValueError("the file has whole MiB, at least one")

    @property
    def store(self) -> int:
        return 3 * self.file + (256 << 20)


def bench_usrbio(
    beside: Path, plan: UsrbioPlan, *, engine: Path, program: Path | None = None, listen: Listener | None = None
) -> Report:
    """Runs everything in a scratch directory in `beside`. `program` is the fio whose source the engine was compiled with.
    BenchError if it cannot."""
    listen = listen or Listener()
    fio = Fio(program, listen.command) if program is not None else Fio.find(listen.command)
    if fio is None:
        raise BenchError("fio is not installed: apt-get install fio")
    if not engine.is_file():
        raise BenchError(
            f"{engine} is not there: build 3FS's benchmarks/fio_usrbio against `kvfs usrbio --print-flags`"
        )
    where = machine(fio.version())
    listen.begin(1 + 4 * plan.rounds)
    rounds: list[dict[str, FioResult]] = []
    with scratch(beside, plan.store + plan.file + (256 << 20)) as place:
        listen.step("preparing")
        place.up(size=plan.store, memory=plan.memory)
        write_once(place.mount)  # the store is as one in use
        file = place.mount / "file"
        fio.through(file, "write", size=plan.file, block=MB1)
        fio.lay_out(place.fio_file, plan.file)

        def ours() -> FioResult:
            return fio.usrbio(
                file, engine, place.mount, "randread", size=plan.file, block=KB4, depth=DEPTH, seconds=plan.seconds
            )

        def disk(*more: str) -> FioResult:
            return fio.random(
                place.fio_file, "randread", size=plan.file, block=KB4, depth=DEPTH, seconds=plan.seconds, more=more
            )

        def mount() -> FioResult:
            return fio.through(file, "randread", size=plan.file, block=KB4, seconds=plan.seconds)

        contenders = [(OURS, ours), (BATCHES, lambda: disk(*batches(DEPTH))), (DISK, disk), (MOUNT, mount)]
        for number in range(plan.rounds):
            first = number % len(contenders)
            found: dict[str, FioResult] = {}
            for name, take in contenders[first:] + contenders[:first]:
                listen.step(f"round {number + 1} of {plan.rounds}: {name}")
                found[name] = take()
            rounds.append(found)
    what = f"4 KiB random reads, batches of {DEPTH}"
    rows = [
        summarise(
            f"usrbio-{name}",
            what,
            "IOPS",
            against,
            Target(least),
            [(found[OURS].iops, found[name].iops) for found in rounds],
        )
        for name, against, least in (
            (BATCHES, f"io_uring on the disk, batches of {DEPTH}", 0.85),
            (DISK, f"io_uring on the disk, {DEPTH} always in flight", 0.85),
            (MOUNT, "psync through the mount", 5.0),
        )
    ]
    spent = {name: statistics.median(found[name].cpu_us_per_io for found in rounds) for name, _ in contenders}
    notes = [
        f"3FS's fio engine: one job, iodepth and batches {DEPTH}; kvfs: {plan.memory >> 20} MiB of memory tier, defaults else.",
        "The disk: one job, O_DIRECT, registered buffers and files, on a file beside kvfs's store.",
        "CPU of fio's own process per read, us: " + ", ".join(f"{name} {us:.1f}" for name, us in spent.items()) + ".",
        "A ratio is the median of the rounds' ratios; the four run in turn, in changing order.",
    ]
    return Report(where, plan.rounds, plan.seconds, plan.store, rows, notes)
