"""`kvfs put`, `get`, `stat`, `rm`: single blocks of a running kvfs, over the ring."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvfs.cli.node import Directory, configured
from kvfs.cli.output import fail

PUT_EXAMPLES = (
    "Examples:  kvfs put my/cache 0a1b2c block.bin   |   head -c 64K /dev/urandom | kvfs put my/cache 0a1b2c -"
)
GET_EXAMPLES = "Examples:  kvfs get my/cache 0a1b2c > block.bin   |   kvfs get my/cache 0a1b2c -o block.bin"
STAT_EXAMPLES = "Examples:  kvfs stat my/cache 0a1b2c   |   kvfs stat --dir /data/kvfs my/cache 0a1b2c"
RM_EXAMPLES = "Examples:  kvfs rm my/cache 0a1b2c   |   kvfs rm --dir /data/kvfs my/cache 0a1b2c"

Namespace = Annotated[str, typer.Argument(help="TENANT/NAME, or a name of the tenant `default`.")]
Key = Annotated[str, typer.Argument(help="The block's key in hexadecimal.")]


def _open(directory: Path | None, namespace: str):
    from kvfs_usrbio import BlockStore

    place = (directory or configured().dir).absolute()
    try:
        return BlockStore.open(place, namespace)
    except OSError as e:
        fail(f"cannot open {namespace} of {place}: {e.strerror or e}")
    except ValueError as e:
        fail(str(e), code=2)


def _key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        fail(f"{text[:80]!r} is not a key in hexadecimal", code=2)
    if not key:
        fail("a key has at least one byte", code=2)
    return key


def put(
    namespace: Namespace,
    key: Key,
    source: Annotated[str, typer.Argument(help="File to store, or - for standard input.")],
    directory: Directory = None,
) -> None:
    """Store a block durably, unless one of this key is there. Exits 1 if another length is there or space is out."""
    name = _key(key)
    try:
        value = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as e:
        fail(f"cannot read {source}: {e.strerror}")
    result = _open(directory, namespace).put([name], [value], durable=True)[0]
    if result < 0:
        fail(f"{key}: {os.strerror(-result)}")
    typer.echo("stored" if result else "was there")


def get(
    namespace: Namespace,
    key: Key,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write (default: standard output).")
    ] = None,
    directory: Directory = None,
) -> None:
    """Read a block. Exits 1 if there is none."""
    name = _key(key)
    store = _open(directory, namespace)
    size = store.exists([name])[0]
    if size < 0:
        fail(f"{key}: no such block in {namespace}")
    value = bytearray(size)
    result = store.get([name], [value])[0]
    if result < 0:
        fail(f"{key}: {os.strerror(-result)}")
    if output is None:
        sys.stdout.buffer.write(value)
    else:
        output.write_bytes(value)


def stat(namespace: Namespace, key: Key, directory: Directory = None) -> None:
    """Print a block's size in bytes. Exits 1 if there is none."""
    size = _open(directory, namespace).exists([_key(key)])[0]
    if size < 0:
        fail(f"{key}: no such block in {namespace}")
    typer.echo(size)


def rm(namespace: Namespace, key: Key, directory: Directory = None) -> None:
    """Evict a block. Exits 1 if there is none."""
    if _open(directory, namespace).evict([_key(key)])[0] < 0:
        fail(f"{key}: no such block in {namespace}")
