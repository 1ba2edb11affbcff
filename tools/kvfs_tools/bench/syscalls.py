"""System calls per get, of the client's process and the server's apart, over the ring, over TCP on loopback and through
shared memory:

    python -m kvfs_tools.bench.syscalls [DIRECTORY]

One process at a time runs under `strace -f -c`. Two numbers of gets are counted, so that what a process does once cancels out; all
blocks come from memory. Prints a table row for each size and batch, and the commonest calls. DIRECTORY: of the scratch files.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvfs_tools.bench.chunkserver import ChunkServer, Workers
from kvfs_tools.bench.measure import KB4, MB1
from kvfs_tools.bench.programs import BenchError, output
from kvfs_tools.bench.scratch import scratch_directory

STORE: Final = 1 << 30
MEMORY: Final = 768 << 20
RUN_S: Final = 120.0
ATTACH_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Case:
    size: int
    batch: int
    few: int
    many: int

    @property
    def what(self) -> str:
        size = f"{self.size >> 10} KiB" if self.size < MB1 else f"{self.size >> 20} MiB"
        return f"{size}, batches of {self.batch}" if self.batch > 1 else f"{size}, one at a time"


CASES: Final = (Case(KB4, 64, 4096, 16384), Case(KB4, 1, 1024, 5120), Case(MB1, 64, 64, 320), Case(MB1, 1, 64, 320))


def _strace() -> str:
    found = shutil.which("strace")
    if found is None:
        raise BenchError("strace is not installed: apt-get install strace")
    return found


def _counted(summary: Path) -> Counter[str]:
    """Of `strace -c`: calls by name."""
    found: Counter[str] = Counter()
    for line in summary.read_text().splitlines():
        fields = line.split()
        if len(fields) >= 5 and fields[3].isdigit() and fields[-1] != "total":
            found[fields[-1]] += int(fields[3])
    if not found:
        raise BenchError("strace counted nothing: may it trace here?")
    return found


@contextlib.contextmanager
def _traced(process: int, summary: Path) -> Generator[None]:
    """All threads of a process that runs."""
    command = [_strace(), "-f", "-c", "-o", str(summary), "-p", str(process)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True) as tracer:
        assert tracer.stderr is not None
        try:
            if b"attached" not in tracer.stderr.readline():
                raise BenchError("strace may not trace here")
            yield
        finally:
            tracer.send_signal(signal.SIGINT)
            try:
                tracer.wait(ATTACH_S)
            except subprocess.TimeoutExpired:
                tracer.kill()


@dataclass(frozen=True, slots=True)
class Side:
    """A server, and how its clients are started."""

    workers: Workers
    server: int
    remote: bool
    shm: bool
    root: Path

    def client_calls(self, case: Case, gets: int) -> Counter[str]:
        summary = self.root / "client.strace"
        command = self.workers.command("get", case.size, gets, batch=case.batch, remote=self.remote)
        output([_strace(), "-f", "-c", "-o", str(summary), *command], RUN_S, self.workers.environment(self.shm))
        return _counted(summary)

    def server_calls(self, case: Case, gets: int) -> Counter[str]:
        summary = self.root / "server.strace"
        with _traced(self.server, summary):
            self.workers.run("get", case.size, gets, batch=case.batch, remote=self.remote, shm=self.shm)
        return _counted(summary)

    def fill(self) -> None:
        for case in CASES:
            self.workers.run("put", case.size, case.many, batch=64, remote=self.remote)
            for seed in range(3):  # large blocks are kept at the second read
                self.workers.run("get", case.size, case.many, batch=64, seed=seed, remote=self.remote)


def _per_get(case: Case, calls: Callable[[Case, int], Counter[str]]) -> tuple[float, str]:
    """And the commonest of them."""
    few, many = calls(case, case.few), calls(case, case.many)
    gets = case.many - case.few
    more = Counter({name: many[name] - few[name] for name in many})
    named = ", ".join(f"{name} {n / gets:.3g}" for name, n in more.most_common(4) if n / gets >= 0.005)
    return sum(more.values()) / gets, named


def _report(name: str, side: Side) -> None:
    for case in CASES:
        client, of_client = _per_get(case, side.client_calls)
        server, of_server = _per_get(case, side.server_calls)
        print(f"| {name}, {case.what} | {client:.3g} | {server:.3g} | client: {of_client}; server: {of_server} |")
        sys.stdout.flush()


def main() -> int:
    beside = Path(sys.argv[1] if len(sys.argv) > 1 else "/var/tmp")
    print("| gets from memory | client | server | mostly |\n|---|---|---|---|")
    try:
        with scratch_directory(beside, 2 * STORE) as root:
            server = ChunkServer(root, STORE)
            workers = Workers(server, lambda _: None)
            for name, remote, shm in (("TCP", True, False), ("shared memory", True, True), ("ring", False, False)):
                with server.running(MEMORY) if remote else server.ring(MEMORY) as process:
                    side = Side(workers, process, remote, shm, root)
                    side.fill()
                    _report(name, side)
    except BenchError as e:
        print(f"{Path(sys.argv[0]).stem}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
