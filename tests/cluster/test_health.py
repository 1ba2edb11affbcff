"""What /healthz says while a device's thread hangs: the thread alone is stopped, as a debugger does it."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import Server, cluster

from kvfs.cluster.admin import HEALTH_S
from kvfs_usrbio import BlockStore

SLACK = 3.0
SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17
WALL = 0x40000000  # threads, too


def of_devices(server: Server) -> list[int]:
    """The threads that are pinned to CPU 0, as the devices' are."""
    assert server.process is not None
    found: list[int] = []
    for task in Path(f"/proc/{server.process.pid}/task").iterdir():
        status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        if status["Cpus_allowed_list"] == "0" and not status["Name"].startswith("iou-"):  # the kernel's own
            found.append(int(task.name))
    return found


@contextmanager
def stopped(thread: int) -> Generator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(SEIZE, thread, None, None) != 0:
        pytest.skip(f"no thread may be stopped here: {os.strerror(ctypes.get_errno())}")
    try:
        assert libc.ptrace(INTERRUPT, thread, None, None) == 0
        os.waitpid(thread, WALL)
        yield
    finally:
        assert libc.ptrace(DETACH, thread, None, None) == 0


def test_a_device_that_hangs_is_seen_in_time_and_so_is_its_return() -> None:
    if os.cpu_count() == 1:
        pytest.skip("with one CPU a device's thread looks like all others")
    with cluster(1, more="cpus = [0]\n") as made:
        server = made.servers[0]
        threads = of_devices(server)
        assert len(threads) == 1
        assert server.page("/healthz") == (200, "ok\n")
        with stopped(threads[0]):
            for path in ("/healthz", "/metrics"):
                begin = time.monotonic()
                assert server.page(path) == (503, "a target does not answer\n")
                assert HEALTH_S - 0.5 < time.monotonic() - begin < HEALTH_S + SLACK
            begin = time.monotonic()
            assert server.page("/readyz") == (200, "ready\n"), "clients can connect, though not be served"
            assert time.monotonic() - begin < SLACK
        deadline = time.monotonic() + HEALTH_S + SLACK
        while server.page("/healthz") != (200, "ok\n"):
            assert time.monotonic() < deadline
        assert server.metric("kvfs_target_turns_total") > 0
        with BlockStore.open(made.url("cache"), token=made.token("cache:rw")) as store:
            assert store.put([b"after"], [b"value"]) == [1]
        assert server.stop() == 0
