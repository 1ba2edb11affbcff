"""3FS's own test of its Python interface (tests/fuse/usrbio.py of its source), from where HF3FS_USRBIO_TEST says it lies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from commands import run


@pytest.mark.timeout(600)
def test_3fs_tests_its_python_interface(directory: Path) -> None:
    """1.6 GB written through the mount and read in operations of 1 GiB, appending, sizes seen by stat, access rights."""
    program = os.environ.get("HF3FS_USRBIO_TEST")
    if program is None:
        pytest.skip("HF3FS_USRBIO_TEST names no copy of 3FS's tests/fuse/usrbio.py")
    place = directory / "mnt" / "t"
    place.mkdir()
    said = run(sys.executable, program, place, seconds=500)
    assert said.splitlines() == ["usrbio read test succeeded 10485760", "usrbio permission test succeeded"]
