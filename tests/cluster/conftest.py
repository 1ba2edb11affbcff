"""One cluster of one server and one of three for the tests of a module that leave their servers as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import Cluster, cluster


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    with cluster(3) as made:
        yield made


@pytest.fixture
def one() -> Iterator[Cluster]:
    with cluster(1) as made:
        yield made
