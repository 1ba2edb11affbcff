"""The POSIX namespace: every operation one transaction on `kv.Store`. Called by the mount, fsck and the CLI.

Names are raw bytes. Errors are `FsError` with the errno for the kernel. The kernel checks permissions (mount option
default_permissions) and strips set-id bits; this module does what it cannot: setgid inheritance, and, for callers
that pass a `Cred`, the sticky rule on the state the transaction really sees.

Data: an unlinked regular file becomes an orphan (its record stays, nlink 0). Its owner removes the data when nobody
has it open any more and then calls `reclaim`. A shrinking `setattr` leaves a `Trim`: the caller removes the data in
that range, then calls `trimmed`; until then it must not let the file grow. `orphans` and `trims` list what a crash left.
"""

from __future__ import annotations

import errno
import secrets
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from kvfs.meta import schema
from kvfs.meta.errors import FsError
from kvfs.meta.kv import FormatError, Store, Txn, prefix_end, read, run
from kvfs.meta.op import Op, is_dir
from kvfs.meta.schema import ROOT_INO, Dentry, Inode, Orphan, Super, Trim, Usage

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
XATTR_CREATE: Final = 1
XATTR_REPLACE: Final = 2
INO_BATCH: Final = 1024
MAX_DEPTH: Final = 1_000_000
MAX_PAGE: Final = 4096
_XATTR_SPACES: Final = (b"user.", b"trusted.", b"security.")

T = TypeVar("T")
Keep = Callable[[int], bool]


def keep_none(_: int) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Cred:
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Renamed:
    moved: Inode
    other: Inode | None
    """What was replaced (nlink already lowered) or exchanged."""


def _check_name(name: bytes, special: int = errno.EINVAL) -> None:
    if not name:
        raise FsError(errno.ENOENT)
    if len(name) > schema.MAX_NAME:
        raise FsError(errno.ENAMETOOLONG)
    if name in (b".", b".."):
        raise FsError(special)
    if b"/" in name or b"\0" in name:
        raise FsError(errno.EINVAL)


