"""The configuration of `kvfs serve chunk`: a TOML file as validated structs. Wrong input gives a ConfigError."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

import msgspec

from kvfs.cluster.map import Address, MapError, Transport, shm_name
from kvfs.config import MIN_STORE, ConfigError, Size, explain, hook, read_toml

MAX_DEVICES: Final = 64
MAX_LISTENERS: Final = 32
MAX_CPU: Final = 4095

DEFAULT: Final = """\
# A chunk server of kvfs: `kvfs serve chunk --config FILE`.

# What there is in the cluster, the same file on all servers. After a change: kill -HUP.
cluster = "/etc/kvfs/cluster.toml"

# Where clients connect: tcp://ADDRESS:PORT, rdma://ADDRESS:PORT; numeric addresses, [::] and 0.0.0.0 are all. And, for
# clients on this host, shm://NAME: shared memory, which begins at the socket /run/kvfs/NAME.
listen = ["tcp://127.0.0.1:7117"]

# The public key of who issues tokens (`kvfs token keygen`). Without it everybody who can connect may do everything,
# and then only loopback addresses are listened on, unless `insecure` is true.
# auth_key = "/etc/kvfs/cluster.key.pub"
insecure = false

# Prometheus text at /metrics, and /healthz, /readyz; "" for none. Nobody is asked who they are.
admin = "127.0.0.1:7190"

# The thread of device i runs on CPU cpus[i] alone; [] for on any.
cpus = []

# Clients that may be connected at once.
sessions = 256
# Memory of each device's thread for data on its way.
buffers = "256M"
# A client that has lost its connections may come back to its session for so many seconds.
keep = 30.0
# Offers clients checksums of all data, end to end.
data_sums = true

# A file (made when it is not there) or a block device. Number 0 of the cluster file's targets is the first.
[[device]]
path = "/var/lib/kvfs/0.kvfs"
# Of a new store; a block device is used whole.
size = "64G"
# Hot pages kept in memory.
memory = "512M"
"""


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: Path
    size: Size = Size(64 << 30)
    memory: Size = Size(512 << 20)


class ChunkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cluster: Path
    device: list[DeviceConfig]
    listen: list[str] = msgspec.field(default_factory=lambda: ["tcp://127.0.0.1:7117"])
    auth_key: Path | None = None
    insecure: bool = False
    admin: str = "127.0.0.1:7190"
    cpus: list[Annotated[int, msgspec.Meta(ge=0, le=MAX_CPU)]] = []
    sessions: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 256
    buffers: Size = Size(256 << 20)
    keep: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 30.0
    data_sums: bool = True


def listener(url: str) -> tuple[Transport, Address | str, int]:
    """Of tcp://ADDRESS:PORT; port 0 is any. Or of shm://NAME."""
    if url.startswith("shm:"):
        return Transport.SHM, shm_name(url), 0
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
        transport = Transport(parts.scheme)
        address = ipaddress.ip_address(host or "")
        if port is None or parts.path or parts.query or parts.fragment:
            raise ValueError
    except ValueError:
        raise MapError(
            f"{url!r} is not tcp://ADDRESS:PORT or rdma://ADDRESS:PORT with a numeric address, or shm://NAME"
        ) from None
    return transport, address, port


def admin_address(text: str) -> tuple[str, int]:
    """HOST and PORT of "127.0.0.1:7190" or "[::1]:7190"."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
        ipaddress.ip_address(host or "")
        if host is None or port is None or parts.path or parts.query or parts.fragment:
            raise ValueError
    except ValueError:
        raise ConfigError(f"admin: {text!r} is not ADDRESS:PORT with a numeric address") from None
    return host, port


def _known(place: str) -> tuple[str, ...]:
    return (DeviceConfig if place.startswith("device") else ChunkConfig).__struct_fields__


def load(path: Path) -> ChunkConfig:
    try:
        config = msgspec.convert(read_toml(path), ChunkConfig, dec_hook=hook)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, _known)}") from error
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def check(config: ChunkConfig) -> None:
    if not 1 <= len(config.device) <= MAX_DEVICES:
        raise ConfigError(f"device: {len(config.device)} devices; 1 to {MAX_DEVICES} are possible")
    paths = [d.path.absolute() for d in config.device]
    if len(set(paths)) != len(paths):
        raise ConfigError("device: two have the same path")
    for device in config.device:
        if device.size < MIN_STORE:
            raise ConfigError(f"device.size: {device.size} bytes is less than the {MIN_STORE >> 20} MiB a store needs")
    if config.cpus and len(config.cpus) != len(config.device):
        raise ConfigError(f"cpus: {len(config.cpus)} CPUs for {len(config.device)} devices; name one for each, or none")
    if not 1 <= len(config.listen) <= MAX_LISTENERS:
        raise ConfigError(f"listen: {len(config.listen)} addresses; 1 to {MAX_LISTENERS} are possible")
    try:
        listeners = [listener(url) for url in config.listen]
    except MapError as error:
        raise ConfigError(f"listen: {error}") from None
    if all(transport is not Transport.TCP for transport, _, _ in listeners):
        raise ConfigError("listen: no tcp:// address; sessions begin on one, whatever else there is")
    if config.auth_key is None and not config.insecure:
        for url, (_, address, _) in zip(config.listen, listeners, strict=True):
            if not isinstance(address, str) and not address.is_loopback:
                raise ConfigError(
                    f"listen: {url} is for others than this host, and without auth_key everybody may do everything; "
                    "set auth_key, or insecure = true if that is what you want"
                )
    if config.admin:
        admin_address(config.admin)
