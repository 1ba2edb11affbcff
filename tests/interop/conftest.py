"""`kvfs up` for the tests of this directory: a daemon with a mount, gone after each test whatever happened."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Up, kvfs

from kvfs.mount import service


@pytest.fixture
def up() -> Iterator[Up]:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse here")
    place = Path(tempfile.mkdtemp(prefix="kvfs-", dir="/var/tmp"))  # direct I/O, which tmpfs may lack
    directory = place / "kv"
    try:
        done = kvfs("up", "--dir", str(directory), "--size", "256M", "--detach")
        assert done.returncode == 0, done.stderr
        yield Up(directory)
    finally:
        kvfs("down", "--dir", str(directory))
        service.unmount(directory / "mnt")
        shutil.rmtree(place)
