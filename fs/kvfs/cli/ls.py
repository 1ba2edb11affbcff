"""`kvfs ls`: namespaces, or the blocks of one."""

import time
from typing import Annotated

import msgspec
import typer

from kvfs import daemon
from kvfs.cli.node import Directory, known_namespaces, resolve, split_namespace
from kvfs.cli.output import fail, print_json

EXAMPLES = "Examples:  kvfs ls   |   kvfs ls --long   |   kvfs ls my/cache --long   |   kvfs ls my/cache --json"


class Summary(msgspec.Struct, frozen=True):
    """A namespace; counts only with --long."""

    namespace: str
    blocks: int | None = None
    bytes: int | None = None


def ls(
    namespace: Annotated[
        str | None, typer.Argument(help="TENANT/NAME, or a name of the tenant `default` (none: list namespaces).")
    ] = None,
    long: Annotated[bool, typer.Option("--long", "-l", help="Sizes and times; of namespaces, what they hold.")] = False,
    directory: Directory = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")] = False,
) -> None:
    """List namespaces, or a namespace's blocks by key. Exits 1 if there is no such namespace."""
    from kvfs_tools.listing import Block, blocks

    place = resolve(directory)
    known = known_namespaces(place)

    def listed(name: str) -> list[Block]:
        try:
            # A block that moves while it is listed may come twice.
            return sorted(
                {block.key: block for block in blocks(daemon.Layout(place).socket, *split_namespace(name))}.values()
            )
        except OSError as e:
            fail(f"cannot list {name} of {place}: {e.strerror or e}")

    if namespace is not None:
        tenant, name = split_namespace(namespace)
        if f"{tenant}/{name}" not in known:
            fail(f"no namespace {tenant}/{name} in {place}")
        found = listed(f"{tenant}/{name}")
        if json:
            print_json(found)
            return
        for block in found:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(block.mtime))
            typer.echo(f"{block.size:>9} {when} {block.key}" if long else block.key)
        return
    summaries = [Summary(name) for name in known]
    if long:
        held = {name: listed(name) for name in known}
        summaries = [Summary(name, len(part), sum(block.size for block in part)) for name, part in held.items()]
    if json:
        print_json(summaries)
        return
    for s in summaries:
        typer.echo(f"{s.blocks:>9} blocks {s.bytes:>14} bytes {s.namespace}" if long else s.namespace)
