"""`kvfs up` for the tests of this directory: a daemon with a mount, gone after each test whatever happened."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Up

from commands import running


@pytest.fixture
def up() -> Iterator[Up]:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse here")
    place = Path(tempfile.mkdtemp(prefix="kvfs-", dir="/var/tmp"))  # direct I/O, which tmpfs may lack
    try:
        with running(place / "kv", "--size", "256M") as directory:
            yield Up(directory)
    finally:
        shutil.rmtree(place)
