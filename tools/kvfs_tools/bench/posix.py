"""`kvfs bench posix`: the mount beside another FUSE file system and beside the bare file system under both.

Each round takes every measure for each contender in turn, the next round in another order. A contender is mounted anew
for each measurement, alone, with the kernel's caches dropped where the user may (root). Figures are medians over the
rounds; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from kvfs_tools.bench import fileworker
from kvfs_tools.bench.contenders import (
    PACKAGE,
    PEER,
    Contender,
    Ext4,
    JuiceFs,
    Kvfs,
    clean_environment,
    find_peer,
    install_peer,
    mounted,
)
from kvfs_tools.bench.interrupts import Interrupts
from kvfs_tools.bench.measure import KB4, MB1, Listener
from kvfs_tools.bench.programs import BenchError, Fio, output
from kvfs_tools.bench.report import PosixReport, PosixRow, Target, compare
from kvfs_tools.bench.scratch import file_system, machine, scratch_directory, write_once

JOBS = 4
SEALED = 4 << 20
FILES_PER_S, FILES_MAX = 15_000, 50_000  # that one process creates in one measurement, at most: bounds the space
SLOWEST = 100.0  # files/s; slower is a hang
SLACK_S = 60.0
SYNC_S = 300.0
DROP = Path("/proc/sys/vm/drop_caches")
RAW = Ext4.name


@dataclass(frozen=True, slots=True)
class PosixPlan:
    rounds: int = 5
    seconds: float = 3.0
    file: int = 1 << 30
    files: int = 100_000
    memory: int = 512 << 20
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rounds < 1 or not self.seconds > 0:
            raise ValueError("at least one round and some time are needed")
        if self.file < MB1 or self.file % MB1:
            raise ValueError("the file has whole MiB, at least one")
        if self.files < 1:
            raise ValueError("at least one file is needed")
        for text in self.only:
            if not any(text in m.name for m in MEASURES):
                raise ValueError(f"no measure is named {text!r}; there are {', '.join(m.name for m in MEASURES)}")

    @property
    def measures(self) -> list[Measure]:
        return [m for m in MEASURES if not self.only or any(text in m.name for text in self.only)]

    @property
    def create_limit(self) -> int:
        """Files that one process creates in one measurement, at most."""
        return min(int(FILES_PER_S * self.seconds) + 1, FILES_MAX)

    @property
    def store(self) -> int:
        """Of kvfs: what is there at once, as much again for what is replaced, and a little."""
        small = max(measure.creates(self) for measure in self.measures) * KB4
        return 4 * self.file + 2 * small + (256 << 20)

    def needed(self, contenders: int) -> int:
        # The peer, with its cache of what it reads, is not larger than a kvfs store, either.
        return self.store * contenders + (512 << 20)


class _Counted(msgspec.Struct, frozen=True):
    count: int
    seconds: float


@dataclass(slots=True)
class _Run:
    """What the measures work with."""

    plan: PosixPlan
    fio: Fio | None
    listen: Listener
    interrupts: Interrupts
    root: Path
    value: Path  # what is sealed
    number: int = 0  # of the round
    made: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])  # contender, what is there to be used

    def through(self, file: Path, rw: str, block: int, jobs: int = 1, *, timed: bool = False):
        if self.fio is None:
            raise BenchError("fio is not installed: apt-get install fio")
        return self.fio.through(
            file, rw, size=self.plan.file, block=block, jobs=jobs, seconds=self.plan.seconds if timed else 0.0
        )

    def work(self, operation: str, paths: Sequence[Path], **numbers: float) -> list[_Counted]:
        """Worker processes, one for each path, that begin together."""
        limit = SLACK_S + numbers.get("seconds", 0.0) + numbers.get("count", 0) / SLOWEST
        options = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
        program = [sys.executable, "-I", "-S", fileworker.__file__]
        with contextlib.ExitStack() as stack:
            workers: list[subprocess.Popen[bytes]] = []
            for path in paths:
                command = [*program, operation, str(path), *options]
                self.listen.command(" ".join(command))
                with self.interrupts.held():
                    worker = subprocess.Popen(
                        command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
                    )
                    stack.callback(_end, worker)
                workers.append(worker)
            deadline = time.monotonic() + limit
            for worker in workers:
                _await_ready(worker, operation, deadline)
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write(b"go\n")
            return [_answer(worker, operation, deadline) for worker in workers]

    def count(self, operation: str, path: Path, **numbers: float) -> float:
        """One process that does something `count` times; returns how often a second."""
        done = self.work(operation, [path], **numbers)[0]
        if done.count != numbers["count"]:
            raise BenchError(f"{operation} did {done.count} of {numbers['count']:g} on {path}")
        return done.count / done.seconds


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout, worker.stderr):
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.close()


def _await_ready(worker: subprocess.Popen[bytes], operation: str, deadline: float) -> None:
    assert worker.stdout is not None
    there, _, _ = select.select([worker.stdout], [], [], max(0.0, deadline - time.monotonic()))
    if not there:
        raise BenchError(f"{operation} did not get ready in time")
    if worker.stdout.readline() != b"ready\n":
        _answer(worker, operation, deadline)


def _answer(worker: subprocess.Popen[bytes], operation: str, deadline: float) -> _Counted:
    try:
        said, complaint = worker.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise BenchError(f"{operation} did not end in time") from None
    if worker.returncode != 0:
        words = complaint.decode(errors="replace").strip().splitlines()
        raise BenchError(f"{words[-1][:300] if words else f'{operation} ended with {worker.returncode}'}")
    try:
        return msgspec.json.decode(said, type=_Counted)
    except msgspec.DecodeError as e:
        raise BenchError(f"{operation} gave no valid answer: {e}") from e


@dataclass(frozen=True, slots=True)
class Measure:
    """One row. `prepare` is done in a mount of its own, before; `take` gives the figure."""

    name: str
    what: str
    unit: str
    target: Target
    take: Callable[[_Run, Contender], float]
    prepare: Callable[[_Run, Contender], None] | None = None
    uses: str = ""  # the name of what `prepare` makes, shared with other measures
    uses_up: bool = False  # so that it is made again the next time
    against: str = PEER
    creates: Callable[[PosixPlan], int] = lambda _: 0  # files of up to 4 KiB that are there at once


def _rate(rw: str, name: str):
    def take(run: _Run, contender: Contender) -> float:
        return run.through(contender.place / name, rw, MB1).bytes_per_s / 1e6

    return take


def _write_new(run: _Run, contender: Contender) -> float:
    file = contender.place / "written"
    try:
        result = run.through(file, "write", MB1)
        if file.stat().st_size != run.plan.file:
            raise BenchError(f"{file} has {file.stat().st_size} bytes and not {run.plan.file}")
    finally:
        file.unlink(missing_ok=True)
    return result.bytes_per_s / 1e6


def _lay_out(name: str):
    def prepare(run: _Run, contender: Contender) -> None:
        file = contender.place / name
        file.unlink(missing_ok=True)
        run.through(file, "write", MB1)

    return prepare


def _iops(rw: str, name: str):
    def take(run: _Run, contender: Contender) -> float:
        return run.through(contender.place / name, rw, KB4, JOBS, timed=True).iops

    return take


def _seal(run: _Run, contender: Contender) -> None:
    contender.seal(run.value)


def _again(operation: str):
    def take(run: _Run, contender: Contender) -> float:
        done = run.work(operation, [contender.sealed], size=SEALED, seconds=run.plan.seconds)[0]
        return done.count * SEALED / done.seconds / 1e6

    return take


def _create(processes: int):
    def take(run: _Run, contender: Contender) -> float:
        paths = [contender.place / f"created-{i}" for i in range(processes)]
        done = run.work("create", paths, seconds=run.plan.seconds, count=run.plan.create_limit)
        for path, counted in zip(paths, done, strict=True):
            run.count("clear", path, count=counted.count, size=KB4)
        return sum(counted.count / counted.seconds for counted in done)

    return take


def _created(processes: int, what: str) -> Measure:
    return Measure(
        f"create-{processes}",
        what,
        "files/s",
        Target(4.0),
        _create(processes),
        creates=lambda p: p.create_limit * processes,
    )


def _many(run: _Run, contender: Contender) -> None:
    run.count("make", contender.place / "many", count=run.plan.files)


def _stat(run: _Run, contender: Contender) -> float:
    return run.count("stat", contender.place / "many", count=run.plan.files, seed=run.number + 1)


def _list(run: _Run, contender: Contender) -> float:
    return run.count("list", contender.place / "many", count=run.plan.files)


def _unlink(run: _Run, contender: Contender) -> float:
    rate = run.count("unlink", contender.place / "many", count=run.plan.files)
    (contender.place / "many").rmdir()  # which fails if anything is left
    return rate


MEASURES = (
    Measure("write-1m", "1 MiB sequential writes of a new file, fsync at its end", "MB/s", Target(3.0), _write_new),
    Measure(
        "read-1m",
        "1 MiB sequential reads of the whole file, cold",
        "MB/s",
        Target(1.5),
        _rate("read", "laid-out"),
        _lay_out("laid-out"),
        "laid-out",
    ),
    Measure(
        "read-4k",
        f"4 KiB random reads of it, cold, {JOBS} jobs",
        "IOPS",
        Target(1.2),
        _iops("randread", "laid-out"),
        _lay_out("laid-out"),
        "laid-out",
    ),
    Measure(
        "write-4k",
        f"4 KiB random writes over a new file of that size, {JOBS} jobs, fsync at their end",
        "IOPS",
        Target(5.0),
        _iops("randwrite", "overwritten"),
        _lay_out("overwritten"),
        "overwritten",
        uses_up=True,
    ),
    *(
        Measure(
            f"cached-{how}",
            what,
            "MB/s",
            Target(0.9),
            _again(how),
            _seal,
            "sealed",
            uses_up=True,  # a block may be evicted; who has it does nothing
            against=RAW,
        )
        for how, what in (
            ("read", f"read() of 128 KiB again and again, {SEALED >> 20} MiB in the page cache (kvfs: a sealed block)"),
            ("mmap", "the same bytes mapped, copied and unmapped again and again"),
        )
    ),
    _created(1, "create + write 4 KiB + close, 1 process"),
    _created(JOBS, f"the same, {JOBS} processes, a directory each"),
    *(
        Measure(name, what, unit, Target(2.0), take, _many, "many", uses_up=uses_up, creates=lambda p: p.files)
        for name, what, unit, take, uses_up in (
            ("stat", "stat of each file of a large directory, shuffled, cold", "files/s", _stat, False),
            ("readdir", "reading the names of that directory, cold", "names/s", _list, False),
            ("unlink", "unlink of each of its (empty) files", "files/s", _unlink, True),
        )
    ),
)


@dataclass(slots=True)
class _Taken:
    measure: Measure
    rounds: list[dict[str, float]] = field(default_factory=list[dict[str, float]])


def _settle(root: Path) -> bool:
    """Writes out what waits for this disk, so that nobody pays for another; drops the kernel's caches if it may."""
    output(["sync", "-f", str(root)], SYNC_S)
    try:
        DROP.write_text("3")
    except OSError:
        return False
    return True


