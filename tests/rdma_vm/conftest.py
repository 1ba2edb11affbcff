"""All of it needs the virtual machine, and in_guest.py runs in it."""

from __future__ import annotations

import os

import pytest
import vm


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    if "KVFS_RDMA_VM" in os.environ:
        return
    try:
        vm.prepare()
    except vm.Unavailable as why:
        pytest.skip(f"no virtual machine with RDMA: {why}")
