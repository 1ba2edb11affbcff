"""A real mount for each test, gone after it whatever happened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_process import Mounted


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounted]:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse here")
    mounted = Mounted(tmp_path)
    try:
        mounted.start()
        yield mounted
    finally:
        mounted.clean()
