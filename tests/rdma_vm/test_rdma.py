"""RDMA between real (soft-RoCE) devices, in a virtual machine: `make test-rdma`."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import vm
from budget import Done, Guest

BUILD = Path(os.environ.get("KVFS_NATIVE_BUILD", vm.REPOSITORY / "build" / "native"))
LEAST = {"rdma_test": 6, "rdma_failure_test": 6, "rdma_node_test": 3}
"""Tests that each has, at least."""
ROUNDS = 1  # of each measurement


@pytest.fixture(scope="module")
def native(guest: Guest) -> dict[str, Done]:
    """All of it in one boot, which takes as long as many a test."""
    commands = {name: [str(BUILD / name), "--gtest_brief=1"] for name in LEAST}
    script = Path(__file__).with_name("bandwidth.sh")
    commands["bandwidth"] = ["bash", str(script), str(BUILD / "rdma_bench"), str(ROUNDS)]
    return guest.run("native", commands)


def passed(output: str) -> int:
    found = re.search(r"\[  PASSED  \] (\d+) tests?\.", output)
    return int(found[1]) if found is not None and "[  SKIPPED ]" not in output else 0


@pytest.mark.parametrize("name", LEAST)
def test_native(native: dict[str, Done], name: str) -> None:
    output = native[name].text()
    assert passed(output) >= LEAST[name], f"all of it ran and nothing was skipped\n{output}"


def test_bandwidth_beside_perftest(native: dict[str, Done], capsys: pytest.CaptureFixture[str]) -> None:
    """Prints a table; whether it is fast is for who reads it: the machine is emulated."""
    figures: dict[tuple[str, int], list[float]] = {}
    output = native["bandwidth"].text()
    for line in output.splitlines():
        what, size, value = shlex.split(line)
        figures.setdefault((what, int(size)), []).append(float(value))
    assert {what for what, _ in figures} == {"kvfs", "ib_write_bw", "ib_read_bw"}, output
    with capsys.disabled():
        print()
        for size in sorted({size for _, size in figures}):
            medians = {what: sorted(values)[len(values) // 2] for (what, s), values in figures.items() if s == size}
            ratios = " ".join(
                f"{medians['kvfs'] / medians[peer]:.2f} of {peer}" for peer in ("ib_write_bw", "ib_read_bw")
            )
            print(f"{size >> 10} KiB gets, depth 16: {medians['kvfs']:.1f} MB/s, {ratios}")
