"""`kvfs put`, `get`, `stat`, `rm`: single blocks of a running kvfs, over the ring."""

import contextlib
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvfs.cli.node import Directory, known_namespaces, resolve, split_namespace
from kvfs.cli.output import USAGE, fail

if TYPE_CHECKING:
    from kvfs_usrbio import BlockStore

PUT_EXAMPLES = (
    "Examples:  kvfs put my/cache 0a1b2c block.bin   |   head -c 64K /dev/urandom | kvfs put my/cache 0a1b2c -"
)
GET_EXAMPLES = "Examples:  kvfs get my/cache 0a1b2c > block.bin   |   kvfs get my/cache 0a1b2c -o block.bin"
STAT_EXAMPLES = "Examples:  kvfs stat my/cache 0a1b2c   |   kvfs stat --dir /mnt/kvfs my/cache 0a1b2c"
RM_EXAMPLES = "Examples:  kvfs rm my/cache 0a1b2c   |   kvfs rm --dir /mnt/kvfs my/cache 0a1b2c"
VALUE_MAX = 16 << 20

Namespace = Annotated[str, typer.Argument(help="TENANT/NAME, or a name of the tenant `default`.")]
Key = Annotated[str, typer.Argument(help="The block's key in hexadecimal.")]


@contextlib.contextmanager
def _opened(directory: Path | None, namespace: str, *, make: bool = False) -> Generator["BlockStore"]:
    """The namespace's store; what goes wrong with it ends the command. Only with `make` is a new namespace made."""
    from kvfs_usrbio import BlockStore

    place = resolve(directory)
    tenant, name = split_namespace(namespace)
    known = known_namespaces(place)
    if not make and f"{tenant}/{name}" not in known:
        fail(f"no namespace {tenant}/{name} in {place}")
    try:
        with BlockStore.open(place, f"{tenant}/{name}") as store:
            yield store
    except OSError as e:
        fail(f"{namespace} of {place}: {e.strerror or e}")
    except ValueError as e:
        fail(str(e), code=USAGE)


def _key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        fail(f"{text[:80]!r} is not a key in hexadecimal", code=USAGE)
    if not key:
        fail("a key has at least one byte", code=USAGE)
    return key


def _value(source: str) -> bytes:
    """No more than shows that it is too long: the source may have no end."""
    try:
        if source == "-":
            value = sys.stdin.buffer.read(VALUE_MAX + 1)
        else:
            with Path(source).open("rb") as file:
                value = file.read(VALUE_MAX + 1)
    except OSError as e:
        fail(f"cannot read {source}: {e.strerror}")
    if not 1 <= len(value) <= VALUE_MAX:
        fail(f"{source} has {'more than 16 MiB' if value else 'no bytes'}; a block has 1 byte to 16 MiB")
    return value


def put(
    namespace: Namespace,
    key: Key,
    source: Annotated[str, typer.Argument(help="File to store, or - for standard input.")],
    directory: Directory = None,
) -> None:
    """Store a block durably, unless one of this key is there. Exits 1 if another length is there or space is out."""
    name = _key(key)
    value = _value(source)
    with _opened(directory, namespace, make=True) as store:
        result = store.put([name], [value], durable=True)[0]
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
    with _opened(directory, namespace) as store:
        size = store.exists([name])[0]
        if size < 0:
            fail(f"{key}: no such block in {namespace}")
        value = bytearray(size)
        result = store.get([name], [value])[0]
    if result < 0:
        fail(f"{key}: {os.strerror(-result)}")
    try:
        if output is None:
            sys.stdout.buffer.write(value)
            sys.stdout.buffer.flush()
        else:
            output.write_bytes(value)
    except OSError as e:
        if output is None:  # else the interpreter tries again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(f"cannot write {output or 'standard output'}: {e.strerror}")


def stat(
    namespace: Namespace,
    key: Key,
    directory: Directory = None,
) -> None:
    """Print a block's size in bytes. Exits 1 if there is none."""
    name = _key(key)
    with _opened(directory, namespace) as store:
        size = store.exists([name])[0]
    if size < 0:
        fail(f"{key}: no such block in {namespace}")
    typer.echo(size)


def rm(namespace: Namespace, key: Key, directory: Directory = None) -> None:
    """Evict a block. Exits 1 if there is none."""
    name = _key(key)
    with _opened(directory, namespace) as store:
        result = store.evict([name])[0]
    if result < 0:
        fail(f"{key}: no such block in {namespace}")
