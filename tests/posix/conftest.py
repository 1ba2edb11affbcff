"""A real mount for each test, gone after it whatever happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_process import Mounted, mounting


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounted]:
    with mounting(tmp_path) as mounted:
        yield mounted
