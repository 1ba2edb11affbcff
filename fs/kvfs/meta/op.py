"""One transaction's view of the tree: inodes read once and written once, entries, counts. For tree.py and fsck.py."""

from __future__ import annotations

import errno
import stat

from kvfs.meta import schema
from kvfs.meta.errors import FsError
from kvfs.meta.kv import Txn, prefix_end
from kvfs.meta.schema import Dentry, Inode, Usage


def is_dir(inode: Inode) -> bool:
    return stat.S_ISDIR(inode.mode)


class Op:
    """One transaction's view: inodes read once, written once at the end, counts added up."""

    __slots__ = ("bytes", "dirty", "dropped", "files", "inodes", "name_key", "now", "txn")

    def __init__(self, txn: Txn, name_key: bytes, now: int) -> None:
        self.txn = txn
        self.name_key = name_key
        self.now = now
        self.inodes: dict[int, Inode] = {}
        self.dirty: dict[int, Inode] = {}
        self.dropped: list[int] = []
        """Inodes whose record is removed."""
        self.files = 0
        self.bytes = 0

    def inode(self, ino: int, missing: int = errno.ENOENT) -> Inode:
        found = self.inodes.get(ino)
        if found is None:
            value = self.txn.get(schema.inode_key(ino))
            if value is None:
                raise FsError(missing)
            found = self.inodes[ino] = schema.decode_inode(value)
        return found

    def directory(self, ino: int) -> Inode:
        found = self.inode(ino)
        if not is_dir(found):
            raise FsError(errno.ENOTDIR)
        return found

    def live_directory(self, ino: int) -> Inode:
        found = self.directory(ino)
        if found.nlink == 0:
            raise FsError(errno.ENOENT)
        return found

    def entry_inode(self, dentry: Dentry) -> Inode:
        """EIO when there is none: the tree is damaged, fsck mends it."""
        return self.inode(dentry.ino, errno.EIO)

    def find(self, parent: int, name: bytes) -> Dentry | None:
        key = schema.directory_key(parent) + schema.name_hash(self.name_key, name) + name
        value = self.txn.get(key)
        return None if value is None else schema.unpack_dentry(key, value)

    def must_find(self, parent: int, name: bytes) -> Dentry:
        found = self.find(parent, name)
        if found is None:
            raise FsError(errno.ENOENT)
        return found

    def _place(self, bucket: bytes, name: bytes) -> tuple[int, bool]:
        """The sequence number of a name among those of its hash, and whether it is there."""
        used: set[int] = set()
        for key, value in self.txn.range(bucket, prefix_end(bucket), schema.LAST_SEQUENCE):
            dentry = schema.unpack_dentry(key, value)
            if dentry.name == name:
                return dentry.sequence, True
            used.add(dentry.sequence)
        sequence = schema.FIRST_SEQUENCE
        while sequence in used:
            sequence += 1
        return sequence, False

    def vacancy(self, parent: int, name: bytes) -> int:
        """The sequence number for `enter`; EEXIST when the name is taken."""
        sequence, exists = self._place(schema.directory_key(parent) + schema.name_hash(self.name_key, name), name)
        if exists:
            raise FsError(errno.EEXIST)
        return sequence

    def enter(self, parent: int, name: bytes, inode: Inode, sequence: int = 0) -> None:
        """Sets the entry, new or not."""
        bucket = schema.directory_key(parent) + schema.name_hash(self.name_key, name)
        sequence = sequence or self._place(bucket, name)[0]
        if sequence > schema.LAST_SEQUENCE:
            raise FsError(errno.ENOSPC)
        self.txn.put(bucket + name, schema.pack_dentry(inode.ino, inode.mode >> 12, sequence))

    def remove_entry(self, dentry: Dentry) -> None:
        self.txn.delete(schema.directory_key(dentry.parent) + dentry.hash + dentry.name)

    def is_empty(self, ino: int) -> bool:
        start = schema.directory_key(ino)
        return not self.txn.range(start, prefix_end(start), 1)

    def changed(self, inode: Inode, *, modified: bool = False) -> None:
        """The inode is to be written; its ctime, and its mtime if `modified`, become now."""
        inode.ctime = self.now
        if modified:
            inode.mtime = self.now
        self.dirty[inode.ino] = inode

    def drop_record(self, inode: Inode) -> None:
        self.dirty.pop(inode.ino, None)
        self.dropped.append(inode.ino)
        self.inodes.pop(inode.ino, None)
        self.txn.delete(schema.inode_key(inode.ino))
        start = schema.xattr_key(inode.ino)
        for key, _ in self.txn.range(start, prefix_end(start), 10_000):
            self.txn.delete(key)
        self.files -= 1
        if stat.S_ISREG(inode.mode):
            self.bytes -= inode.size

    def finish(self, shard: int) -> None:
        for ino, inode in self.dirty.items():
            self.txn.put(schema.inode_key(ino), schema.encode(inode))
        if self.files or self.bytes:
            key = schema.usage_key(shard)
            value = self.txn.get(key)
            old = schema.decode_usage(value) if value is not None else Usage(0, 0)
            self.txn.put(key, schema.encode(Usage(old.files + self.files, schema.wrap(old.bytes + self.bytes))))
