"""A chunk server, stores and mounts over RDMA, in the virtual machine: what is tested is in in_guest.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import vm

TESTS = 5


@pytest.mark.timeout(480)
def test_kvfs_over_two_rails() -> None:
    script = Path(__file__).with_name("in_guest.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "--durations=0",
        "--timeout=200",
        str(script),
    ]
    outcome = vm.run(command, timeout=470, memory="3G")
    assert outcome.status == 0, outcome.output + outcome.console
    found = re.search(r"^(\d+) passed in", outcome.output, re.MULTILINE)
    assert found is not None, outcome.output
    assert int(found[1]) == TESTS, f"all of it ran and nothing was skipped\n{outcome.output}"
