"""All of it needs the virtual machine, and in_guest.py runs in it."""

from __future__ import annotations

import os
from typing import Final

import pytest
import vm
from budget import GUEST_S, Guest

INSIDE: Final = "KVFS_RDMA_VM" in os.environ
SLACK_S: Final = 60  # a test has longer than the machine, which says more when it is over

_guest = Guest()


@pytest.fixture(scope="session")
def guest() -> Guest:
    return _guest


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    if INSIDE:
        return
    try:
        vm.prepare()
    except vm.Unavailable as why:
        pytest.skip(f"no virtual machine with RDMA: {why}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INSIDE:
        return
    for item in items:
        item.add_marker(pytest.mark.timeout(GUEST_S + SLACK_S))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _guest.runs:
        terminalreporter.write_line(
            f"virtual machine: {', '.join(_guest.runs)}; {GUEST_S - _guest.left:.0f} of {GUEST_S:.0f} s"
        )
