"""`kvfs up` for other projects' programs, which run in environments of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import running_for_a_test


@pytest.fixture
def directory() -> Iterator[Path]:
    """A data directory with a daemon, mounted at its `mnt`; gone after each test whatever happened."""
    with running_for_a_test("3G") as data:
        yield data