def _one(run: _Run, measure: Measure, contender: Contender) -> float:
    there = (contender.name, measure.uses)
    if measure.prepare is not None and there not in run.made:
        with mounted(contender):
            measure.prepare(run, contender)
        run.made.add(there)
    with mounted(contender):
        _settle(run.root)
        figure = measure.take(run, contender)
    if measure.uses_up:
        run.made.discard(there)
    return figure


def _notes(plan: PosixPlan, contenders: list[str], fio: Fio | None, disk: str, dropped: bool) -> list[str]:
    notes = [
        f"{RAW}: a plain directory on the {disk} that the others store in, so the limit of what they could reach.",
        f"kvfs: {plan.memory >> 20} MiB of memory tier, defaults else; its store was written once before, like any but a new one."
        + (
            f" {PEER}: SQLite metadata, file storage, trash off, defaults else (300 MiB of buffers, a cache on disk)."
            if PEER in contenders
            else ""
        ),
        "Each measurement has a mount of its own, started for it; no other contender is mounted meanwhile.",
        "Cold: the mount is new, so its process and the kernel know nothing of its files; "
        + (f"{PEER}'s cache directory was removed; " if PEER in contenders else "")
        + (
            "the kernel's caches of the disk's file system were dropped before."
            if dropped
            else f"but the kernel's caches of the disk's file system may be warm (only root can drop them), which helps {RAW}"
            + (f" and {PEER}, whose server reads files through them." if PEER in contenders else ".")
        ),
    ]
    if fio:
        notes.append(f"fio: psync, O_DIRECT, a file of {plan.file >> 20} MiB; directories have {plan.files:,} files.")
    notes.append("A ratio is the median of the rounds' ratios; the contenders run in turn, in changing order.")
    return notes


