"""RDMA between real (soft-RoCE) devices, in a virtual machine: `make test-rdma`."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import vm

BUILD = Path(os.environ.get("KVFS_NATIVE_BUILD", vm.REPOSITORY / "build" / "native"))


def passed(output: str) -> int:
    found = re.search(r"\[  PASSED  \] (\d+) tests?\.", output)
    return int(found[1]) if found is not None and "[  SKIPPED ]" not in output else 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "least"), [("rdma_test", 6), ("rdma_failure_test", 6), ("rdma_node_test", 3)])
def test_native(name: str, least: int) -> None:
    outcome = vm.run([str(BUILD / name), "--gtest_brief=1"], timeout=280)
    assert outcome.status == 0, outcome.output + outcome.console
    assert passed(outcome.output) >= least, f"all of it ran and nothing was skipped\n{outcome.output}"


@pytest.mark.timeout(300)
def test_bandwidth_beside_perftest(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints a table; whether it is fast is for who reads it: the machine is emulated."""
    script = Path(__file__).with_name("bandwidth.sh")
    outcome = vm.run(["bash", str(script), str(BUILD / "rdma_bench")], timeout=280)
    assert outcome.status == 0, outcome.output + outcome.console
    figures: dict[tuple[str, int], list[float]] = {}
    for line in outcome.output.splitlines():
        what, size, value = shlex.split(line)
        figures.setdefault((what, int(size)), []).append(float(value))
    assert {what for what, _ in figures} == {"kvfs", "ib_write_bw", "ib_read_bw"}, outcome.output
    with capsys.disabled():
        print()
        for size in sorted({size for _, size in figures}):
            medians = {what: sorted(values)[len(values) // 2] for (what, s), values in figures.items() if s == size}
            ratios = " ".join(
                f"{medians['kvfs'] / medians[peer]:.2f} of {peer}" for peer in ("ib_write_bw", "ib_read_bw")
            )
            print(f"{size >> 10} KiB gets, depth 16: {medians['kvfs']:.1f} MB/s, {ratios}")
