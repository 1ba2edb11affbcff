"""How a process reaches a cluster: kvfs://HOST:PORT,HOST:PORT/TENANT/NAME, the map from one of these hosts, a token."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvfs._node import ffi, lib
from kvfs.cluster.capability import Capability, CapabilityError, parse_token, read_token
from kvfs.cluster.map import MAX_BYTES, Class, ClusterMap, MapError, Namespace
from kvfs.meta import namespaces
from kvfs.meta.errors import FsError
from kvfs.node import ERR_BYTES, RemoteConfig

SCHEME: Final = "kvfs://"
TRANSPORTS: Final = {"auto": 0, "tcp": 1, "rdma": 2}
MAX_HOSTS: Final = 64
FETCH_S: Final = 10.0  # for all hosts together


@dataclass(frozen=True, slots=True)
class Url:
    hosts: tuple[tuple[str, int], ...]
    tenant: str
    name: str

    def __str__(self) -> str:
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"{SCHEME}{hosts}/{self.tenant}/{self.name}"


def parse_url(url: str) -> Url:
    """ValueError says what is wrong."""
    wrong = ValueError(f"{url!r} is not kvfs://HOST:PORT,HOST:PORT/TENANT/NAME")
    if not url.startswith(SCHEME):
        raise wrong
    where, _, path = url.removeprefix(SCHEME).partition("/")
    tenant, slash, name = path.rstrip("/").partition("/")
    if not slash:
        raise wrong
    try:
        namespaces.check_name(tenant)
        namespaces.check_name(name)
    except FsError as e:
        raise ValueError(f"{url!r}: {(e.strerror or '').partition(': ')[2] or e}") from None
    hosts: list[tuple[str, int]] = []
    for part in where.split(","):
        host, colon, port = part.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise wrong
        if not host or not colon or not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= 65535:
            raise wrong
        hosts.append((host, int(port)))
    if len(hosts) > MAX_HOSTS:
        raise ValueError(f"{len(hosts)} hosts: at most {MAX_HOSTS} can be named")
    return Url(tuple(hosts), tenant, name)


def load_token(token: str | os.PathLike[str] | bytes | None) -> Capability | None:
    """From a file, or the line that is in one."""
    if token is None:
        return None
    if isinstance(token, bytes):
        return Capability.decode(token)
    if isinstance(token, str) and token.startswith("kvfs-token-"):
        return parse_token(token)
    return read_token(Path(token))


def _addresses(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except OSError:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # numeric ones, without an interface for them
    out: list[str] = []
    for _, _, _, _, place in found:
        address = ipaddress.ip_address(place[0])
        out.append(f"tcp://[{address}]:{port}" if address.version == 6 else f"tcp://{address}:{port}")
    return list(dict.fromkeys(out))


def fetch_map(url: Url, token: Capability | None, seconds: float = FETCH_S) -> ClusterMap:
    """From the first host that gives one; OSError with what the last of them said."""
    deadline = time.monotonic() + seconds
    raw = b"" if token is None else token.raw
    capability = ffi.from_buffer(raw) if raw else ffi.NULL
    room = ffi.new("char[]", MAX_BYTES)
    err = ffi.new("char[]", ERR_BYTES)
    last: OSError | None = None
    for i, (host, port) in enumerate(url.hosts):
        try:
            places = _addresses(host, port)
        except OSError as e:
            last = OSError(e.errno or errno.EHOSTUNREACH, f"{host}: {e.strerror}")
            continue
        for place in places:
            # Each host has its share of the time that is left: one that does not answer must not use up that of the next.
            left = max(deadline - time.monotonic(), 0.05) / (len(url.hosts) - i)
            got: int = lib.kvfs_fetch_map(
                place.encode(), capability, len(raw), room, MAX_BYTES, int(left * 1000), err, ERR_BYTES
            )
            if got < 0:
                said = ffi.string(err).decode(errors="replace") or os.strerror(-got)
                last = OSError(-got, said if place in said else f"{place}: {said}")
                continue
            try:
                return ClusterMap.decode(bytes(ffi.buffer(room, got)))
            except MapError as e:
                last = OSError(errno.EPROTO, f"{place}: {e}")
    assert last is not None
    raise last


@dataclass(frozen=True, slots=True)
class Reached:
    """A cluster that has answered: its map, our rights, and the namespace that the URL names."""

    url: Url
    cluster: ClusterMap
    token: Capability | None
    namespace: Namespace

    def blocks(self) -> list[Namespace]:
        """The namespaces of blocks that this token gives rights to."""
        return [
            n
            for n in self.cluster.namespaces
            if n.cls is not Class.VOLUME and (self.token is None or self.token.names(n.id))
        ]

    def config(
        self,
        *,
        transport: str = "auto",
        connections: int = 0,
        deadline: float = 0.0,
        data_sums: bool = True,
        rails: str = "",
    ) -> RemoteConfig:
        return RemoteConfig(
            self.cluster.encode(),
            b"" if self.token is None else self.token.raw,
            self.namespace.id if self.namespace.cls is Class.VOLUME else 0,
            TRANSPORTS[transport],
            connections,
            int(deadline * 1000),
            data_sums,
            rails,
        )


def reach(url: str, token: str | os.PathLike[str] | bytes | None = None, seconds: float = FETCH_S) -> Reached:
    """ValueError: no such URL; CapabilityError: no such token; OSError: nobody answers, or no such namespace."""
    place = parse_url(url)
    capability = load_token(token)
    if capability is not None and capability.expires <= time.time():
        raise CapabilityError("the token has expired")
    cluster = fetch_map(place, capability, seconds)
    found = cluster.find(place.tenant, place.name)
    if found is None:
        raise OSError(errno.ENOENT, f"{url}: the cluster has no namespace {place.tenant}/{place.name}")
    return Reached(place, cluster, capability, found)
