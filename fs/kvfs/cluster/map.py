"""The cluster map: which target has a slot, where targets listen, which namespaces there are; and its bytes.

The bytes are those of native/wire/map.h. `ClusterMap.decode` takes them from anyone: it checks all of it, and gives a
MapError of one sentence for what is no map. Every ClusterMap that exists has passed `check`.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final
from urllib.parse import parse_qsl, urlsplit

import xxhash

from kvfs.meta import namespaces
from kvfs.meta.errors import FsError

MAX_BYTES: Final = 1 << 20
MAX_SLOTS: Final = 65536
MAX_TARGETS: Final = 1024
MAX_ENDPOINTS: Final = 16
MAX_NAMESPACES: Final = 4096
MAX_TENANT: Final = 63
FIRST_NAMESPACE: Final = namespaces.FIRST_ID
_U32: Final = 0xFFFFFFFF
_MAGIC: Final = 0x4D46564B  # "KVFM"
_FORMAT: Final = 1
_HEADER: Final = struct.Struct("<IHHIIIIQ")
_ENDPOINT: Final = struct.Struct("<BBHI16s")
_TARGET: Final = struct.Struct("<IIII")
_TARGET_BYTES: Final = _TARGET.size + MAX_ENDPOINTS * _ENDPOINT.size
_NAMESPACE: Final = struct.Struct("<IB3s64s128s")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class MapError(ValueError):
    """This is no cluster map; str() is one sentence that says why."""


class Transport(StrEnum):
    TCP = "tcp"
    RDMA = "rdma"
    SHM = "shm"


_TRANSPORTS: Final = (Transport.TCP, Transport.RDMA, Transport.SHM)  # 1, 2, 3 in the bytes
_SHM_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,15}")


class Class(StrEnum):
    """Of a namespace: blocks that may be evicted, blocks that stay, or the file chunks of one POSIX tree."""

    CACHE = "cache"
    DURABLE = "durable"
    VOLUME = "volume"


_CLASSES: Final = (Class.CACHE, Class.DURABLE, Class.VOLUME)  # 1, 2, 3 in the bytes


def shm_name(url: str) -> str:
    """NAME of shm://NAME."""
    name = url.removeprefix("shm://")
    if name == url or not _SHM_NAME.fullmatch(name):
        raise MapError(f"{url!r} is not shm://NAME with a name of up to 16 of A-Z a-z 0-9 . _ -")
    return name


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a target can be reached. `speed`: Mbit/s of the server's link, 0 when not known.

    Of shm:// the address is the name of a socket on the server's host, and there is no port."""

    transport: Transport
    address: Address | str
    port: int
    speed: int = 0

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """tcp://ADDRESS:PORT or rdma://ADDRESS:PORT, with ?speed=MBITS if that is to be known; ADDRESS is numeric. Or
        shm://NAME."""
        if url.startswith("shm:"):
            return cls(Transport.SHM, shm_name(url), 0)
        wrong = MapError(f"{url!r} is not tcp://ADDRESS:PORT, rdma://ADDRESS:PORT or shm://NAME")
        try:
            parts = urlsplit(url)
            port, host = parts.port, parts.hostname
            transport = Transport(parts.scheme)
        except ValueError:
            raise wrong from None
        if not host or not port or parts.path or parts.fragment or parts.username is not None:
            raise wrong
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            raise MapError(f"{url!r}: {host!r} is not a numeric address, such as 10.0.0.1 or [fd00::1]") from None
        if isinstance(address, ipaddress.IPv6Address) and address.scope_id:
            raise MapError(f"{url!r}: an address with a scope means something else on each host")
        speed = 0
        for name, value in parse_qsl(parts.query, keep_blank_values=True):
            if name != "speed" or not (value.isascii() and value.isdigit()) or int(value) > _U32:
                raise MapError(f"{url!r}: only ?speed=MBITS may follow the port")
            speed = int(value)
        return cls(transport, address, port, speed)

    @property
    def family(self) -> int:
        """As in the bytes."""
        return 0 if isinstance(self.address, str) else self.address.version

    @property
    def packed(self) -> bytes:
        return self.address.encode() if isinstance(self.address, str) else self.address.packed

    def __str__(self) -> str:
        if isinstance(self.address, str):
            return f"shm://{self.address}"
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{self.transport}://{host}:{self.port}" + (f"?speed={self.speed}" if self.speed else "")


@dataclass(frozen=True, slots=True)
class Target:
    """One store. `number`: which of its server's devices it is."""

    id: int
    number: int
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Namespace:
    id: int
    tenant: str
    name: str
    cls: Class

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"


