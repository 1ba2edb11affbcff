"""A chunk server and its clients as processes, for `kvfs bench net`: on this host, or on hosts of `kvfs_tools.hosts`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from kvfs_tools.bench.contenders import clean_environment
from kvfs_tools.bench.programs import SLACK_S, BenchError, output
from kvfs_tools.hosts import Host

START_S: Final = 60.0
STOP_S: Final = 30.0
NAMESPACE: Final = "bench/net"
NAMESPACE_ID: Final = 1
SHM_NAME: Final = "server"  # a socket in the scratch directory


class Result(msgspec.Struct, frozen=True):
    """A worker's line."""

    ops: int
    seconds: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        return self.ops / self.seconds


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def with_settings(settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with these of kvfs's variables and no others."""
    return clean_environment() | dict(settings)


@contextlib.contextmanager
def child(
    command: list[str], log: Path, *, piped: bool = False, settings: Mapping[str, str] | None = None
) -> Generator[subprocess.Popen[bytes]]:
    """Ended with the block. Its standard input and output are pipes, or nothing; what it complains of goes to `log`."""
    environ = with_settings(settings or {})
    channel = subprocess.PIPE if piped else subprocess.DEVNULL
    with open(log, "ab") as errors:
        try:
            made = subprocess.Popen(
                command, stdin=channel, stdout=channel, stderr=errors, env=environ, start_new_session=True
            )
        except OSError as e:
            raise BenchError(f"{command[0]} cannot be started: {e.strerror}") from e
    try:
        yield made
    finally:
        if made.stdin is not None:
            made.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            made.send_signal(signal.SIGTERM)
        try:
            made.wait(STOP_S)
        except subprocess.TimeoutExpired:
            made.kill()
            made.wait()
        if made.stdout is not None:
            made.stdout.close()


def wait_until(what: str, process: subprocess.Popen[bytes], log: Path, answers: Callable[[], bool]) -> None:
    end = time.monotonic() + START_S
    while not answers():
        if process.poll() is not None or time.monotonic() > end:
            said = log.read_text(errors="replace").strip().splitlines()
            raise BenchError(f"{what} did not start: {said[-1][:300] if said else 'it said nothing'}")
        time.sleep(0.05)


class ChunkServer:
    """A chunk server of one device, at one port of each address; `memory` may change between two runs of it. On this host it is
    at an shm:// endpoint, too."""

    def __init__(
        self, root: Path, size: int, *, addresses: Sequence[str] = ("127.0.0.1",), host: Host | None = None
    ) -> None:
        self.root = root
        self.host = host
        self.addresses = addresses
        self.port, self.admin = free_port(), free_port()
        self.socket = root / "ring.sock"
        self.store = root / "store.kvfs"
        self.size = size
        self.cluster = root / "cluster.toml"
        tenant, name = NAMESPACE.split("/")
        self.cluster.write_text(
            f"[cluster]\nversion = 1\nslots = 4096\n\n[[target]]\nid = 1\nnumber = 0\n"
            f"endpoints = {self._endpoints}\n\n"
            f'[[namespace]]\nid = {NAMESPACE_ID}\ntenant = "{tenant}"\nname = "{name}"\nclass = "durable"\n'
        )

    @property
    def url(self) -> str:
        return f"kvfs://{self.addresses[0]}:{self.port}/{NAMESPACE}"

    @property
    def _endpoints(self) -> str:
        shm = [f"shm://{SHM_NAME}"] if self.host is None else []
        return json.dumps([f"tcp://{address}:{self.port}" for address in self.addresses] + shm)

    @contextlib.contextmanager
    def running(self, memory: int) -> Generator[int]:
        config = self.root / "chunk.toml"
        config.write_text(
            f'cluster = "{self.cluster}"\nlisten = {self._endpoints}\nadmin = "127.0.0.1:{self.admin}"\n'
            f"insecure = {str(self.host is not None).lower()}\n\n"
            f'[[device]]\npath = "{self.store}"\nsize = {self.size}\nmemory = {memory}\n'
        )
        log = self.root / "server.log"
        command = [sys.executable, "-m", "kvfs", "serve", "chunk", "--config", str(config)]
        if self.host is not None:
            command = self.host.command(*command)
        with child(command, log, settings={"KVFS_SHM_DIR": str(self.root)}) as server:
            wait_until("the chunk server", server, log, self._ready)
            yield server.pid

    @contextlib.contextmanager
    def ring(self, memory: int = 0) -> Generator[int]:
        """The same store, while no server has it, over its own ring."""
        log = self.root / "ring.log"
        command = [sys.executable, "-m", "kvfs_tools.bench.ringhost", str(self.store), str(self.socket)]
        command += [NAMESPACE, str(NAMESPACE_ID), str(memory)]
        with child(command, log, piped=True) as holder:
            assert holder.stdout is not None
            if holder.stdout.readline().strip() != b"ready":
                raise BenchError(f"the store cannot be opened: {log.read_text(errors='replace')[-300:]}")
            yield holder.pid

    def _ready(self) -> bool:
        inside = contextlib.nullcontext() if self.host is None else self.host.entered()
        try:
            with inside, urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/readyz", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class Workers:
    """Client processes of ours, on `host` or this one. `remote`: over TCP, or with `shm` through shared memory; else over the
    server's own ring."""

    server: ChunkServer
    say: Callable[[str], None]
    host: Host | None = None

    def command(
        self, op: str, size: int, count: int, *, batch: int, seconds: float = 0.0, seed: int = 0, remote: bool = True
    ) -> list[str]:
        where = [self.server.url] if remote else [str(self.server.socket), NAMESPACE]
        command = [sys.executable, "-m", "kvfs_tools.bench.blockworker", op, *where]
        command += ["--size", str(size), "--count", str(count), "--batch", str(batch)]
        command += ["--seconds", f"{seconds:g}", "--seed", str(seed)]
        return command if self.host is None else self.host.command(*command)

    def run(
        self,
        op: str,
        size: int,
        count: int,
        *,
        batch: int,
        seconds: float = 0.0,
        seed: int = 0,
        remote: bool = True,
        shm: bool = False,
    ) -> Result:
        command = self.command(op, size, count, batch=batch, seconds=seconds, seed=seed, remote=remote)
        self.say(" ".join(command))
        return msgspec.json.decode(output(command, seconds + 5 * SLACK_S, self.environment(shm)), type=Result)

    def environment(self, shm: bool) -> dict[str, str]:
        how = "auto" if shm else "tcp"
        return with_settings({"KVFS_SHM_DIR": str(self.server.root), "KVFS_REMOTE_TRANSPORT": how})
