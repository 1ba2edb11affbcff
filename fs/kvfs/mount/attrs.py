"""What the mount's handlers share: kernel attributes from inode records, and errors turned into errnos."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from types import CoroutineType
from typing import Any, Final, ParamSpec, TypeVar

import pyfuse3
import structlog

from kvfs.meta.kv import FullError
from kvfs.meta.schema import Inode

TIMEOUT_S: Final = 60.0
"""How long the kernel keeps names and attributes. It makes every change of the tree itself, except writes of clients,
which have them dropped."""
VIEW_TIMEOUT_S: Final = 1.0
"""Blocks come and go without the kernel."""
BLOCK_SIZE: Final = 4096

P = ParamSpec("P")
R = TypeVar("R")

log = structlog.get_logger("kvfs.mount")


def error_number(error: Exception, operation: object) -> int:
    """The errno for the caller of an operation that has raised."""
    if isinstance(error, pyfuse3.FUSEError):
        return error.errno
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if isinstance(error, FullError):
        log.error("metadata store is full", operation=operation, error=str(error))
        return errno.ENOSPC
    log.error("operation failed", operation=operation, exc_info=error)
    return errno.EIO


def guarded(handler: Callable[P, CoroutineType[Any, Any, R]]) -> Callable[P, CoroutineType[Any, Any, R]]:
    """Whatever a handler raises becomes an errno for the caller: an unexpected exception must not end the mount."""

    @functools.wraps(handler)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise pyfuse3.FUSEError(error_number(error, handler.__name__)) from error

    return wrapper


def attributes(inode: Inode, timeout_s: float = TIMEOUT_S) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(inode.ino)
    entry.generation = 0
    entry.entry_timeout = timeout_s
    entry.attr_timeout = timeout_s
    entry.st_mode = pyfuse3.ModeT(inode.mode)
    entry.st_nlink = inode.nlink
    entry.st_uid = inode.uid
    entry.st_gid = inode.gid
    entry.st_rdev = inode.rdev
    entry.st_size = inode.size
    entry.st_blksize = BLOCK_SIZE
    entry.st_blocks = (inode.size + 511) // 512
    entry.st_atime_ns = inode.atime
    entry.st_mtime_ns = inode.mtime
    entry.st_ctime_ns = inode.ctime
    return entry
