"""A chunk server, stores and mounts over RDMA, in the virtual machine: what is tested is in in_guest.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from budget import Guest

TESTS = 6


def test_kvfs_over_two_rails(guest: Guest) -> None:
    script = Path(__file__).with_name("in_guest.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--durations=0", "--timeout=200"]
    output = guest.run("kvfs", {"kvfs": [*command, str(script)]}, memory="3G")["kvfs"].text()
    found = re.search(r"^(\d+) passed in", output, re.MULTILINE)
    assert found is not None, output
    assert int(found[1]) == TESTS, f"all of it ran and nothing was skipped\n{output}"
