"""A client in steady state makes next to no system call per I/O, counted by strace."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import Up

pytestmark = pytest.mark.timeout(120)

ROUNDS = 400
DEPTH = 64
# Exits without the interpreter's own tidying up, so that the calls before and after the loop are the same for all counts.
CLIENT = """
import os, sys
from kvfs_usrbio import BlockStore

rounds = int(sys.argv[2])
store = BlockStore.open(sys.argv[1], "syscalls")
buffer = store.alloc(64 * 4096)
keys = [b"%d" % i for i in range(64)]
store.put_from(keys, buffer, 4096)
for _ in range(rounds):
    assert store.get_into(keys, buffer, 4096) == [4096] * 64
os._exit(0)
"""


def calls(up: Up, rounds: int, out: Path) -> int:
    """System calls of the whole client."""
    done = subprocess.run(
        ["strace", "-f", "-c", "-o", str(out), sys.executable, "-c", CLIENT, str(up.mount), str(rounds)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if "ptrace" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    total = re.search(r"^\s*100\.00\s+\S+\s+(?:\S+\s+)?(\d+)\s+(?:\d+\s+)?total$", out.read_text(), re.MULTILINE)
    assert total is not None, out.read_text()
    return int(total[1])


def test_system_calls_per_io(up: Up, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    few, many = calls(up, 1, tmp_path / "few"), calls(up, 1 + ROUNDS, tmp_path / "many")
    per_io = (many - few) / (ROUNDS * DEPTH)
    print(f"{per_io:.4f} system calls per I/O")
    assert per_io < 0.2, (tmp_path / "many").read_text()