def spread(slots: int, targets: Sequence[int]) -> tuple[int, ...]:
    """For each slot an index into `targets`, ids: every target has its share, and one more target takes slots for itself
    and leaves nearly all others where they were.

    Each slot ranks the targets by a hash (rendezvous) and goes to the first that has not got its share yet.
    """
    share = -(-slots // len(targets))
    left = [share] * len(targets)
    out: list[int] = []
    for slot in range(slots):
        ranked = sorted(
            range(len(targets)),
            key=lambda i: xxhash.xxh3_64_intdigest(struct.pack("<II", slot, targets[i])),
            reverse=True,
        )
        best = next(i for i in ranked if left[i])
        left[best] -= 1
        out.append(best)
    return tuple(out)


def _port_ok(endpoint: Endpoint) -> bool:
    return endpoint.port == 0 if endpoint.transport is Transport.SHM else 1 <= endpoint.port <= 65535


def _twice(values: Iterable[object]) -> object | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)


@dataclass(frozen=True, slots=True)
class ClusterMap:
    """`slots`: indices into `targets`; their number is a power of two."""

    version: int
    targets: tuple[Target, ...]
    slots: tuple[int, ...] = field(repr=False)
    namespaces: tuple[Namespace, ...] = ()

    def __post_init__(self) -> None:
        self.check()

    @classmethod
    def make(
        cls, version: int, slots: int, targets: Sequence[Target], namespaces: Sequence[Namespace] = ()
    ) -> ClusterMap:
        """Slots spread evenly over the targets."""
        if not 1 <= slots <= MAX_SLOTS or slots & (slots - 1):
            raise MapError(f"{slots} slots: it must be a power of two of at most {MAX_SLOTS}")
        if not 1 <= len(targets) <= MAX_TARGETS:
            raise MapError(f"{len(targets)} targets: a cluster has 1 to {MAX_TARGETS}")
        return cls(version, tuple(targets), spread(slots, [t.id for t in targets]), tuple(namespaces))

    @property
    def size(self) -> int:
        """Bytes of `encode`."""
        names = len(self.namespaces) * _NAMESPACE.size
        return _HEADER.size + len(self.targets) * _TARGET_BYTES + len(self.slots) * 2 + names

    def check(self) -> None:
        if not 1 <= self.version <= _U32:
            raise MapError(f"version {self.version}: it must be from 1 to {_U32}")
        if not 1 <= len(self.slots) <= MAX_SLOTS or len(self.slots) & (len(self.slots) - 1):
            raise MapError(f"{len(self.slots)} slots: it must be a power of two of at most {MAX_SLOTS}")
        if not 1 <= len(self.targets) <= MAX_TARGETS:
            raise MapError(f"{len(self.targets)} targets: a cluster has 1 to {MAX_TARGETS}")
        if len(self.namespaces) > MAX_NAMESPACES:
            raise MapError(f"{len(self.namespaces)} namespaces: there may be {MAX_NAMESPACES}")
        if self.size > MAX_BYTES:
            raise MapError(
                f"a map of {self.size} bytes: at most {MAX_BYTES} are possible; have fewer namespaces or slots"
            )
        if any(not 0 <= slot < len(self.targets) for slot in self.slots):
            raise MapError("a slot belongs to a target that is not there")
        for target in self.targets:
            self._check_target(target)
        if (twice := _twice(t.id for t in self.targets)) is not None:
            raise MapError(f"target {twice} is there twice")
        if (place := _twice((e, t.number) for t in self.targets for e in t.endpoints)) is not None:
            assert isinstance(place, tuple)
            raise MapError(f"two targets are number {place[1]} of the server at {place[0]}")  # pyright: ignore[reportUnknownArgumentType]
        for namespace in self.namespaces:
            self._check_namespace(namespace)
        if (twice := _twice(n.id for n in self.namespaces)) is not None:
            raise MapError(f"two namespaces have the id {twice}")
        if (twice := _twice((n.tenant, n.name) for n in self.namespaces)) is not None:
            assert isinstance(twice, tuple)
            raise MapError(f"namespace {'/'.join(twice)} is there twice")  # pyright: ignore[reportUnknownArgumentType]

    @staticmethod
    def _check_target(target: Target) -> None:
        if not (0 <= target.id <= _U32 and 0 <= target.number <= _U32):
            raise MapError(f"target {target.id}, number {target.number}: both must be from 0 to {_U32}")
        if not 1 <= len(target.endpoints) <= MAX_ENDPOINTS:
            raise MapError(
                f"target {target.id} has {len(target.endpoints)} endpoints: 1 to {MAX_ENDPOINTS} are possible"
            )
        for e in target.endpoints:
            if (e.transport is Transport.SHM) != isinstance(e.address, str):
                raise MapError(f"target {target.id} has an endpoint {e.transport}:// at {e.address}")
            if isinstance(e.address, str):
                shm_name(str(e))
        if any(not _port_ok(e) or not 0 <= e.speed <= _U32 for e in target.endpoints):
            raise MapError(f"target {target.id} has an endpoint without a port, or of an impossible speed")
        if all(e.transport is not Transport.TCP for e in target.endpoints):
            raise MapError(f"target {target.id} has no tcp:// endpoint: sessions begin on one, whatever else there is")

    @staticmethod
    def _check_namespace(namespace: Namespace) -> None:
        if not 1 <= namespace.id < _U32:
            raise MapError(f"namespace {namespace}: id {namespace.id} is not from 1 to {_U32 - 1}")
        try:
            namespaces.check_name(namespace.tenant)
            namespaces.check_name(namespace.name)
        except FsError as e:
            raise MapError((e.strerror or str(e)).partition(": ")[2]) from None
        if len(namespace.tenant) > MAX_TENANT:
            raise MapError(f"tenant {namespace.tenant}: at most {MAX_TENANT} characters")

    def find(self, tenant: str, name: str) -> Namespace | None:
        return next((n for n in self.namespaces if (n.tenant, n.name) == (tenant, name)), None)

    def encode(self) -> bytes:
        counts = (self.version, len(self.slots), len(self.targets), len(self.namespaces))
        body = bytearray()
        for target in self.targets:
            body += _TARGET.pack(target.id, target.number, len(target.endpoints), 0)
            for e in target.endpoints:
                transport = _TRANSPORTS.index(e.transport) + 1
                body += _ENDPOINT.pack(transport, e.family, e.port, e.speed, e.packed)
            body += bytes((MAX_ENDPOINTS - len(target.endpoints)) * _ENDPOINT.size)
        body += struct.pack(f"<{len(self.slots)}H", *self.slots)
        for n in self.namespaces:
            body += _NAMESPACE.pack(n.id, _CLASSES.index(n.cls) + 1, b"", n.tenant.encode(), n.name.encode())
        total = xxhash.xxh3_64_intdigest(_HEADER.pack(_MAGIC, _FORMAT, 0, *counts, 0) + body)
        return _HEADER.pack(_MAGIC, _FORMAT, 0, *counts, total) + bytes(body)

    @classmethod
    def decode(cls, raw: bytes) -> ClusterMap:
        if not _HEADER.size <= len(raw) <= MAX_BYTES:
            raise MapError(f"{len(raw)} bytes are no cluster map")
        magic, form, reserved, version, slots, targets, count, total = _HEADER.unpack_from(raw)
        if magic != _MAGIC:
            raise MapError("this is no cluster map")
        if form != _FORMAT:
            raise MapError(f"the cluster map has format {form}; this kvfs knows {_FORMAT}")
        size = _HEADER.size + targets * _TARGET_BYTES + slots * 2 + count * _NAMESPACE.size
        if reserved or len(raw) != size:
            raise MapError("the cluster map's length and its counts do not agree")
        if xxhash.xxh3_64_intdigest(raw[: _HEADER.size - 8] + bytes(8) + raw[_HEADER.size :]) != total:
            raise MapError("the cluster map is damaged: its checksum is another one")
        at = _HEADER.size
        found = tuple(_decode_target(raw, at + i * _TARGET_BYTES) for i in range(targets))
        at += targets * _TARGET_BYTES
        table = struct.unpack_from(f"<{slots}H", raw, at)
        at += slots * 2
        names = tuple(_decode_namespace(raw, at + i * _NAMESPACE.size) for i in range(count))
        return cls(version, found, table, names)


