"""Bytes of the FUSE answers that tell of inodes and directory entries. Layouts and names: linux/fuse.h."""

from __future__ import annotations

import stat
from struct import Struct
from typing import Final

import pyfuse3

from kvfs.meta.schema import Dentry, Inode

from .attrs import BLOCK_SIZE, TIMEOUT_S

_ATTR: Final = "QQQqqqIIIIIIIIII"
_ATTR_OUT: Final = Struct("<QII" + _ATTR)
_ENTRY_OUT: Final = Struct("<QQQQII" + _ATTR)
_DIRENT: Final = Struct("<QQII")
_SECOND: Final = 1_000_000_000
_VALID_S: Final = int(TIMEOUT_S)
NO_ENTRY: Final = _ENTRY_OUT.pack(0, 0, _VALID_S, 0, 0, 0, *([0] * 16))
"""The kernel may remember that there is no such name: only it can make one."""
SMALLEST_DIRENT: Final = _DIRENT.size + 8
SMALLEST_ENTRY: Final = _ENTRY_OUT.size + SMALLEST_DIRENT
UNKNOWN_INO: Final = 0xFFFFFFFF
"""As libfuse says where only a lookup makes a number."""


def _attr(inode: Inode) -> tuple[int, ...]:
    atime, atime_ns = divmod(inode.atime, _SECOND)
    mtime, mtime_ns = divmod(inode.mtime, _SECOND)
    ctime, ctime_ns = divmod(inode.ctime, _SECOND)
    return (
        inode.ino,
        inode.size,
        (inode.size + 511) // 512,
        atime,
        mtime,
        ctime,
        atime_ns,
        mtime_ns,
        ctime_ns,
        inode.mode,
        inode.nlink,
        inode.uid,
        inode.gid,
        inode.rdev,
        BLOCK_SIZE,
        0,
    )


def attr_out(inode: Inode) -> bytes:
    return _ATTR_OUT.pack(_VALID_S, 0, 0, *_attr(inode))


def entry_out(inode: Inode) -> bytes:
    return _ENTRY_OUT.pack(inode.ino, 0, _VALID_S, _VALID_S, 0, 0, *_attr(inode))


def dirent(ino: int, cookie: int, name: bytes, dtype: int) -> bytes:
    return _DIRENT.pack(ino, cookie, len(name), dtype) + name.ljust((len(name) + 7) & ~7, b"\0")


def direntplus(dentry: Dentry, inode: Inode) -> bytes:
    return entry_out(inode) + dirent(inode.ino, dentry.cookie, dentry.name, stat.S_IFMT(inode.mode) >> 12)


def view_entry(entry: pyfuse3.EntryAttributes) -> bytes:
    ino = int(entry.st_ino)
    seconds, part = divmod(int(entry.entry_timeout * _SECOND), _SECOND)
    inode = Inode(
        0,
        entry.st_mode,
        entry.st_nlink,
        entry.st_uid,
        entry.st_gid,
        entry.st_size,
        0,
        entry.st_atime_ns,
        entry.st_mtime_ns,
        entry.st_ctime_ns,
    )
    return _ENTRY_OUT.pack(ino, 0, seconds, seconds, part, part, ino, *_attr(inode)[1:])
