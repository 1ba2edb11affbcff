"""A real node and mount in a subprocess of the test, and what the tests of the mount have in common."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from kvfs.mount import service

DAEMON = Path(__file__).with_name("daemon.py")
START_S = 20
STOP_S = 20


def fails(code: int) -> AbstractContextManager[object]:
    """The block raises an OSError with this errno."""

    @contextmanager
    def check() -> Generator[None]:
        with pytest.raises(OSError, match="Errno") as raised:
            yield
        assert raised.value.errno == code, raised.value

    return check()


class Mounted:
    """`root` is the mount; `stop`, `kill` and `start` are for tests of what survives."""

    def __init__(
        self, directory: Path, environment: Mapping[str, str] | None = None, wrapper: Sequence[str] = ()
    ) -> None:
        """The daemon runs with `environment` added to ours, as argument of the program `wrapper`."""
        self.directory = directory
        self.environment = environment or {}
        self.wrapper = wrapper
        self.root = directory / "mnt"
        self.data = directory / "data"
        self.log = directory / "log"
        self.data.mkdir()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """After a kill the kernel may hold the store's lock a little longer, until it has ended the killed one's I/O."""
        until = time.monotonic() + START_S
        while not self._start() and time.monotonic() < until:
            assert "in use by another process" in self.log.read_text(), self.log.read_text()
            time.sleep(0.1)
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()

    def _start(self) -> bool:
        search = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": search, **self.environment}
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [*self.wrapper, sys.executable, str(DAEMON), str(self.data), str(self.root)],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        self.process = process
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_S)
        if ready and process.stdout.readline() == b"mounted\n":
            return True
        process.kill()
        process.wait(STOP_S)
        process.stdout.close()
        return False

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(STOP_S)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_S)
        self.wait_dead()

    def kill_under(self, program: str, directory: Path, seconds: float) -> list[int]:
        """Runs a writer that prints a number after each step, and kills the daemon `seconds` after the first; the numbers."""
        writer = subprocess.Popen(
            [sys.executable, program, directory], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert writer.stdout is not None
            reported = [int(writer.stdout.readline())]
            killer = threading.Timer(seconds, self.kill)
            killer.start()
            reported += [int(line) for line in writer.stdout]
            killer.join()
            return reported
        finally:
            writer.kill()
            writer.communicate(timeout=20)

    def wait_dead(self) -> None:
        """The kernel ends the connection of a killed daemon a moment after the process; calls until then wait for it."""
        end = time.monotonic() + STOP_S
        while time.monotonic() < end:
            try:
                os.statvfs(self.root)  # never answered from a cache
            except OSError as error:
                if error.errno == errno.ENOTCONN:
                    return
                if error.errno != errno.ECONNABORTED:
                    raise
            else:
                return  # unmounted
        raise AssertionError("the dead mount does not answer")

    def clean(self) -> None:
        try:
            if self.process is not None and self.process.poll() is None:
                self.process.terminate()
                try:
                    self.process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    self.kill()
        finally:
            service.unmount(self.root)
            if self.process is not None and self.process.stdout is not None:
                self.process.stdout.close()


@contextmanager
def mounting(
    directory: Path, environment: Mapping[str, str] | None = None, wrapper: Sequence[str] = ()
) -> Generator[Mounted]:
    """Gone afterwards whatever happened. Skips the test where there is no FUSE."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse here")
    mounted = Mounted(directory, environment, wrapper)
    try:
        mounted.start()
        yield mounted
    finally:
        mounted.clean()
