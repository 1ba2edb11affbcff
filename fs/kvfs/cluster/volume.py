"""Whose metadata a volume's files belong to: a mark on the chunk servers, and a note beside the metadata.

A volume's chunks say inode and number; the tree that gives them names and sizes is in one data directory. Another tree
over the same chunks would drop them as unknown and reuse their numbers. So the first mount puts the tree's id, create if
absent, as a durable block "volume" of the volume's namespace, and every mount compares. The note says which volume the
directory belongs to and whether its mark was seen: a mark that is gone means that the servers have lost data.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

import msgspec

from kvfs.cluster.map import Namespace
from kvfs.dataplane import DataPlane
from kvfs.meta import schema
from kvfs.meta.kv import Store, read

KEY: Final = b"volume"
NOTE: Final = "volume.json"


class VolumeError(Exception):
    """The volume cannot be used with this data directory; str() is one sentence that says why."""


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant: str
    name: str
    namespace: int
    claimed: bool = False

    @classmethod
    def of(cls, namespace: Namespace, *, claimed: bool) -> Note:
        return cls(namespace.tenant, namespace.name, namespace.id, claimed)


def read_note(directory: Path) -> Note | None:
    """None: this directory has nothing to do with a volume."""
    path = directory / NOTE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Note)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as e:
        raise VolumeError(f"{path} cannot be read: {e}") from e


def _write_note(directory: Path, note: Note) -> None:
    path = directory / NOTE
    new = path.with_suffix(".new")
    with open(new, "wb") as file:
        file.write(msgspec.json.encode(note))
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def attach(directory: Path, namespace: Namespace, *, others: list[Path]) -> None:
    """Before metadata is opened: the directory is this volume's from now on. `others`: files that only other data
    directories have."""
    note = read_note(directory)
    if note is None:
        for file in others:
            if file.exists():
                raise VolumeError(
                    f"{directory} holds a kvfs of its own ({file.name}): name another directory with --dir"
                )
        _write_note(directory, Note.of(namespace, claimed=False))
    elif (note.tenant, note.name, note.namespace) != (namespace.tenant, namespace.name, namespace.id):
        raise VolumeError(
            f"{directory} holds the names of volume {note.tenant}/{note.name} (namespace {note.namespace}), not of "
            f"{namespace} (namespace {namespace.id})"
        )


async def claim(directory: Path, namespace: Namespace, store: Store, data: DataPlane) -> None:
    """Compares the volume's mark with this metadata's id; puts it the first time. Before any file is touched."""
    note = read_note(directory)
    value = read(store, lambda txn: txn.get(schema.SUPER_KEY))
    assert note is not None
    assert value is not None
    ours = schema.decode_super(value).uuid
    if not note.claimed:
        store.sync()  # a mark of an id that a crash has undone would keep everybody out
        try:
            await data.block_put(namespace.id, KEY, ours, durable=True)
        except FileExistsError:
            pass  # of another length: the comparison will say so
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EROFS):
                raise
            raise VolumeError(f"volume {namespace}: no right to write to it") from e
    try:
        found = await data.block_get(namespace.id, KEY, 0, len(ours) + 1)
    except FileNotFoundError:
        raise VolumeError(
            f"volume {namespace}: its mark is gone from the chunk servers: they have lost data, or are not the ones that "
            f"{directory} belongs to"
        ) from None
    except PermissionError as e:
        raise VolumeError(f"volume {namespace}: no right to read it") from e
    if found != ours:
        raise VolumeError(f"volume {namespace} belongs to the metadata of another data directory than {directory}")
    if not note.claimed:
        _write_note(directory, Note.of(namespace, claimed=True))
