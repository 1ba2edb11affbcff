"""The data directory that is measured: a new one beside the user's, with a daemon of its own, removed at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import msgspec

from kvfs import daemon
from kvfs_tools.bench.programs import BenchError

PREFIX = "kvfs-bench-"
FILLED = 0.9  # of the store, before anything is measured
FILL = bytes(range(256)) * 4096
COMMAND_S = 150


class Scratch:
    """One data directory; `up` and `down` may alternate."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layout = daemon.Layout(root / "data")
        self.mount = root / "data" / "mnt"
        self.fio_file = root / "fio"

    def up(self, *, size: int, memory: int) -> int:
        """Starts the daemon; returns its process id."""
        self._kvfs("up", "--size", str(size), "--memory", str(memory), "--detach")
        return self.status().pid

    def down(self) -> None:
        self._kvfs("down")

    def status(self) -> daemon.StatusReport:
        try:
            status = daemon.ask(self.layout.root, "status").status
        except daemon.DaemonError as e:
            raise BenchError(str(e)) from e
        if status is None:
            raise BenchError("the bench's daemon gave no status")
        return status

    def _kvfs(self, command: str, *options: str) -> None:
        line = [sys.executable, "-m", "kvfs", command, "--dir", str(self.layout.root), *options]
        # The user's own settings are not the bench's.
        environ = {k: v for k, v in os.environ.items() if not k.startswith("KVFS_")}
        try:
            done = subprocess.run(
                line, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_S, check=False, env=environ
            )
        except subprocess.TimeoutExpired:
            raise BenchError(f"`kvfs {command}` did not end within {COMMAND_S} s") from None
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise BenchError(said[-1].removeprefix("kvfs: ") if said else f"`kvfs {command}` failed")


@contextlib.contextmanager
def scratch_directory(beside: Path, needed: int) -> Generator[Path]:
    """A new directory in `beside`, or its nearest parent there is; it and every mount in it are gone afterwards.

    BenchError unless `needed` bytes are free there.
    """
    while not beside.exists():  # as where nothing was ever stored
        beside = beside.parent
    try:
        free = shutil.disk_usage(beside).free
        if free < needed:
            raise BenchError(f"{beside} has {free / 1e9:.1f} GB free, the bench needs {needed / 1e9:.1f} GB")
        root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=beside))
    except OSError as e:
        raise BenchError(f"no scratch directory can be made in {beside}: {e.strerror}") from e
    try:
        yield root
    finally:
        _remove(root)


@contextlib.contextmanager
def scratch(beside: Path, needed: int) -> Generator[Scratch]:
    """A Scratch in a new directory; its daemon is ended with it."""
    with scratch_directory(beside, needed) as root:
        made = Scratch(root)
        try:
            yield made
        finally:
            with contextlib.suppress(BenchError):
                made.down()


def _remove(root: Path) -> None:
    """Unless something is still mounted in it: then the mount is taken away first."""
    from kvfs.mount import service

    for name in os.listdir(root):
        point = root / name / "mnt"
        service.unmount(point)
        if service.is_mounted(point):
            raise BenchError(f"{point} is still mounted; unmount it and remove {root}")
    shutil.rmtree(root, ignore_errors=True)


def write_once(mount: Path) -> None:
    """Brings a new store into the state of one that has been in use: on a fresh file the disk's file system has to mark every
    extent as written, which it does once and slowly."""
    file = mount / "fill"
    with open(file, "wb", buffering=0) as out:
        space = os.statvfs(mount)
        left = int(space.f_bavail * space.f_frsize * FILLED)
        while left > 0:
            left -= out.write(memoryview(FILL)[: min(left, len(FILL))])
        os.fsync(out.fileno())
        file.unlink()


def file_system(path: Path) -> str:
    """The type of the file system that holds it."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            if line.split(" ", 3)[2] == wanted:
                return line.split(" - ", 1)[1].split(" ", 1)[0]
    return "file system"  # one whose st_dev is not in the table, such as btrfs's subvolumes


class Machine(msgspec.Struct, frozen=True):
    """Where the figures come from."""

    cpus: int
    kernel: str
    load: float  # runnable processes, one-minute mean, when the bench began
    fio: str  # version, or empty


def machine(fio: str) -> Machine:
    return Machine(len(os.sched_getaffinity(0)), os.uname().release, os.getloadavg()[0], fio)