def bench_posix(
    beside: Path, plan: PosixPlan, *, peer: bool, peer_program: Path | None = None, listen: Listener | None = None
) -> PosixReport:
    """Runs everything in a scratch directory in `beside`. BenchError if it cannot; Ctrl-C, SIGTERM and SIGHUP leave
    nothing behind and become KeyboardInterrupt. Only in the main thread."""
    listen = listen or Listener()
    fio = Fio.find(listen.command)
    measures = plan.measures
    names = [Kvfs.name, *([PEER] if peer else []), RAW]
    program = find_peer(peer_program) if peer else None
    where = machine(fio.version() if fio else "")
    listen.begin(3 + plan.rounds * len(measures) * len(names))
    with Interrupts() as interrupts, _directory(interrupts, beside, plan.needed(len(names))) as root:
        listen.step("preparing")
        value = root / "value"
        value.write_bytes(os.urandom(SEALED))
        contenders: list[Contender] = [
            Kvfs(root / "kvfs", interrupts, listen.command, store=plan.store, memory=plan.memory)
        ]
        version = ""
        if peer:
            if program is None:
                listen.say(f"No {PEER} here: installing {PACKAGE} from PyPI into {root}, to be removed at the end.")
                listen.step(f"installing {PACKAGE}")
                program = install_peer(root / "venv", listen.command)
            version = output([str(program), "--version"], SLACK_S, clean_environment()).decode(errors="replace").strip()
            contenders.append(JuiceFs(root / PEER, interrupts, listen.command, program=program))
        contenders.append(Ext4(root / RAW))
        run = _Run(plan, fio, listen, interrupts, root, value)
        listen.step("writing kvfs's store once")
        with mounted(contenders[0]) as place:
            write_once(place)
        dropped = _settle(root)
        disk = file_system(root)
        taken = [_Taken(measure) for measure in measures]
        for number in range(plan.rounds):
            run.number = number
            first = number % len(contenders)
            for one in taken:
                found: dict[str, float] = {}
                for contender in contenders[first:] + contenders[:first]:
                    listen.step(f"round {number + 1} of {plan.rounds}: {one.measure.name}, {contender.name}")
                    found[contender.name] = _one(run, one.measure, contender)
                one.rounds.append(found)
    rows: list[PosixRow] = [
        compare(t.measure.name, t.measure.what, t.measure.unit, t.measure.against, t.measure.target, t.rounds)
        for t in taken
    ]
    return PosixReport(
        where,
        plan.rounds,
        plan.seconds,
        plan.file,
        plan.files,
        version,
        disk,
        dropped,
        rows,
        _notes(plan, names, fio, disk, dropped),
    )


@contextlib.contextmanager
def _directory(interrupts: Interrupts, beside: Path, needed: int):
    """Made and removed without being interrupted in the middle of it."""
    with contextlib.ExitStack() as stack:
        with interrupts.held():
            root = stack.enter_context(scratch_directory(beside, needed))
        try:
            yield root
        finally:
            with interrupts.held():
                stack.close()
