"""Other programs and the `kvfs` command as tests run them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kvfs.mount import service
from waiting import freeze, wait_for

KVFS = (sys.executable, "-m", "kvfs")


def attempt(
    *command: str | Path,
    data: bytes | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    user: str | None = None,
    seconds: float = 60,
) -> subprocess.CompletedProcess[bytes]:
    """Runs it to its end, whatever that is; `environment` is added to this process's."""
    return subprocess.run(
        command,
        input=b"" if data is None else data,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        timeout=seconds,
        check=False,
    )


def run(
    *command: str | Path,
    data: bytes | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    user: str | None = None,
    seconds: float = 60,
) -> str:
    """What it printed; it must end with 0."""
    done = attempt(*command, data=data, cwd=cwd, environment=environment, user=user, seconds=seconds)
    out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    assert done.returncode == 0, (command, done.returncode, out[-3000:], err[-3000:])
    return out


def kvfs(*options: str | Path, data: bytes | None = None, seconds: float = 60) -> str:
    return run(*KVFS, *options, data=data, seconds=seconds)


def attempt_kvfs(
    *options: str | Path, data: bytes | None = None, seconds: float = 60
) -> subprocess.CompletedProcess[bytes]:
    return attempt(*KVFS, *options, data=data, seconds=seconds)


@contextmanager
def running(directory: Path, *options: str) -> Generator[Path]:
    """`kvfs up` of this data directory, mounted at its `mnt`; neither is there afterwards."""
    try:
        kvfs("up", "--dir", directory, *options, "--detach")
        yield directory
    finally:
        attempt_kvfs("down", "--dir", directory)
        service.unmount(directory / "mnt")


@contextmanager
def running_for_a_test(size: str) -> Generator[Path]:
    """`running` with a new store, of which nothing is left afterwards; skips the test where nothing can be mounted."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse here")
    place = Path(tempfile.mkdtemp(prefix="kvfs-", dir="/var/tmp"))  # direct I/O, which tmpfs may lack
    try:
        with running(place / "kv", "--size", size) as directory:
            yield directory
    finally:
        shutil.rmtree(place)


def kill_daemon(directory: Path) -> None:
    """SIGKILL for the daemon of this data directory, and a wait for its end."""
    pid = int(json.loads(kvfs("status", "--dir", directory, "--json"))["pid"])
    os.kill(pid, signal.SIGKILL)
    wait_gone(pid)


@contextmanager
def stopped(directory: Path) -> Generator[int]:
    """Its daemon, of which this is the process, hangs meanwhile: none of its threads runs."""
    pid = int(json.loads(kvfs("status", "--dir", directory, "--json"))["pid"])
    try:
        freeze(pid)
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def wait_gone(pid: int, seconds: float = 30) -> None:
    """Until a process that is not this one's child has ended; a zombie that nobody collects counts as ended."""

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_for(gone, seconds, f"process {pid} has ended", pause=0.02)