def _decode_target(raw: bytes, at: int) -> Target:
    ident, number, count, reserved = _TARGET.unpack_from(raw, at)
    if reserved or count > MAX_ENDPOINTS:
        raise MapError(f"target {ident} is none: too many endpoints, or reserved bytes are set")
    endpoints: list[Endpoint] = []
    for i in range(count):
        transport, family, port, speed, packed = _ENDPOINT.unpack_from(raw, at + _TARGET.size + i * _ENDPOINT.size)
        if (transport, family) == (3, 0):
            endpoints.append(Endpoint(Transport.SHM, unpad(packed, full=True), port, speed))
            continue
        if transport not in (1, 2) or family not in (4, 6):
            raise MapError(f"target {ident} has an endpoint of an unknown kind")
        address = ipaddress.ip_address(packed[:4] if family == 4 else packed)
        endpoints.append(Endpoint(_TRANSPORTS[transport - 1], address, port, speed))
    return Target(ident, number, tuple(endpoints))


def _decode_namespace(raw: bytes, at: int) -> Namespace:
    cls: int
    ident, cls, reserved, tenant, name = _NAMESPACE.unpack_from(raw, at)
    if not 1 <= cls <= len(_CLASSES) or any(reserved):
        raise MapError(f"namespace {ident} is of an unknown class")
    return Namespace(ident, unpad(tenant), unpad(name), _CLASSES[cls - 1])


def unpad(field: bytes, *, full: bool = False) -> str:
    """Text that ends at the first NUL of a fixed-size field; behind it there must be nothing else. `full`: or at the
    field's end."""
    text, _, rest = field.partition(b"\0")
    try:
        if rest.strip(b"\0") or (len(text) == len(field) and not full):
            raise ValueError
        return text.decode("ascii")
    except ValueError:
        raise MapError("a name is not text that ends within its field") from None
