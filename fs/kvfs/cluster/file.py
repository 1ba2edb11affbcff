"""The cluster file: what there is in a cluster, as TOML that people and `kvfs cluster` write.

    [cluster]
    version = 3          # rises with each change: servers and clients tell older maps by it
    slots = 4096

    [[target]]
    id = 1               # in the whole cluster, for ever
    number = 0           # which device of its server
    endpoints = ["tcp://10.0.0.1:7117", "rdma://10.0.0.1:7118"]

    [[namespace]]
    id = 16
    tenant = "acme"
    name = "llama"
    class = "cache"      # or durable, volume

Slots are spread over the targets, see `map.spread`, so every server that reads the same file has the same map.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Final

import msgspec

from kvfs.cluster.map import FIRST_NAMESPACE, Class, ClusterMap, Endpoint, MapError, Namespace, Target
from kvfs.config import ConfigError, explain, read_toml

SLOTS: Final = 4096
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]


class ClusterSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: U32 = 1
    slots: U32 = SLOTS


class TargetEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: U32
    endpoints: list[str]
    number: U32 = 0


class NamespaceEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"cls": "class"}):
    id: U32
    tenant: str
    name: str
    cls: Class


class ClusterFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file as it is written; `map` is what it means. A cluster without targets is one that is being made."""

    cluster: ClusterSection = ClusterSection()
    target: list[TargetEntry] = []
    namespace: list[NamespaceEntry] = []

    def map(self) -> ClusterMap:
        targets = [Target(t.id, t.number, tuple(map(Endpoint.parse, t.endpoints))) for t in self.target]
        names = [Namespace(n.id, n.tenant, n.name, n.cls) for n in self.namespace]
        return ClusterMap.make(self.cluster.version, self.cluster.slots, targets, names)

    def with_target(self, endpoints: list[str], ident: int | None = None, number: int = 0) -> ClusterFile:
        ident = max((t.id for t in self.target), default=0) + 1 if ident is None else ident
        return self._next(target=[*self.target, TargetEntry(ident, endpoints, number)])

    def with_namespace(self, tenant: str, name: str, cls: Class) -> ClusterFile:
        """With the next id; one that was ever given is not given again as long as the highest stays."""
        ident = max((n.id + 1 for n in self.namespace), default=FIRST_NAMESPACE)
        return self._next(namespace=[*self.namespace, NamespaceEntry(ident, tenant, name, cls)])

    def _next(self, **changes: object) -> ClusterFile:
        section = ClusterSection(self.cluster.version + 1, self.cluster.slots)
        return msgspec.structs.replace(self, cluster=section, **changes)

    @property
    def kept(self) -> list[str]:
        """The namespaces whose data must stay where it is found."""
        return [f"{n.tenant}/{n.name}" for n in self.namespace if n.cls is not Class.CACHE]


def _known(place: str) -> tuple[str, ...]:
    kind: type[msgspec.Struct]
    match place.partition("[")[0]:
        case "cluster":
            kind = ClusterSection
        case "target":
            kind = TargetEntry
        case "namespace":
            kind = NamespaceEntry
        case _:
            kind = ClusterFile
    return kind.__struct_encode_fields__


def load(path: Path) -> ClusterFile:
    """The file, its shape checked and what it means too, unless it has no targets yet."""
    try:
        found = msgspec.convert(read_toml(path), ClusterFile)
        if found.target:
            found.map()
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, _known)}") from error
    except MapError as error:
        raise ConfigError(f"{path}: {error}") from error
    return found


def load_map(path: Path) -> ClusterMap:
    found = load(path)
    if not found.target:
        raise ConfigError(f"{path}: there are no targets; add one with `kvfs cluster add-target {path} tcp://...`")
    return found.map()


def _quoted(value: str | list[str]) -> str:
    """JSON's strings are TOML's, but for pairs of surrogates and a bare DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def dump(file: ClusterFile) -> str:
    """As TOML."""
    text = ["[cluster]", f"version = {file.cluster.version}", f"slots = {file.cluster.slots}"]
    for t in file.target:
        text += ["", "[[target]]", f"id = {t.id}", f"number = {t.number}", f"endpoints = {_quoted(t.endpoints)}"]
    for n in file.namespace:
        text += ["", "[[namespace]]", f"id = {n.id}", f"tenant = {_quoted(n.tenant)}"]
        text += [f"name = {_quoted(n.name)}", f"class = {_quoted(n.cls.value)}"]
    return "\n".join(text) + "\n"


def store(path: Path, file: ClusterFile, *, new: bool = False) -> None:
    """Whoever reads it meanwhile sees the old one or the new one. Comments of the old one are lost."""
    if new and path.exists():
        raise ConfigError(f"{path} is there already")
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(dump(file), encoding="utf-8")
        os.replace(beside, path)
    except OSError as e:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {e.strerror}") from e
