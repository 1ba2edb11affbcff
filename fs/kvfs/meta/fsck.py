"""Checks and mends the tree in a store that nobody has mounted: `check` says what is unsound, `repair` mends only that.

Nothing readable is thrown away: an inode without a name goes to /lost+found as #<ino>, a record that cannot be
decoded is set aside under a Q key. Memory: about 300 bytes per inode. Chunk data is not looked at; `Checked.files`
gives the caller what it needs to compare with the chunk store.
"""

from __future__ import annotations

import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import msgspec

from kvfs.meta import schema
from kvfs.meta.kv import MAX_RANGE, FormatError, Store, Txn, prefix_end, read, run
from kvfs.meta.op import Op, is_dir
from kvfs.meta.schema import FIRST_INO, ROOT_INO, Dentry, Inode, Orphan, Super, Usage

LOST_FOUND: Final = b"lost+found"
MAX_PASSES: Final = 10


class Kind(StrEnum):
    SUPER = "file-system record missing or unreadable"
    ROOT = "root directory missing"
    RECORD = "record cannot be decoded"
    KEY = "key of no known kind"
    ENTRY_DANGLING = "directory entry without inode"
    ENTRY_STRAY = "directory entry in no directory"
    ENTRY_NAME = "impossible name"
    ENTRY_PLACE = "directory entry under a wrong hash or sequence"
    ENTRY_TYPE = "directory entry of another type than its inode"
    DIRECTORY_TWICE = "directory with more than one name"
    DIRECTORY_PARENT = "directory with a wrong parent"
    CYCLE = "directories that contain each other"
    LOST = "inode without a name"
    NLINK = "wrong link count"
    ORPHAN_LINKED = "inode in use on the list of removed ones"
    ORPHAN_UNLISTED = "removed inode not on the list of removed ones"
    ORPHAN_EMPTY = "list of removed inodes names one that does not exist"
    XATTR_STRAY = "extended attribute without inode"
    TRIM_STRAY = "pending truncation without file"
    COUNTER = "number counter behind a number in use"
    USAGE = "wrong usage counts"
    NAMESPACE = "namespace id used twice"


@dataclass(frozen=True, slots=True)
class Finding:
    kind: Kind
    key: bytes = b""
    ino: int = 0
    want: int = 0
    """The right value, where there is one (link count, parent, counter)."""
    detail: str = ""

    def __str__(self) -> str:
        where = f" (inode {self.ino})" if self.ino else ""
        return f"{self.kind.value}{where}{': ' + self.detail if self.detail else ''}"


@dataclass(slots=True)
class Checked:
    findings: list[Finding] = field(default_factory=list[Finding])
    inodes: int = 0
    entries: int = 0
    files: dict[int, int] = field(default_factory=dict[int, int])
    """Size of each regular file, orphans included."""


@dataclass(slots=True)
class Repaired:
    mended: list[Finding]
    left: list[Finding]


