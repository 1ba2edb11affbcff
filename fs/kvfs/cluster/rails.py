"""This host's RDMA devices, as pyverbs sees them or, without it, as /sys/class/infiniband has them.

Debian's python3-pyverbs is not in a virtual environment's path. It works with any CPython of the version it was built for,
so it is loaded from where Debian puts it, without the other packages that lie beside it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import importlib.util
import ipaddress
import socket
import sys
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

DIST_PACKAGES: Final = Path("/usr/lib/python3/dist-packages")
SYSFS: Final = Path("/sys/class/infiniband")
MAX_PORTS: Final = 255
MAX_GIDS: Final = 1024
_STATES: Final = {0: "nop", 1: "down", 2: "init", 3: "armed", 4: "active", 5: "active-defer"}
_LANES: Final = {1: 1, 2: 4, 4: 8, 8: 12, 16: 2}
_LANE_MBITS: Final = {1: 2500, 2: 5000, 4: 10000, 8: 10000, 16: 14000, 32: 25000, 64: 50000, 128: 100000}
_ETHERNET: Final = 2
GidType = Literal["ib", "roce-v1", "roce-v2"]


class Gid(msgspec.Struct, frozen=True):
    index: int
    gid: str
    type: GidType
    netdev: str = ""

    @property
    def address(self) -> ipaddress.IPv6Address | ipaddress.IPv4Address:
        whole = ipaddress.IPv6Address(self.gid)
        return whole.ipv4_mapped or whole


class Port(msgspec.Struct, frozen=True):
    device: str
    port: int
    state: str
    link_layer: Literal["ethernet", "infiniband"]
    speed: int
    """Mbit/s; 0 unknown."""
    gids: list[Gid]
    used: bool = False
    gid: int | None = None
    """Index of the GID by which it is used."""
    why_not: str = ""


class RailsReport(msgspec.Struct, frozen=True):
    """What `kvfs rails --json` prints."""

    source: Literal["pyverbs", "sysfs"]
    note: str
    ports: list[Port]


class NoPyverbs(Exception):
    """str() says why."""


def _pyverbs(place: Path = DIST_PACKAGES) -> Any:
    """The module pyverbs.device."""
    if importlib.util.find_spec("pyverbs") is None:
        start = place / "pyverbs/__init__.py"
        spec = importlib.util.spec_from_file_location("pyverbs", start, submodule_search_locations=[str(start.parent)])
        if spec is None or spec.loader is None or not start.exists():
            raise NoPyverbs("there is no pyverbs: apt-get install python3-pyverbs")
        module = importlib.util.module_from_spec(spec)
        sys.modules["pyverbs"] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules["pyverbs"]
            raise
    try:
        return importlib.import_module("pyverbs.device")
    except ImportError as e:
        raise NoPyverbs(f"pyverbs cannot be used by this Python: {e}") from e


def _by_pyverbs(verbs: Any) -> list[Port]:
    ports: list[Port] = []
    for device in verbs.get_device_list():
        name = device.name.decode()
        with contextlib.closing(verbs.Context(name=name)) as context:
            gids: dict[int, list[Gid]] = {}
            for entry in context.query_gid_table(MAX_GIDS):
                made = Gid(entry.gid_index, entry.gid_str(), _gid_type(entry.gid_type), _netdev(entry.ndev_ifindex))
                gids.setdefault(entry.port_num, []).append(made)
            for number in range(1, min(context.query_device().phys_port_cnt, MAX_PORTS) + 1):
                port = context.query_port(number)
                ports.append(
                    Port(
                        name,
                        number,
                        _STATES.get(port.state, str(port.state)),
                        "ethernet" if port.link_layer == _ETHERNET else "infiniband",
                        _LANES.get(port.active_width, 0) * _LANE_MBITS.get(port.active_speed, 0),
                        gids.get(number, []),
                    )
                )
    return ports


def _gid_type(number: int) -> GidType:
    return ("ib", "roce-v1", "roce-v2")[number] if 0 <= number <= 2 else "ib"


def _netdev(index: int) -> str:
    try:
        return socket.if_indextoname(index) if index > 0 else ""
    except OSError:
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _numbered(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))


def by_sysfs(root: Path = SYSFS) -> list[Port]:
    ports: list[Port] = []
    for device in sorted(root.glob("*")):
        for place in _numbered(device / "ports")[:MAX_PORTS]:
            ethernet = _read(place / "link_layer") == "Ethernet"
            gids: list[Gid] = []
            for entry in _numbered(place / "gids")[:MAX_GIDS]:
                raw = _read(entry)
                try:
                    value = ipaddress.IPv6Address(raw)
                except ValueError:
                    continue
                if int(value) == 0:
                    continue
                said = _read(place / "gid_attrs/types" / entry.name)
                kind: GidType = "roce-v2" if said == "RoCE v2" else "roce-v1" if ethernet else "ib"
                gids.append(Gid(int(entry.name), str(value), kind, _read(place / "gid_attrs/ndevs" / entry.name)))
            state = _read(place / "state").partition(": ")[2].lower()
            rate = _read(place / "rate").partition(" ")[0]
            speed = int(float(rate) * 1000) if rate.replace(".", "", 1).isdigit() else 0
            layer = "ethernet" if ethernet else "infiniband"
            ports.append(Port(device.name, int(place.name), state or "unknown", layer, speed, gids))
    return ports


def _rank(gid: Gid) -> tuple[int, int]:
    """RoCE v2 with an IPv4 address first, then other routable ones; link-local and RoCE v1 last."""
    address = gid.address
    plain = gid.type != "roce-v2" and gid.type != "ib"
    return (2 if plain else 1 if address.version == 6 and address.is_link_local and gid.type != "ib" else 0), (
        0 if address.version == 4 else 1
    )


def choose(port: Port, patterns: list[str]) -> Port:
    """The port with what would be done with it: by default all active ones are used."""
    names = [port.device, f"{port.device}/{port.port}", *{gid.netdev for gid in port.gids if gid.netdev}]
    if patterns and not any(fnmatch.fnmatchcase(name, p) for name in names for p in patterns):
        why = f"no pattern of {','.join(patterns)} names it"
    elif port.state != "active":
        why = f"the port is {port.state}"
    elif not port.gids:
        why = "it has no GID: its network device has no address"
    else:
        best = min(port.gids, key=lambda g: (_rank(g), g.index))
        return msgspec.structs.replace(port, used=True, gid=best.index)
    return msgspec.structs.replace(port, why_not=why)


def examine(patterns: str = "", *, packages: Path = DIST_PACKAGES, sysfs: Path = SYSFS) -> RailsReport:
    """All ports; `patterns` as in `remote.rails`: comma-separated, of devices, DEVICE/PORT or network devices."""
    wanted = [p.strip() for p in patterns.split(",") if p.strip()]
    source: Literal["pyverbs", "sysfs"] = "pyverbs"
    note = ""
    try:
        verbs = _pyverbs(packages)
        # Without this folder the kernel has no RDMA at all, which pyverbs calls an error.
        ports = _by_pyverbs(verbs) if sysfs.exists() else []
    except NoPyverbs as e:
        source, note, ports = "sysfs", str(e), by_sysfs(sysfs)
    except Exception as e:  # the classes of pyverbs's errors come with it
        source, note, ports = "sysfs", f"pyverbs failed: {e}", by_sysfs(sysfs)
    return RailsReport(source, note, [choose(p, wanted) for p in ports])
