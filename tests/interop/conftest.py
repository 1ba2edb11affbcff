"""`kvfs up` for the tests of this directory: a daemon with a mount, gone after each test whatever happened."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from running import Up

from commands import running_for_a_test


@pytest.fixture
def up() -> Iterator[Up]:
    with running_for_a_test("256M") as directory:
        yield Up(directory)