class Tree:
    """The tree in a store; makes it (a root directory) when there is none and `create` says so."""

    def __init__(
        self,
        store: Store,
        *,
        create: bool = True,
        root_uid: int = 0,
        root_gid: int = 0,
        root_mode: int = 0o755,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.store = store
        self.clock = clock
        self.changes = 0
        """Committed by this object; `sync` has nothing to do while it stays the same."""
        self.on_change: Callable[[int, Inode | None], None] | None = None
        """Told of each inode that was changed, or one of its names, and how it is now, or that it is gone."""
        self.session: Final = secrets.randbits(63)
        self._shard = self.session & 0xFF
        self._ino_lock = threading.Lock()
        self._next_ino = self._ino_limit = 0

        def load(txn: Txn) -> Super:
            value = txn.get(schema.SUPER_KEY)
            if value is not None:
                return schema.decode_super(value)
            if not create:
                raise FormatError("this metadata store holds no file system.")
            now = clock()
            found = Super(schema.SCHEMA_VERSION, secrets.token_bytes(16), secrets.token_bytes(16), now)
            mode = stat.S_IFDIR | (root_mode & 0o7777)
            root = Inode(ROOT_INO, mode, 2, root_uid, root_gid, 0, 0, now, now, now, parent=ROOT_INO)
            txn.put(schema.SUPER_KEY, schema.encode(found))
            txn.put(schema.inode_key(ROOT_INO), schema.encode(root))
            txn.put(schema.ALLOC_KEY, schema.pack_u64(schema.FIRST_INO))
            txn.put(schema.usage_key(0), schema.encode(Usage(1, 0)))
            return found

        self.super: Final = run(store, load)
        if self.super.version != schema.SCHEMA_VERSION:
            raise FormatError(
                f"the file system has schema version {self.super.version}; "
                f"this kvfs reads version {schema.SCHEMA_VERSION}."
            )

    # -- plumbing

    def _change(self, fn: Callable[[Op], T]) -> T:
        def body(txn: Txn) -> tuple[T, Op]:
            op = Op(txn, self.super.name_key, self.clock())
            try:
                result = fn(op)
                op.finish(self._shard)
            except msgspec.MsgspecError as error:
                raise FsError(errno.EIO, "damaged metadata record") from error
            return result, op

        done, op = run(self.store, body)
        self.changes += 1
        if self.on_change is not None:
            for inode in op.dirty.values():
                self.on_change(inode.ino, inode)
            for ino in op.dropped:
                self.on_change(ino, None)
        return done

    def _look(self, fn: Callable[[Op], T]) -> T:
        def body(txn: Txn) -> T:
            try:
                return fn(Op(txn, self.super.name_key, 0))
            except msgspec.MsgspecError as error:
                raise FsError(errno.EIO, "damaged metadata record") from error

        return read(self.store, body)

    def _new_ino(self) -> int:
        """Never handed out twice, even when a crash takes back what was made with it: data may carry it already."""
        with self._ino_lock:
            if self._next_ino >= self._ino_limit:

                def take(txn: Txn) -> int:
                    first = schema.unpack_u64(txn.get(schema.ALLOC_KEY) or b"")
                    txn.put(schema.ALLOC_KEY, schema.pack_u64(first + INO_BATCH))
                    return first

                first = run(self.store, take)
                self.store.flush()
                self._next_ino = first
                self._ino_limit = first + INO_BATCH
            self._next_ino += 1
            return self._next_ino - 1

    # -- looking

    def lookup(self, parent: int, name: bytes) -> Inode:
        found = self.find(parent, name)
        if found is None:
            raise FsError(errno.ENOENT)
        return found

    def find(self, parent: int, name: bytes) -> Inode | None:
        """None: the directory has no such name. ENOENT: there is no such directory."""

        def body(op: Op) -> Inode | None:
            directory = op.directory(parent)
            if name == b".":
                return directory
            if name == b"..":
                return op.inode(directory.parent)
            _check_name(name)
            dentry = op.find(parent, name)
            return None if dentry is None else op.entry_inode(dentry)

        return self._look(body)

    def getattr(self, ino: int) -> Inode:
        return self._look(lambda op: op.inode(ino))

    def readlink(self, ino: int) -> bytes:
        inode = self.getattr(ino)
        if not stat.S_ISLNK(inode.mode):
            raise FsError(errno.EINVAL)
        return inode.target

    def readdir(self, ino: int, cookie: int = 0, limit: int = 256) -> list[Dentry]:
        """Entries after `cookie` (0: from the start), without . and ..; each carries its own cookie (> 2).

        A cookie stays valid whatever happens to the directory: an entry that is there throughout is returned once.
        """

        def body(op: Op) -> list[Dentry]:
            op.directory(ino)
            return self._page(op.txn, ino, cookie, min(max(limit, 1), MAX_PAGE))

        return self._look(body)

    def readdir_plus(self, ino: int, cookie: int = 0, limit: int = 256) -> list[tuple[Dentry, Inode]]:
        def body(op: Op) -> list[tuple[Dentry, Inode]]:
            op.directory(ino)
            page = self._page(op.txn, ino, cookie, min(max(limit, 1), MAX_PAGE))
            return [(dentry, op.entry_inode(dentry)) for dentry in page]

        return self._look(body)

    @staticmethod
    def _page(txn: Txn, ino: int, cookie: int, limit: int) -> list[Dentry]:
        start = schema.directory_key(ino)
        begin = start + (cookie >> 7).to_bytes(schema.HASH_BYTES, "big")
        # A page ends with a whole bucket (entries of one hash), for only a whole one can be put in cookie order.
        # Should that leave nothing, the second try has room for two full buckets more.
        for want in (limit + 2, limit + 2 + 2 * schema.LAST_SEQUENCE):
            rows = txn.range(begin, prefix_end(start), want)
            full = len(rows) == want
            if full:
                last = rows[-1][0][: schema.DENTRY_HEAD]
                while rows and rows[-1][0][: schema.DENTRY_HEAD] == last:
                    rows.pop()
            entries = [schema.unpack_dentry(key, value) for key, value in rows]
            entries = sorted((e for e in entries if e.cookie > cookie), key=lambda e: e.cookie)
            if entries or not full:
                return entries[:limit]
        return []

    def usage(self) -> Usage:
        """Inodes (orphans included) and bytes of regular files' sizes."""

        def body(op: Op) -> Usage:
            shards = [schema.decode_usage(value) for _, value in op.txn.range(b"U", prefix_end(b"U"), 256)]
            return Usage(max(0, sum(s.files for s in shards)), max(0, schema.wrap(sum(s.bytes for s in shards))))

        return self._look(body)

    # -- making

    def mknod(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, *, rdev: int = 0, target: bytes = b""
    ) -> Inode:
        """Makes any inode; `mode` says of which type (none: regular). The caller has applied the umask."""
        _check_name(name, errno.EEXIST)
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind not in (
            stat.S_IFREG,
            stat.S_IFDIR,
            stat.S_IFLNK,
            stat.S_IFCHR,
            stat.S_IFBLK,
            stat.S_IFIFO,
            stat.S_IFSOCK,
        ):
            raise FsError(errno.EINVAL)
        if kind not in (stat.S_IFCHR, stat.S_IFBLK):
            rdev = 0

        ino = 0

        def body(op: Op) -> Inode:
            directory = op.live_directory(parent)
            sequence = op.vacancy(parent, name)
            makes_dir = kind == stat.S_IFDIR
            if makes_dir and directory.nlink >= schema.MAX_NLINK:
                raise FsError(errno.EMLINK)
            bits = mode & 0o7777
            group = gid
            if directory.mode & stat.S_ISGID:
                group = directory.gid
                if makes_dir:
                    bits |= stat.S_ISGID
            now = op.now
            nonlocal ino
            ino = ino or self._new_ino()  # kept when this is repeated
            inode = Inode(ino, kind | bits, 1, uid, group, len(target), rdev, now, now, now, target=target)
            if makes_dir:
                inode.nlink = 2
                inode.parent = parent
                directory.nlink += 1
            op.enter(parent, name, inode, sequence)
            op.dirty[inode.ino] = inode
            op.changed(directory, modified=True)
            op.files += 1
            return inode

        return self._change(body)

    def create(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        return self.mknod(parent, name, stat.S_IFREG | (mode & 0o7777), uid, gid)

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        return self.mknod(parent, name, stat.S_IFDIR | (mode & 0o7777), uid, gid)

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        if not target:
            raise FsError(errno.ENOENT)
        if len(target) > schema.MAX_SYMLINK:
            raise FsError(errno.ENAMETOOLONG)
        if b"\0" in target:
            raise FsError(errno.EINVAL)
        return self.mknod(parent, name, stat.S_IFLNK | 0o777, uid, gid, target=target)

    def link(self, ino: int, parent: int, name: bytes) -> Inode:
        _check_name(name, errno.EEXIST)

        def body(op: Op) -> Inode:
            directory = op.live_directory(parent)
            inode = op.inode(ino)
            sequence = op.vacancy(parent, name)
            if is_dir(inode):
                raise FsError(errno.EPERM)
            if inode.nlink == 0:
                raise FsError(errno.ENOENT)
            if inode.nlink >= schema.MAX_NLINK:
                raise FsError(errno.EMLINK)
            inode.nlink += 1
            op.enter(parent, name, inode, sequence)
            op.changed(inode)
            op.changed(directory, modified=True)
            return inode

        return self._change(body)

    # -- removing

    @staticmethod
    def _check_sticky(directory: Inode, inode: Inode, cred: Cred | None) -> None:
        if cred is not None and directory.mode & stat.S_ISVTX and cred.uid not in (0, directory.uid, inode.uid):
            raise FsError(errno.EPERM)

    def _drop_link(self, op: Op, inode: Inode, keep: Keep) -> None:
        """One name fewer; with the last one the inode goes or becomes an orphan."""
        inode.nlink = 0 if is_dir(inode) else inode.nlink - 1
        op.changed(inode)
        if inode.nlink:
            return
        if stat.S_ISREG(inode.mode) or keep(inode.ino):
            op.txn.put(schema.orphan_key(inode.ino), schema.encode(Orphan(self.session, op.now)))
        else:
            op.drop_record(inode)

    def unlink(self, parent: int, name: bytes, *, cred: Cred | None = None, keep: Keep = keep_none) -> Inode:
        """Returns the inode as it is now. With nlink 0 a regular file is an orphan, and anything else if `keep`."""
        _check_name(name, errno.EISDIR)

        def body(op: Op) -> Inode:
            directory = op.directory(parent)
            dentry = op.must_find(parent, name)
            inode = op.entry_inode(dentry)
            if is_dir(inode):
                raise FsError(errno.EISDIR)
            self._check_sticky(directory, inode, cred)
            op.remove_entry(dentry)
            op.changed(directory, modified=True)
            self._drop_link(op, inode, keep)
            return inode

        return self._change(body)

    def rmdir(self, parent: int, name: bytes, *, cred: Cred | None = None, keep: Keep = keep_none) -> Inode:
        _check_name(name, errno.EINVAL if name == b"." else errno.ENOTEMPTY)

        def body(op: Op) -> Inode:
            directory = op.directory(parent)
            dentry = op.must_find(parent, name)
            inode = op.entry_inode(dentry)
            if not is_dir(inode):
                raise FsError(errno.ENOTDIR)
            self._check_sticky(directory, inode, cred)
            if not op.is_empty(inode.ino):
                raise FsError(errno.ENOTEMPTY)
            op.remove_entry(dentry)
            directory.nlink -= 1
            op.changed(directory, modified=True)
            self._drop_link(op, inode, keep)
            return inode

        return self._change(body)

    def reclaim(self, ino: int) -> None:
        """The orphan's data is gone: removes its record. Harmless when it is already removed."""

        self.reclaim_many([ino])

    def reclaim_many(self, inos: Sequence[int]) -> None:
        """`reclaim` of each (at most a few hundred), in one transaction."""

        def body(op: Op) -> None:
            for ino in inos:
                if op.txn.get(schema.orphan_key(ino)) is None:
                    continue
                inode = op.inode(ino)
                if inode.nlink:
                    raise FsError(errno.EBUSY)
                op.txn.delete(schema.orphan_key(ino))
                op.txn.delete(schema.trim_key(ino))
                op.drop_record(inode)

        self._change(body)

    def orphans(self, after: int = 0, limit: int = 1000) -> list[tuple[int, Orphan]]:
        rows = read(self.store, lambda txn: txn.range(schema.orphan_key(after + 1), prefix_end(b"O"), limit))
        return [(schema.key_ino(key), schema.decode_orphan(value)) for key, value in rows]

    def trims(self, after: int = 0, limit: int = 1000) -> list[tuple[int, Trim]]:
        rows = read(self.store, lambda txn: txn.range(schema.trim_key(after + 1), prefix_end(b"T"), limit))
        return [(schema.key_ino(key), schema.decode_trim(value)) for key, value in rows]

    def trimmed(self, ino: int) -> None:
        """The data beyond the size is gone."""
        run(self.store, lambda txn: txn.delete(schema.trim_key(ino)))
        self.changes += 1

    # -- renaming

    def rename(
        self,
        old_parent: int,
        old_name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int = 0,
        *,
        cred: Cred | None = None,
        keep: Keep = keep_none,
    ) -> Renamed:
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise FsError(errno.EINVAL)
        _check_name(old_name, errno.EBUSY)
        _check_name(new_name, errno.EEXIST if flags == RENAME_NOREPLACE else errno.EBUSY)

        def body(op: Op) -> Renamed:
            source_dir = op.directory(old_parent)
            target_dir = op.live_directory(new_parent)
            source = op.must_find(old_parent, old_name)
            moved = op.entry_inode(source)
            target = op.find(new_parent, new_name)
            other = op.entry_inode(target) if target is not None else None
            if flags == RENAME_NOREPLACE and other is not None:
                raise FsError(errno.EEXIST)
            if flags == RENAME_EXCHANGE and other is None:
                raise FsError(errno.ENOENT)
            self._check_sticky(source_dir, moved, cred)
            if other is not None:
                self._check_sticky(target_dir, other, cred)
            if other is moved:
                return Renamed(moved, other)
            if is_dir(moved) and old_parent != new_parent:
                self._check_not_below(op, moved.ino, new_parent)
            if flags == RENAME_EXCHANGE and other is not None:
                self._exchange(op, source_dir, old_name, moved, target_dir, new_name, other)
                return Renamed(moved, other)
            if target is not None and other is not None:
                if is_dir(moved) and not is_dir(other):
                    raise FsError(errno.ENOTDIR)
                if is_dir(other):
                    if not is_dir(moved):
                        raise FsError(errno.EISDIR)
                    if not op.is_empty(other.ino):
                        raise FsError(errno.ENOTEMPTY)
                    target_dir.nlink -= 1
                self._drop_link(op, other, keep)
            op.enter(new_parent, new_name, moved)
            op.remove_entry(source)
            if is_dir(moved):
                source_dir.nlink -= 1
                target_dir.nlink += 1
                moved.parent = new_parent
            op.changed(moved)
            op.changed(source_dir, modified=True)
            op.changed(target_dir, modified=True)
            return Renamed(moved, other)

        return self._change(body)

    def _exchange(
        self,
        op: Op,
        source_dir: Inode,
        old_name: bytes,
        moved: Inode,
        target_dir: Inode,
        new_name: bytes,
        other: Inode,
    ) -> None:
        if is_dir(other) and source_dir is not target_dir:
            self._check_not_below(op, other.ino, source_dir.ino)
        op.enter(target_dir.ino, new_name, moved)
        op.enter(source_dir.ino, old_name, other)
        if is_dir(moved):
            source_dir.nlink -= 1
            target_dir.nlink += 1
            moved.parent = target_dir.ino
        if is_dir(other):
            target_dir.nlink -= 1
            source_dir.nlink += 1
            other.parent = source_dir.ino
        op.changed(moved)
        op.changed(other)
        op.changed(source_dir, modified=True)
        op.changed(target_dir, modified=True)

    @staticmethod
    def _check_not_below(op: Op, ino: int, directory: int) -> None:
        """EINVAL when `directory` is `ino` or below it."""
        for _ in range(MAX_DEPTH):
            if directory == ino:
                raise FsError(errno.EINVAL)
            if directory == ROOT_INO:
                return
            directory = op.inode(directory).parent
        raise FsError(errno.ELOOP)

    # -- attributes

    def setattr(
        self,
        ino: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime: int | None = None,
        mtime: int | None = None,
    ) -> Inode:
        """Times in ns. Changing the owner without giving a mode clears a file's set-id bits."""

        def body(op: Op) -> Inode:
            inode = op.inode(ino)
            if size is not None:
                self._resize(op, inode, size)
            if (uid is not None or gid is not None) and mode is None and not is_dir(inode):
                inode.mode &= ~stat.S_ISUID
                if inode.mode & stat.S_IXGRP:
                    inode.mode &= ~stat.S_ISGID
            if mode is not None:
                inode.mode = stat.S_IFMT(inode.mode) | (mode & 0o7777)
            if uid is not None:
                inode.uid = uid
            if gid is not None:
                inode.gid = gid
            op.changed(inode, modified=size is not None)
            if atime is not None:
                inode.atime = atime
            if mtime is not None:
                inode.mtime = mtime
            return inode

        return self._change(body)

    @staticmethod
    def _resize(op: Op, inode: Inode, size: int) -> None:
        if is_dir(inode):
            raise FsError(errno.EISDIR)
        if not stat.S_ISREG(inode.mode) or size < 0:
            raise FsError(errno.EINVAL)
        if size > schema.MAX_SIZE:
            raise FsError(errno.EFBIG)
        if size < inode.size:
            key = schema.trim_key(inode.ino)
            value = op.txn.get(key)
            old = schema.decode_trim(value) if value is not None else Trim(size, inode.size)
            op.txn.put(key, schema.encode(Trim(min(old.keep, size), max(old.upto, inode.size))))
        op.bytes += size - inode.size
        inode.size = size

    def grow(self, ino: int, size: int) -> None:
        """The size becomes `size` if it was less; the times stay, as those of a write that was counted before."""

        def body(op: Op) -> None:
            inode = op.inode(ino)
            if size > inode.size:
                self._resize(op, inode, size)
                op.dirty[inode.ino] = inode

        self._change(body)

    def wrote(self, ino: int, end: int) -> Inode:
        """Data was written up to `end`: the size grows to it if it was less; mtime and ctime become now."""

        def body(op: Op) -> Inode:
            inode = op.inode(ino)
            if end > inode.size:
                self._resize(op, inode, end)
            elif not stat.S_ISREG(inode.mode):
                raise FsError(errno.EINVAL)
            op.changed(inode, modified=True)
            return inode

        return self._change(body)

    # -- extended attributes

    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        if flags not in (0, XATTR_CREATE, XATTR_REPLACE):
            raise FsError(errno.EINVAL)
        self._check_xattr(name)
        if len(value) > schema.MAX_XATTR_VALUE:
            raise FsError(errno.E2BIG)

        def body(op: Op) -> None:
            inode = op.inode(ino)
            key = schema.xattr_key(ino, name)
            exists = op.txn.get(key) is not None
            if exists and flags == XATTR_CREATE:
                raise FsError(errno.EEXIST)
            if not exists and flags == XATTR_REPLACE:
                raise FsError(errno.ENODATA)
            if not exists and sum(len(n) + 1 for n in self._xattr_names(op, ino)) + len(name) >= schema.MAX_XATTR_LIST:
                raise FsError(errno.ENOSPC)
            op.txn.put(key, value)
            op.changed(inode)

        self._change(body)

    def getxattr(self, ino: int, name: bytes) -> bytes:
        def body(op: Op) -> bytes:
            op.inode(ino)
            value = op.txn.get(schema.xattr_key(ino, name)) if name else None
            if value is None:
                raise FsError(errno.ENODATA)
            return value

        if len(name) > schema.MAX_NAME:
            raise FsError(errno.ERANGE)
        return self._look(body)

    def listxattr(self, ino: int) -> list[bytes]:
        def body(op: Op) -> list[bytes]:
            op.inode(ino)
            return self._xattr_names(op, ino)

        return self._look(body)

    def removexattr(self, ino: int, name: bytes) -> None:
        self._check_xattr(name)

        def body(op: Op) -> None:
            inode = op.inode(ino)
            key = schema.xattr_key(ino, name)
            if op.txn.get(key) is None:
                raise FsError(errno.ENODATA)
            op.txn.delete(key)
            op.changed(inode)

        self._change(body)

    @staticmethod
    def _check_xattr(name: bytes) -> None:
        if not 0 < len(name) <= schema.MAX_NAME or b"\0" in name:
            raise FsError(errno.ERANGE)
        if not name.startswith(_XATTR_SPACES):
            raise FsError(errno.EOPNOTSUPP)

    @staticmethod
    def _xattr_names(op: Op, ino: int) -> list[bytes]:
        start = schema.xattr_key(ino)
        return [key[len(start) :] for key, _ in op.txn.range(start, prefix_end(start), 10_000)]

    # -- durability

    def flush(self) -> None:
        """A kill of this process loses nothing done so far."""
        self.store.flush()

    def sync(self) -> None:
        """Everything done so far survives power loss."""
        self.store.sync()

    def path(self, ino: int) -> bytes:
        """Where a directory is, for messages; ENOENT when it is no longer in the tree."""

        def body(op: Op) -> bytes:
            names: list[bytes] = []
            at = op.directory(ino)
            while at.ino != ROOT_INO:
                cookie = 0
                found = None
                while found is None:
                    page = self._page(op.txn, at.parent, cookie, MAX_PAGE)
                    if not page or len(names) > MAX_DEPTH:
                        raise FsError(errno.ENOENT)
                    found = next((d.name for d in page if d.ino == at.ino), None)
                    cookie = page[-1].cookie
                names.append(found)
                at = op.directory(at.parent)
            return b"/" + b"/".join(reversed(names))

        return self._look(body)
