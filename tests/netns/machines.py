"""Chunk servers and clients on hosts of their own, which are network namespaces joined by cables."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.servers import Cluster, Server, cluster_of
from commands import KVFS
from kvfs.mount import service
from kvfs_tools.hosts import Cable, Host, network
from kvfs_usrbio import BlockStore
from waiting import wait_for

ENDED_WITH_US = ("setpriv", "--pdeathsig", "TERM")  # also when the tests are killed
START_S = 30.0


@dataclass(kw_only=True)
class HostServer(Server):
    """With an address on each cable to its clients' host."""

    machine: Host
    addresses: tuple[str, ...]

    @property
    def url(self) -> str:
        return self.urls[0]

    @property
    def urls(self) -> list[str]:
        return [f"tcp://{address}:{self.port}" for address in self.addresses]

    @property
    def host(self) -> str:
        return f"{self.addresses[0]}:{self.port}"

    @property
    def command(self) -> list[str]:
        return self.machine.command(*ENDED_WITH_US, *super().command)

    def page(self, path: str) -> tuple[int, str]:
        with self.machine.entered():
            return super().page(path)


@dataclass
class Site:
    """`client` is one host; each server has one, with as many cables to it as there are rails."""

    client: Host
    servers: list[Host]
    cables: list[list[Cable]] = field(repr=False)  # of each server; its end is a, the client's b
    cluster: Cluster

    @contextmanager
    def opened(self, name: str, timeout: float) -> Generator[BlockStore]:
        """From the client's host; `timeout` of a call."""
        with self.client.entered():
            token = self.cluster.token(f"{name}:rw")
            store = BlockStore.open(self.cluster.url(name), token=token, timeout=timeout)
        with store:
            yield store

    @contextmanager
    def mounted(self, directory: Path, token: Path, **settings: str) -> Generator[Path]:
        """The volume acme/home, mounted by a daemon on the client's host; neither is there afterwards."""
        point = directory.with_name(directory.name + "-mnt")
        point.mkdir()
        options = [self.cluster.url("home"), str(point), "--dir", str(directory), "--token", str(token)]
        log = directory.with_name(directory.name + "-log")
        with open(log, "wb") as said:
            daemon = subprocess.Popen(
                self.client.command(*ENDED_WITH_US, *KVFS, "mount", *options),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**os.environ, **settings},
            )
        try:
            wait_for(lambda: service.is_mounted(point) or daemon.poll() is not None, START_S)
            assert daemon.poll() is None, log.read_text()
            yield point
        finally:
            daemon.terminate()
            try:
                daemon.wait(START_S)
            finally:
                daemon.kill()
                daemon.wait()
                service.unmount(point)


@dataclass(frozen=True)
class Vanished:
    """A client's host that is gone. `connections`: that the server had then."""

    server: Server
    connections: float


@contextmanager
def site(servers: int, rails: int) -> Generator[Site]:
    """Started. Nothing of it is there afterwards."""
    with network() as net, ExitStack() as stack:
        client = net.host("client")
        hosts = [net.host(f"server{i}") for i in range(servers)]
        cables = [[net.cable(host, client) for _ in range(rails)] for host in hosts]
        made = [_server(host, ends) for host, ends in zip(hosts, cables, strict=True)]
        yield Site(client, hosts, cables, stack.enter_context(cluster_of(made)))


def _server(host: Host, cables: list[Cable]) -> Callable[[Path], Server]:
    addresses = tuple(cable.a.address for cable in cables)
    return lambda directory: HostServer(directory, 7117, 7190, machine=host, addresses=addresses)


def probe() -> None:
    """hosts.Unavailable if this machine cannot do what the tests need."""
    with network() as net:
        one, other = net.host("one"), net.host("other")
        net.cable(one, other).shape(100)
        with lossy(one, 1):
            pass


@contextmanager
def lossy(host: Host, percent: int) -> Generator[None]:
    """Of what arrives at the host and what leaves it, this share is lost."""
    with host.filtered(f"numgen random mod 100 < {percent} drop"):
        yield
