"""A real `kvfs up` for each suite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import kvfs

SIZE = "2G"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A data directory with a daemon, mounted at its `mnt`."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("the suites need root and /dev/fuse")
    data = tmp_path / "kv"
    kvfs("up", "--dir", data, "--size", SIZE, "--detach")
    try:
        yield data
    finally:
        subprocess.run([sys.executable, "-m", "kvfs", "down", "--dir", data], capture_output=True, check=False)
        subprocess.run(["fusermount3", "-uz", data / "mnt"], capture_output=True, check=False)


@pytest.fixture
def root(directory: Path) -> Iterator[Path]:
    """A directory on the mount; after the test the daemon is stopped and its data checked."""
    work = directory / "mnt" / "w"
    work.mkdir()
    yield work
    kvfs("down", "--dir", directory)
    assert kvfs("fsck", directory, "--data", seconds=300).endswith("clean\n")