def _scan(txn: Txn, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    begin, end = prefix, prefix_end(prefix)
    while rows := txn.range(begin, end, MAX_RANGE):
        yield from rows
        begin = rows[-1][0] + b"\0"


class _Check:
    def __init__(self, txn: Txn) -> None:
        self.txn = txn
        self.out = Checked()
        self.inodes: dict[int, Inode] = {}
        self.orphans: set[int] = set()
        self.links: dict[int, int] = {}
        self.subdirs: dict[int, int] = {}
        self.filled: set[int] = set()
        self.dir_entries: dict[int, list[tuple[int, bytes]]] = {}
        self.name_key: bytes | None = None

    def add(self, kind: Kind, key: bytes = b"", ino: int = 0, want: int = 0, detail: str = "") -> None:
        self.out.findings.append(Finding(kind, key, ino, want, detail))

    def run(self) -> Checked:
        self.keys()
        self.super()
        self.read_inodes()
        self.read_orphans()
        self.read_entries()
        self.directories()
        self.counts()
        self.attached()
        self.counters()
        self.namespaces()
        return self.out

    def keys(self) -> None:
        """Everything between the known prefixes."""
        known = b"ADIMNOQSTUX"
        begin = b"\0"
        for stop in [*(bytes((c,)) for c in known), b""]:
            end = stop or b"\xff" * 4097
            while rows := self.txn.range(begin, end, MAX_RANGE):
                for key, _ in rows:
                    self.add(Kind.KEY, key, detail=repr(key[:32]))
                begin = rows[-1][0] + b"\0"
            begin = prefix_end(stop) if stop else begin
        for single in (schema.ALLOC_KEY, schema.NAMESPACE_ID_KEY, schema.SUPER_KEY):
            for key, _ in _scan(self.txn, single):
                if key != single:
                    self.add(Kind.KEY, key, detail=repr(key[:32]))

    def super(self) -> None:
        value = self.txn.get(schema.SUPER_KEY)
        try:
            if value is None:
                raise msgspec.ValidationError("missing")
            found = schema.decode_super(value)
        except msgspec.MsgspecError as error:
            self.add(Kind.SUPER, schema.SUPER_KEY, detail=str(error))
            return
        if found.version != schema.SCHEMA_VERSION:
            raise FormatError(
                f"the file system has schema version {found.version}; this kvfs checks version {schema.SCHEMA_VERSION}."
            )
        self.name_key = found.name_key

    def read_inodes(self) -> None:
        for key, value in _scan(self.txn, b"I"):
            try:
                inode = schema.decode_inode(value)
                if len(key) != 9 or inode.ino != schema.key_ino(key) or not stat.S_IFMT(inode.mode):
                    raise msgspec.ValidationError("inode number or type does not fit")
            except msgspec.MsgspecError as error:
                self.add(Kind.RECORD, key, schema.key_ino(key), detail=str(error))
                continue
            self.inodes[inode.ino] = inode
            if stat.S_ISREG(inode.mode):
                self.out.files[inode.ino] = inode.size
        self.out.inodes = len(self.inodes)
        root = self.inodes.get(ROOT_INO)
        if root is None or not is_dir(root):
            self.add(Kind.ROOT, schema.inode_key(ROOT_INO), ROOT_INO)

    def read_orphans(self) -> None:
        for key, value in _scan(self.txn, b"O"):
            ino = schema.key_ino(key)
            try:
                if len(key) != 9:
                    raise msgspec.ValidationError("bad key")
                schema.decode_orphan(value)
            except msgspec.MsgspecError as error:
                self.add(Kind.RECORD, key, ino, detail=str(error))
                continue
            if ino in self.inodes:
                self.orphans.add(ino)
            else:
                self.add(Kind.ORPHAN_EMPTY, key, ino)

    def read_entries(self) -> None:
        bucket = b""
        used: set[int] = set()
        for key, value in _scan(self.txn, b"D"):
            try:
                entry = schema.unpack_dentry(key, value)
            except msgspec.MsgspecError as error:
                self.add(Kind.RECORD, key, detail=str(error))
                continue
            self.out.entries += 1
            if key[: schema.DENTRY_HEAD] != bucket:
                bucket = key[: schema.DENTRY_HEAD]
                used = set()
            fresh = entry.sequence not in used and schema.FIRST_SEQUENCE <= entry.sequence <= schema.LAST_SEQUENCE
            used.add(entry.sequence)
            self.entry(key, entry, fresh)

    def entry(self, key: bytes, entry: Dentry, fresh: bool) -> None:
        name = entry.name
        inode = self.inodes.get(entry.ino)
        parent = self.inodes.get(entry.parent)
        if inode is None:
            self.add(Kind.ENTRY_DANGLING, key, entry.ino, detail=repr(name))
            return
        if parent is None or not is_dir(parent):
            self.add(Kind.ENTRY_STRAY, key, entry.ino, detail=repr(name))
            return
        if len(name) > schema.MAX_NAME or name in (b".", b"..") or b"/" in name or b"\0" in name:
            self.add(Kind.ENTRY_NAME, key, entry.ino, detail=repr(name))
            return
        if self.name_key is not None and (not fresh or schema.name_hash(self.name_key, name) != entry.hash):
            self.add(Kind.ENTRY_PLACE, key, entry.ino, detail=repr(name))
        elif entry.dtype != inode.mode >> 12:
            self.add(Kind.ENTRY_TYPE, key, entry.ino, inode.mode >> 12, detail=repr(name))
        self.filled.add(entry.parent)
        self.links[entry.ino] = self.links.get(entry.ino, 0) + 1
        if is_dir(inode):
            self.subdirs[entry.parent] = self.subdirs.get(entry.parent, 0) + 1
            self.dir_entries.setdefault(entry.ino, []).append((entry.parent, key))

    def directories(self) -> None:
        """One name each, the right parent, no cycle."""
        up: dict[int, tuple[int, bytes]] = {}
        for ino, entries in self.dir_entries.items():
            if ino == ROOT_INO:
                for _, key in entries:
                    self.add(Kind.DIRECTORY_TWICE, key, ino, detail="the root directory has a name")
                continue
            right = [e for e in entries if e[0] == self.inodes[ino].parent]
            kept = (right or entries)[0]
            up[ino] = kept
            for entry in entries:
                if entry is not kept:
                    self.add(Kind.DIRECTORY_TWICE, entry[1], ino)
            if not right:
                self.add(Kind.DIRECTORY_PARENT, schema.inode_key(ino), ino, kept[0])
        done: set[int] = {ROOT_INO}
        for start in up:
            at = start
            path: set[int] = set()
            while at not in done and at not in path and at in up:
                path.add(at)
                at = up[at][0]
            if at in path:
                self.add(Kind.CYCLE, up[at][1], at)
            done |= path

    def counts(self) -> None:
        for ino, inode in self.inodes.items():
            links = self.links.get(ino, 0)
            key = schema.inode_key(ino)
            if ino == ROOT_INO:
                links = 1
            if ino in self.orphans and (links or ino in self.filled):
                self.add(Kind.ORPHAN_LINKED, schema.orphan_key(ino), ino)
            elif not links:
                if ino in self.orphans:
                    if inode.nlink:
                        self.add(Kind.NLINK, key, ino, 0, detail=f"{inode.nlink}, should be 0")
                elif inode.nlink or ino in self.filled:
                    self.add(Kind.LOST, key, ino)
                else:
                    self.add(Kind.ORPHAN_UNLISTED, schema.orphan_key(ino), ino)
                continue
            want = 2 + self.subdirs.get(ino, 0) if is_dir(inode) else links
            if links and inode.nlink != want:
                self.add(Kind.NLINK, key, ino, want, detail=f"{inode.nlink}, should be {want}")

    def attached(self) -> None:
        for key, _ in _scan(self.txn, b"X"):
            if schema.key_ino(key) not in self.inodes or len(key) <= 9:
                self.add(Kind.XATTR_STRAY, key, schema.key_ino(key), detail=repr(key[9:]))
        for key, value in _scan(self.txn, b"T"):
            ino = schema.key_ino(key)
            try:
                schema.decode_trim(value)
            except msgspec.MsgspecError as error:
                self.add(Kind.RECORD, key, ino, detail=str(error))
                continue
            if ino not in self.out.files or len(key) != 9:
                self.add(Kind.TRIM_STRAY, key, ino)

    def counters(self) -> None:
        used = max(self.inodes, default=0)
        value = self.txn.get(schema.ALLOC_KEY)
        if value is None or len(value) != 8 or schema.unpack_u64(value) <= used:
            self.add(Kind.COUNTER, schema.ALLOC_KEY, want=max(used + 1, FIRST_INO), detail="inode numbers")
        files = total = 0
        for key, value in _scan(self.txn, b"U"):
            try:
                usage = schema.decode_usage(value)
            except msgspec.MsgspecError as error:
                self.add(Kind.RECORD, key, detail=str(error))
                continue
            files += usage.files
            total += usage.bytes
        total = schema.wrap(total)
        right = (len(self.inodes), schema.wrap(sum(self.out.files.values())))
        if (files, total) != right:
            self.add(Kind.USAGE, detail=f"{files} inodes and {total} bytes, should be {right[0]} and {right[1]}")

    def namespaces(self) -> None:
        ids: set[int] = set()
        for key, value in _scan(self.txn, b"N"):
            try:
                found = schema.decode_namespace(value)
            except msgspec.MsgspecError as error:
                self.add(Kind.RECORD, key, detail=str(error))
                continue
            if found.id in ids:
                self.add(Kind.NAMESPACE, key, detail=f"id {found.id}")
            ids.add(found.id)
        value = self.txn.get(schema.NAMESPACE_ID_KEY)
        if ids and (value is None or len(value) != 8 or schema.unpack_u64(value) <= max(ids)):
            self.add(Kind.COUNTER, schema.NAMESPACE_ID_KEY, want=max(ids) + 1, detail="namespace ids")


def check(store: Store) -> Checked:
    """Reads the whole tree in one snapshot."""
    return read(store, lambda txn: _Check(txn).run())


def repair(store: Store) -> Repaired:
    """Mends and checks again until nothing is left or nothing helps; what is left needs a person."""
    mended: list[Finding] = []
    for _ in range(MAX_PASSES):
        found = check(store).findings
        if not found:
            break
        for finding in found:

            def body(txn: Txn, finding: Finding = finding) -> bool:
                return _mend(txn, finding)

            if run(store, body):
                mended.append(finding)
    left = check(store).findings
    store.sync()
    return Repaired(mended, left)


def _mend(txn: Txn, f: Finding) -> bool:
    match f.kind:
        case Kind.SUPER:
            _set_aside(txn, f.key)
            made = Super(schema.SCHEMA_VERSION, secrets.token_bytes(16), secrets.token_bytes(16), time.time_ns())
            txn.put(schema.SUPER_KEY, schema.encode(made))
        case Kind.ROOT:
            _set_aside(txn, f.key)
            now = time.time_ns()
            root = Inode(ROOT_INO, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 0, now, now, now, parent=ROOT_INO)
            txn.put(f.key, schema.encode(root))
        case Kind.RECORD | Kind.KEY:
            _set_aside(txn, f.key)
        case (
            Kind.ENTRY_DANGLING
            | Kind.ENTRY_STRAY
            | Kind.ENTRY_NAME
            | Kind.DIRECTORY_TWICE
            | Kind.CYCLE
            | Kind.ORPHAN_LINKED
            | Kind.ORPHAN_EMPTY
            | Kind.TRIM_STRAY
        ):
            txn.delete(f.key)
        case Kind.XATTR_STRAY | Kind.NAMESPACE:
            _set_aside(txn, f.key)
        case Kind.ENTRY_PLACE | Kind.ENTRY_TYPE | Kind.LOST:
            return _mend_entry(txn, f)
        case Kind.DIRECTORY_PARENT | Kind.NLINK:
            value = txn.get(f.key)
            if value is None:
                return False
            inode = schema.decode_inode(value)
            if f.kind is Kind.NLINK:
                inode.nlink = f.want
            else:
                inode.parent = f.want
            txn.put(f.key, schema.encode(inode))
        case Kind.ORPHAN_UNLISTED:
            txn.put(f.key, schema.encode(Orphan(0, time.time_ns())))
        case Kind.COUNTER:
            txn.put(f.key, schema.pack_u64(f.want))
        case Kind.USAGE:
            _mend_usage(txn)
    return True


def _set_aside(txn: Txn, key: bytes) -> None:
    value = txn.get(key)
    if value is None:
        return
    txn.delete(key)
    txn.put((b"Q" + key)[:4096], value)


def _mend_entry(txn: Txn, f: Finding) -> bool:
    value = txn.get(schema.SUPER_KEY)
    if value is None or txn.get(schema.inode_key(ROOT_INO)) is None:
        return False  # the next pass has them
    op = Op(txn, schema.decode_super(value).name_key, time.time_ns())
    inode = op.inode(f.ino)
    if f.kind is Kind.LOST:
        parent = _lost_found(op)
        if parent is None:
            return False
        name = b"#%d" % f.ino
        while op.find(parent.ino, name) is not None:
            name += b"~"
        op.enter(parent.ino, name, inode)
        if is_dir(inode):
            inode.parent = parent.ino
            op.dirty[inode.ino] = inode
            parent.nlink += 1
        op.changed(parent, modified=True)
    else:
        old = txn.get(f.key)
        if old is None:
            return False
        entry = schema.unpack_dentry(f.key, old)
        txn.delete(f.key)
        if op.find(entry.parent, entry.name) is None:  # else the inode, if now without a name, is found as lost
            op.enter(entry.parent, entry.name, inode)
    op.files = op.bytes = 0  # the usage counts may be damaged themselves; they are mended by counting
    op.finish(0)
    return True


def _lost_found(op: Op) -> Inode | None:
    root = op.directory(ROOT_INO)
    found = op.find(ROOT_INO, LOST_FOUND)
    if found is not None:
        value = op.txn.get(schema.inode_key(found.ino))
        inode = op.inode(found.ino) if value is not None else None
        return inode if inode is not None and is_dir(inode) else None
    last = op.txn.range(b"I", prefix_end(b"I"), 1, reverse=True)
    counter = op.txn.get(schema.ALLOC_KEY) or b""
    ino = max(
        schema.key_ino(last[0][0]) + 1 if last else FIRST_INO,
        schema.unpack_u64(counter) if len(counter) == 8 else FIRST_INO,
    )
    op.txn.put(schema.ALLOC_KEY, schema.pack_u64(ino + 1))
    now = op.now
    inode = Inode(ino, stat.S_IFDIR | 0o700, 2, root.uid, root.gid, 0, 0, now, now, now, parent=ROOT_INO)
    op.inodes[ino] = op.dirty[ino] = inode
    op.enter(ROOT_INO, LOST_FOUND, inode)
    root.nlink += 1
    op.changed(root, modified=True)
    return inode


def _mend_usage(txn: Txn) -> None:
    files = total = 0
    for _, value in _scan(txn, b"I"):
        try:
            inode = schema.decode_inode(value)
        except msgspec.MsgspecError:
            continue
        files += 1
        total += inode.size if stat.S_ISREG(inode.mode) else 0
    for key, _ in list(_scan(txn, b"U")):
        txn.delete(key)
    txn.put(schema.usage_key(0), schema.encode(Usage(files, schema.wrap(total))))
