"""`kvfs` commands without starting Python anew, which takes most of a test's time in an emulated machine: a process that has loaded
all of kvfs forks one for each.

    python starter.py    reads {"argv": [...], "log": PATH, "environment": {...}}, a line each; answers each with a process id

Who uses it collects what has ended: the processes are its children.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

PR_SET_CHILD_SUBREAPER: Final = 36


class Forked:
    """As much of subprocess.Popen as tests use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Starter:
    """Ends with the process that made it."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, argv: Sequence[str | Path], log: Path) -> Forked:
        """`kvfs` with these arguments, and this process's environment as it is now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"argv": [os.fspath(a) for a in argv], "log": str(log), "environment": dict(os.environ)}
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        return Forked(int(self._process.stdout.readline()))

    def end(self) -> None:
        self._process.kill()
        self._process.wait(30)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _load() -> None:
    import kvfs

    for module in pkgutil.walk_packages(kvfs.__path__, "kvfs."):
        if module.name != "kvfs.__main__":
            importlib.import_module(module.name)


def _become(asked: dict[str, Any]) -> None:
    from kvfs.cli import main

    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for fd, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(fd, place)
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = ["kvfs", *asked["argv"]]
    main()


def _serve() -> None:
    _load()
    told, tells = os.pipe()
    for line in sys.stdin.buffer:
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child == 0:
                _become(json.loads(line))
                sys.exit(0)
            os.write(tells, b"%d\n" % child)
            os._exit(0)
        os.waitpid(between, 0)  # from now on it is the child of whom it should be
        os.write(1, os.read(told, 64))


if __name__ == "__main__":
    _serve()
