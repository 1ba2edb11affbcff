"""`kvfs cluster`: the file that says what there is in a cluster."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvfs.cli.node import split_namespace
from kvfs.cli.output import fail, print_json
from kvfs.cluster import file
from kvfs.cluster.map import Class, ClusterMap, MapError
from kvfs.config import ConfigError

app = typer.Typer(
    help="Make and look at a cluster file: targets, namespaces, and which target has what.", no_args_is_help=True
)
INIT_EXAMPLES = "Examples:  kvfs cluster init cluster.toml   |   kvfs cluster init cluster.toml --slots 1024"
TARGET_EXAMPLES = (
    "Examples:  kvfs cluster add-target cluster.toml tcp://10.0.0.1:7117   |   "
    "kvfs cluster add-target cluster.toml tcp://10.0.0.1:7117 rdma://10.0.0.1:7118 --number 1"
)
NAMESPACE_EXAMPLES = (
    "Examples:  kvfs cluster add-namespace cluster.toml acme/llama   |   "
    "kvfs cluster add-namespace cluster.toml acme/home --class volume"
)
SHOW_EXAMPLES = "Examples:  kvfs cluster show cluster.toml   |   kvfs cluster show cluster.toml --json"
CHECK_EXAMPLES = "Examples:  kvfs cluster check cluster.toml"

File = Annotated[Path, typer.Argument(metavar="FILE", help="The cluster file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]


class TargetReport(msgspec.Struct, frozen=True):
    id: int
    number: int
    endpoints: list[str]
    slots: int


class NamespaceReport(msgspec.Struct, frozen=True):
    id: int
    tenant: str
    name: str
    cls: str = msgspec.field(name="class")


class ClusterReport(msgspec.Struct, frozen=True):
    """What `kvfs cluster show --json` prints."""

    version: int
    slots: int
    targets: list[TargetReport]
    namespaces: list[NamespaceReport]


def report(cluster: ClusterMap) -> ClusterReport:
    return ClusterReport(
        cluster.version,
        len(cluster.slots),
        [
            TargetReport(t.id, t.number, [str(e) for e in t.endpoints], cluster.slots.count(i))
            for i, t in enumerate(cluster.targets)
        ],
        [NamespaceReport(n.id, n.tenant, n.name, n.cls.value) for n in cluster.namespaces],
    )


def _load(path: Path) -> file.ClusterFile:
    try:
        return file.load(path)
    except ConfigError as e:
        fail(str(e))


def _store(path: Path, changed: file.ClusterFile, *, new: bool = False) -> None:
    try:
        if changed.target:
            changed.map()
        file.store(path, changed, new=new)
    except MapError as e:
        fail(str(e))
    except ConfigError as e:
        fail(str(e))


@app.command("init", epilog=INIT_EXAMPLES)
def init(
    path: File,
    slots: Annotated[int, typer.Option("--slots", help="A power of two; it cannot be changed later.")] = file.SLOTS,
) -> None:
    """Make a cluster file without targets. Exits 1 if it is there already."""
    if not 1 <= slots <= 65536 or slots & (slots - 1):
        fail(f"{slots} slots: it must be a power of two of at most 65536")
    _store(path, file.ClusterFile(file.ClusterSection(1, slots)), new=True)
    typer.echo(f"{path}: made; add targets with `kvfs cluster add-target {path} tcp://ADDRESS:PORT`")


@app.command("add-target", epilog=TARGET_EXAMPLES)
def add_target(
    path: File,
    endpoints: Annotated[
        list[str], typer.Argument(metavar="URL...", help="tcp://ADDRESS:PORT, rdma://ADDRESS:PORT, shm://NAME")
    ],
    number: Annotated[int, typer.Option("--number", help="Which device of its server, from 0 on.")] = 0,
    ident: Annotated[int | None, typer.Option("--id", help="In the whole cluster (default: the next).")] = None,
    lose: Annotated[
        bool, typer.Option("--lose-data", help="Also where durable namespaces or volumes have data already.")
    ] = False,
) -> None:
    """Add a target. It takes slots from the others; blocks of caches in them are missed from then on.

    Exits 1 if there are durable namespaces or volumes: nothing moves their data to the new target."""
    before = _load(path)
    if before.target and before.kept and not lose:
        fail(
            f"{', '.join(before.kept[:5])}: a new target would take slots from the others, and what is stored in them "
            "would not be found any more; add targets before such namespaces, or say --lose-data"
        )
    try:
        after = before.with_target(endpoints, ident, number)
    except MapError as e:
        fail(str(e))
    _store(path, after)
    typer.echo(f"{path}: version {after.cluster.version}, target {after.target[-1].id} added")


@app.command("add-namespace", epilog=NAMESPACE_EXAMPLES)
def add_namespace(
    path: File,
    name: Annotated[str, typer.Argument(help="TENANT/NAME, or a name of the tenant `default`.")],
    cls: Annotated[
        Class, typer.Option("--class", help="cache: blocks may be evicted; durable: they stay; volume: to be mounted.")
    ] = Class.CACHE,
) -> None:
    """Add a namespace. Its id is never given to another one."""
    tenant, plain = split_namespace(name)
    before = _load(path)
    if any((n.tenant, n.name) == (tenant, plain) for n in before.namespace):
        fail(f"namespace {tenant}/{plain} is there already")
    after = before.with_namespace(tenant, plain, cls)
    _store(path, after)
    typer.echo(f"{path}: version {after.cluster.version}, {tenant}/{plain} ({cls}) added")


@app.command("show", epilog=SHOW_EXAMPLES)
def show(path: File, json: Json = False) -> None:
    """Print what a cluster file says, with the slots of each target."""
    try:
        found = report(file.load_map(path))
    except ConfigError as e:
        fail(str(e))
    if json:
        print_json(found)
        return
    typer.echo(f"version {found.version}, {found.slots} slots")
    for target in found.targets:
        typer.echo(f"target {target.id}: {target.slots} slots, number {target.number} at {', '.join(target.endpoints)}")
    for namespace in found.namespaces:
        typer.echo(f"namespace {namespace.id}: {namespace.tenant}/{namespace.name} ({namespace.cls})")


@app.command("check", epilog=CHECK_EXAMPLES)
def check(path: File) -> None:
    """Check a cluster file. Exits 1 if servers would not start with it."""
    try:
        found = file.load_map(path)
    except ConfigError as e:
        fail(str(e))
    typer.echo(f"{path}: version {found.version}, {len(found.targets)} targets, {len(found.namespaces)} namespaces")
