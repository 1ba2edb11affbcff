"""A directory of 20,000 entries; tests/suites has it with 200,000."""

from __future__ import annotations

import pytest
from mount_process import Mounted

from listing import listed_under_change, removed_while_listed

pytestmark = pytest.mark.timeout(120)

ENTRIES = 20_000


def test_listings_lose_and_double_nothing_while_others_change_it(mounted: Mounted) -> None:
    listed_under_change(mounted.root / "d", ENTRIES, rounds=8)
    assert removed_while_listed(mounted.root / "d") > ENTRIES
