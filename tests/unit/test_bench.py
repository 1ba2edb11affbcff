"""`kvfs bench`: how rows are judged, what ring_bench refuses, and one small run of everything."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("kvfs_usrbio._native", reason="the native modules are not built")

from kvfs_tools.bench.measure import Plan
from kvfs_tools.bench.programs import ring_bench_path
from kvfs_tools.bench.report import Target, summarise


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    row = summarise("n", "w", "u", "fio", Target(0.95), [(10.0, 10.0), (50.0, 100.0), (20.0, 10.0)])
    assert (row.ours, row.other, row.ratio, row.verdict) == (20.0, 10.0, 1.0, "pass")


@pytest.mark.parametrize(
    ("target", "ours", "other", "verdict"),
    [
        (Target(0.95), 94.0, 100.0, "short"),
        (Target(1.0, at_most=True), 99.0, 100.0, "pass"),
        (Target(1.0, at_most=True), 101.0, 100.0, "short"),
        (Target(150e3, absolute=True), 149e3, None, "short"),
        (Target(150e3, absolute=True), 150e3, None, "pass"),
        (Target(0.95), 94.0, None, "no fio"),
    ],
)
def test_verdicts(target: Target, ours: float, other: float | None, verdict: str) -> None:
    assert summarise("n", "w", "u", "", target, [(ours, other)]).verdict == verdict


def test_a_plan_that_measures_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        Plan(rounds=0)
    with pytest.raises(ValueError, match="some time"):
        Plan(seconds=0.0)
    with pytest.raises(ValueError, match="at least 512 MiB"):
        Plan(store=1 << 20)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["/no/such/socket", "a/b"], 1, "/no/such/socket: No such file"),
        (["socket"], 2, "a socket and a namespace"),
        (["socket", "a/b", "--op", "dance"], 2, "--op is get"),
        (["socket", "a/b", "--depth", "0"], 2, "--depth is 1 to 1024"),
        (["socket", "a/b", "--size", "17M"], 2, "--size is 8 to 16M"),
        (["socket", "a/b", "--depth", "4", "--reap", "5"], 2, "--reap is 1 to DEPTH"),
        (["socket", "f", "--op", "read", "--size", "100"], 2, "multiples of 4096"),
    ],
)
def test_ring_bench_refuses(arguments: list[str], code: int, says: str) -> None:
    done = subprocess.run([ring_bench_path(), *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == code
    assert says in done.stderr.splitlines()[0]
    assert done.stdout == ""


@pytest.mark.timeout(300)
def test_a_small_run_measures_every_row_and_leaves_nothing(tmp_path: Path) -> None:
    directory = str(tmp_path / "not" / "made" / "kv")
    command = [sys.executable, "-m", "kvfs", "bench", "--dir", directory, "--json", "--verbose"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--seconds", "0.1", "--size", "512M", "--memory", "64M"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {
        "read-64", "read-64-cpu", "read-1", "read-file", "memory-64", "memory-1", "get-1m", "put-1m", "put-durable"
    }  # fmt: skip
    for row in rows.values():
        assert row["ours"] > 0
        compared = bool(row["against"]) and shutil.which("fio") is not None
        assert (row["ratio"] is not None) == compared
    assert "ring_bench" in done.stderr  # the commands, so that anybody can repeat them
    assert os.listdir(tmp_path) == []
