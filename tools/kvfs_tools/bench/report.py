"""What the bench found: rows of medians with targets, and whether each is reached."""

from __future__ import annotations

import statistics
from typing import Literal

import msgspec

from kvfs_tools.bench.scratch import Machine

Verdict = Literal["pass", "short", "no fio", "no peer"]


class Target(msgspec.Struct, frozen=True):
    """Of `ratio` (ours over the other's), or of ours alone where there is no other."""

    value: float
    at_most: bool = False
    absolute: bool = False

    def reached(self, found: float) -> bool:
        return found <= self.value if self.at_most else found >= self.value


class Row(msgspec.Struct, frozen=True):
    """One measure over all rounds."""

    name: str
    what: str
    unit: str
    against: str  # what the other number is; empty where there is none
    ours: float  # median
    other: float | None  # median
    ratio: float | None  # median of the rounds' ratios
    target: Target
    verdict: Verdict
    rounds: list[tuple[float, float | None]]
    note: str = ""


class Report(msgspec.Struct, frozen=True):
    machine: Machine
    rounds: int
    seconds: float
    store_bytes: int
    rows: list[Row]
    notes: list[str]

    @property
    def short(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == "short"]


def summarise(
    name: str,
    what: str,
    unit: str,
    against: str,
    target: Target,
    rounds: list[tuple[float, float | None]],
    note: str = "",
) -> Row:
    ours = statistics.median(mine for mine, _ in rounds)
    pairs = [(mine, other) for mine, other in rounds if other is not None]
    other = statistics.median(o for _, o in pairs) if pairs else None
    ratio = statistics.median(mine / o if o else 0.0 for mine, o in pairs) if pairs else None
    judged = ours if target.absolute else ratio
    verdict: Verdict = "no fio" if judged is None else "pass" if target.reached(judged) else "short"
    return Row(name, what, unit, against, ours, other, ratio, target, verdict, rounds, note)


class PosixRow(msgspec.Struct, frozen=True):
    """One measure of the mount over all rounds."""

    name: str
    what: str
    unit: str
    against: str  # whom the target is about
    medians: dict[str, float]  # by contender
    ratios: dict[str, float]  # kvfs over each other: medians of the rounds' ratios
    target: Target
    verdict: Verdict
    rounds: list[dict[str, float]]


class PosixReport(msgspec.Struct, frozen=True):
    machine: Machine
    rounds: int
    seconds: float
    file_bytes: int
    files: int
    peer: str  # its version, or empty
    file_system: str  # of the disk
    caches_dropped: bool
    rows: list[PosixRow]
    notes: list[str]

    @property
    def short(self) -> list[PosixRow]:
        return [row for row in self.rows if row.verdict == "short"]


def compare(
    name: str, what: str, unit: str, against: str, target: Target, rounds: list[dict[str, float]], ours: str = "kvfs"
) -> PosixRow:
    medians = {who: statistics.median(found[who] for found in rounds) for who in rounds[0]}
    ratios = {
        who: statistics.median(found[ours] / found[who] if found[who] else 0.0 for found in rounds)
        for who in medians
        if who != ours
    }
    verdict: Verdict = "no peer" if against not in ratios else "pass" if target.reached(ratios[against]) else "short"
    return PosixRow(name, what, unit, against, medians, ratios, target, verdict, rounds)
