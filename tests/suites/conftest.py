"""A real `kvfs up` for each suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import kvfs, running

SIZE = "2G"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A data directory with a daemon, mounted at its `mnt`."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("the suites need root and /dev/fuse")
    with running(tmp_path / "kv", "--size", SIZE) as place:
        yield place


@pytest.fixture
def root(directory: Path) -> Iterator[Path]:
    """A directory on the mount; after the test the daemon is stopped and its data checked."""
    work = directory / "mnt" / "w"
    work.mkdir()
    yield work
    kvfs("down", "--dir", directory)
    assert kvfs("fsck", directory, "--data", seconds=300).endswith("clean\n")
