"""Block namespaces: which tenant/name has which 32-bit id and class. An id is never used again."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvfs.meta import schema
from kvfs.meta.errors import FsError
from kvfs.meta.kv import MAX_RANGE, Store, Txn, prefix_end, read, run
from kvfs.meta.schema import Namespace, NamespaceClass

FIRST_ID: Final = 16
"""Smaller ids are for the system (the POSIX tree's own chunks)."""
MAX_NAMESPACES: Final = MAX_RANGE
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z")


@dataclass(frozen=True, slots=True)
class NamedNamespace:
    tenant: str
    name: str
    namespace: Namespace


def check_name(name: str) -> None:
    """1 to 64 of A-Z a-z 0-9 . _ -, not beginning with . or - (they are directory names in the mount)."""
    if not _NAME.match(name):
        raise FsError(errno.EINVAL, f"{name[:80]!r} is no tenant or namespace name (1 to 64 of A-Z a-z 0-9 . _ -)")


def create(
    store: Store, tenant: str, name: str, cls: NamespaceClass = NamespaceClass.CACHE, *, exist_ok: bool = True
) -> Namespace:
    """With `exist_ok` an existing one of the same class is returned; anything else is EEXIST."""
    check_name(tenant)
    check_name(name)

    def body(txn: Txn) -> Namespace:
        key = schema.namespace_key(tenant, name)
        value = txn.get(key)
        if value is not None:
            found = schema.decode_namespace(value)
            if not exist_ok or found.cls != cls:
                raise FsError(errno.EEXIST, f"namespace {tenant}/{name} exists with class {found.cls}")
            return found
        if len(txn.range(b"N", prefix_end(b"N"), MAX_NAMESPACES)) >= MAX_NAMESPACES:
            raise FsError(errno.ENOSPC, f"more than {MAX_NAMESPACES} namespaces")
        counter = txn.get(schema.NAMESPACE_ID_KEY)
        number = schema.unpack_u64(counter) if counter is not None else FIRST_ID
        made = Namespace(number, cls, time.time_ns())
        txn.put(schema.NAMESPACE_ID_KEY, schema.pack_u64(number + 1))
        txn.put(key, schema.encode(made))
        return made

    done = run(store, body)
    store.flush()  # an id must not be given again when its blocks outlive a crash
    return done


def mirror(store: Store, wanted: Sequence[tuple[str, str, int, NamespaceClass]]) -> None:
    """Exactly these, with ids that somebody else has given: (tenant, name, id, class)."""
    records = {schema.namespace_key(tenant, name): (number, cls) for tenant, name, number, cls in wanted}
    if len(records) > MAX_NAMESPACES:
        raise FsError(errno.ENOSPC, f"more than {MAX_NAMESPACES} namespaces")

    def body(txn: Txn) -> None:
        right: set[bytes] = set()
        for key, value in txn.range(b"N", prefix_end(b"N"), MAX_NAMESPACES):
            known = schema.decode_namespace(value)
            if key not in records:
                txn.delete(key)
            elif records[key] == (known.id, known.cls):
                right.add(key)
        for key, (number, cls) in records.items():
            if key in right:
                continue
            txn.put(key, schema.encode(Namespace(number, cls, time.time_ns())))
        counter = txn.get(schema.NAMESPACE_ID_KEY)
        next_id = max([FIRST_ID, *(number + 1 for _, _, number, _ in wanted)])
        if counter is None or schema.unpack_u64(counter) < next_id:
            txn.put(schema.NAMESPACE_ID_KEY, schema.pack_u64(next_id))

    run(store, body)


def get(store: Store, tenant: str, name: str) -> Namespace | None:
    check_name(tenant)
    check_name(name)
    value = read(store, lambda txn: txn.get(schema.namespace_key(tenant, name)))
    return None if value is None else schema.decode_namespace(value)


def list_all(store: Store, tenant: str | None = None) -> list[NamedNamespace]:
    """In order of tenant and name."""
    prefix = b"N"
    if tenant is not None:
        check_name(tenant)
        prefix = schema.namespace_key(tenant, "")
    out: list[NamedNamespace] = []
    for key, value in read(store, lambda txn: txn.range(prefix, prefix_end(prefix), MAX_NAMESPACES)):
        owner, _, name = key[1:].decode().partition("/")
        out.append(NamedNamespace(owner, name, schema.decode_namespace(value)))
    return out


def remove(store: Store, tenant: str, name: str) -> None:
    """Forgets the name; its blocks must be gone already. ENOENT when there is none."""
    check_name(tenant)
    check_name(name)

    def body(txn: Txn) -> None:
        key = schema.namespace_key(tenant, name)
        if txn.get(key) is None:
            raise FsError(errno.ENOENT, f"no namespace {tenant}/{name}")
        txn.delete(key)

    run(store, body)
