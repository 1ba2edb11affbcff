"""`kvfs up` for engines, which run in environments of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import running_for_a_test


@pytest.fixture
def directory() -> Iterator[Path]:
    """A data directory with a daemon; gone after each test whatever happened."""
    with running_for_a_test("512M") as data:
        yield data
