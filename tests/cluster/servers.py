"""Chunk servers as processes, on loopback or where a test wants them, and gone after it."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.error import HTTPError, URLError

from commands import KVFS
from kvfs.cluster import capability, file
from kvfs.cluster.capability import Grant
from kvfs.cluster.map import Class
from waiting import freeze

START_S = 60
STOP_S = 30
SIZE = "128M"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Process(Protocol):
    """Of subprocess.Popen what is needed of a server's."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@dataclass
class Server:
    """One `kvfs serve chunk`; `start` it, also again after a kill."""

    directory: Path
    port: int
    admin: int
    process: Process | None = None
    shm: bool = False

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def urls(self) -> list[str]:
        """Where it listens, and the cluster's map says so."""
        return [self.url, f"shm://{self.directory.name}"] if self.shm else [self.url]

    @property
    def listens(self) -> list[str]:
        """Where it really does, if that is not where the map says."""
        return self.urls

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def device(self) -> Path:
        return self.directory / "0.kvfs"

    @property
    def config(self) -> Path:
        return self.directory / "chunk.toml"

    @property
    def command(self) -> list[str]:
        return [*KVFS, "serve", "chunk", "--config", str(self.config)]

    def start(self) -> None:
        self.launch()
        self.wait()

    def launch(self) -> None:
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended: {self.said()}")
            if self.page("/readyz")[0] == 200:
                return
            time.sleep(0.05)
        raise AssertionError(f"the server is not ready after {START_S} s: {self.said()}")

    def said(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-3000:]

    def page(self, path: str) -> tuple[int, str]:
        """Status (0: nobody answers) and text."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as e:
            return e.code, e.read().decode()
        except (URLError, OSError):
            return 0, ""

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        lines = [
            line for line in self.page("/metrics")[1].splitlines() if line.partition(" ")[0].partition("{")[0] == name
        ]
        assert lines, name
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def signal(self, number: int) -> None:
        """Of SIGSTOP the process has taken notice when this returns."""
        assert self.process is not None
        if number == signal.SIGSTOP:
            freeze(self.process.pid)
        else:
            self.process.send_signal(number)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_S)

    def stop(self) -> int:
        """In order; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        return self.process.wait(STOP_S)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_S)


@dataclass
class Cluster:
    directory: Path
    servers: list[Server]
    tokens: dict[str, Path] = field(default_factory=dict[str, Path])

    @property
    def file(self) -> Path:
        return self.directory / "cluster.toml"

    @property
    def key(self) -> Path:
        return self.directory / "cluster.key"

    def url(self, name: str, tenant: str = "acme") -> str:
        return f"kvfs://{','.join(s.host for s in self.servers)}/{tenant}/{name}"

    def token(self, *grants: str, tenant: str = "acme", key: Path | None = None, seconds: int = 3600) -> Path:
        """Issued anew for each set of grants."""
        path = self.directory / f"token-{len(self.tokens)}"
        known = file.load_map(self.file)
        given: list[Grant] = []
        for grant in grants:
            name, _, rights = grant.partition(":")
            found = known.find(tenant, name)
            assert found is not None
            given.append(Grant.on(found, capability.parse_rights(rights)))
        signer = capability.read_signing_key(key or self.key)
        made = capability.Capability.issue(signer, tenant, given, expires=int(time.time()) + seconds)
        capability.write_secret(path, made.text())
        self.tokens[path.name] = path
        return path


def new_key(path: Path) -> Path:
    secret, public = capability.key_files(capability.SigningKey.generate())
    capability.write_secret(path, secret)
    path.with_name(path.name + ".pub").write_text(public)
    return path


def cluster(count: int, *, more: str = "", shm: bool = False) -> AbstractContextManager[Cluster]:
    """On loopback; with `shm` at shm:// endpoints, too."""

    def make(directory: Path) -> Server:
        return Server(directory, free_port(), free_port(), shm=shm)

    return cluster_of([make] * count, more=more)


@contextmanager
def cluster_of(servers: Sequence[Callable[[Path], Server]], *, more: str = "") -> Generator[Cluster]:
    """Started servers of one device each, made with their directories, who ask for tokens. Always there: acme/cache, acme/kept
    (durable), acme/home (a volume), other/cache."""
    place = Path(tempfile.mkdtemp(prefix="kvfs-", dir="/var/tmp"))  # direct I/O, which tmpfs may lack
    made = Cluster(place, [])
    try:
        new_key(made.key)
        entries = file.ClusterFile(file.ClusterSection(1, 256))
        for i, make in enumerate(servers):
            directory = place / f"server{i}"
            directory.mkdir()
            server = make(directory)
            entries = entries.with_target(server.urls)
            server.config.write_text(
                f'cluster = "{made.file}"\nlisten = {json.dumps(server.listens)}\nauth_key = "{made.key}.pub"\n'
                f'admin = "127.0.0.1:{server.admin}"\nbuffers = "64M"\nkeep = 5.0\n{more}'
                f'[[device]]\npath = "{server.device}"\nsize = "{SIZE}"\nmemory = "16M"\n'
            )
            made.servers.append(server)
        wanted = (("acme/cache", "cache"), ("acme/kept", "durable"), ("acme/home", "volume"), ("other/cache", "cache"))
        for name, cls in wanted:
            tenant, _, plain = name.partition("/")
            entries = entries.with_namespace(tenant, plain, Class(cls))
        file.store(made.file, entries)
        for server in made.servers:
            server.launch()
        for server in made.servers:
            server.wait()
        yield made
    finally:
        for server in made.servers:
            server.end()
        shutil.rmtree(place)


def fsck(path: Path, *options: str) -> dict[str, object]:
    """The report of `kvfs fsck --json`, clean or not."""
    done = subprocess.run(
        [sys.executable, "-m", "kvfs", "fsck", str(path), "--json", *options],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, 1, 4), done.stderr
    return json.loads(done.stdout)
