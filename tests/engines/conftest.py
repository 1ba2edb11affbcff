"""`kvfs up` for other projects' programs, which run in environments of their own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import running


@pytest.fixture
def directory() -> Iterator[Path]:
    """A data directory with a daemon, mounted at its `mnt`; gone after each test whatever happened."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse here")
    place = Path(tempfile.mkdtemp(prefix="kvfs-", dir="/var/tmp"))  # direct I/O, which tmpfs may lack
    try:
        with running(place / "kv", "--size", "3G") as data:
            yield data
    finally:
        shutil.rmtree(place)
