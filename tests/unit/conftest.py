"""A node to talk to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from node_process import DAEMON, Daemon, end, python


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    process = python(DAEMON, tmp_path)
    try:
        yield Daemon(tmp_path, process)
    finally:
        end(process)
