"""How tests wait for what takes a while elsewhere."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


def wait_for(true: Callable[[], object], seconds: float, what: str = "", pause: float = 0.05) -> None:
    """`what`: said if it does not become true in time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what or 'what was waited for'}"
        time.sleep(pause)


def freeze(pid: int) -> None:
    """Stops all threads of a process, and returns once they have noticed."""
    os.kill(pid, signal.SIGSTOP)
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    wait_for(lambda: all((t / "stat").read_text().rpartition(")")[2].split()[0] == "T" for t in tasks), 20, pause=0.001)
