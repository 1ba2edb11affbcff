"""The mount's FUSE operations: POSIX tree here, everything below `/.kvfs` in `blocks`.

The kernel checks permissions (default_permissions) and applies the umask. It also says where an O_APPEND write goes:
a page dirtied through mmap may come in over an O_APPEND handle, so the offset of a write is never second-guessed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Final

import pyfuse3
from pyfuse3 import FileHandleT, FileNameT, FlagT, InodeT, ModeT, XAttrNameT

from kvfs.dataplane import DataPlane
from kvfs.meta.errors import FsError
from kvfs.meta.schema import MAX_NAME, Inode
from kvfs.meta.tree import Tree

from .attrs import BLOCK_SIZE, attributes, guarded
from .blocks import VIEW_BIT, VIEW_NAME, BlockHandle, BlockView, InfoHandle, ViewDir
from .files import OpenFile, OpenFiles

READDIR_PAGE: Final = 128
MAX_HANDLES: Final = 1 << 20
CAPABILITY: Final = b"security.capability"


@dataclass(slots=True)
class FileHandle:
    file: OpenFile


@dataclass(slots=True)
class DirHandle:
    ino: int


Handle = FileHandle | DirHandle | BlockHandle | InfoHandle | ViewDir


class MountOps(pyfuse3.Operations):
    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, tree: Tree, data: DataPlane, view: BlockView, files: OpenFiles) -> None:
        super().__init__()
        self.tree = tree
        self.data = data
        self.view = view
        self.files = files
        self._handles: dict[int, Handle] = {}
        self._last_handle = 0
        self._open_dirs: dict[int, int] = {}
        self._removed_dirs: set[int] = set()

    # -- handles

    def _add(self, handle: Handle) -> FileHandleT:
        self._last_handle += 1
        self._handles[self._last_handle] = handle
        return FileHandleT(self._last_handle)

    def _check_handles(self) -> None:
        if len(self._handles) >= MAX_HANDLES:
            raise FsError(errno.ENFILE)

    def handle(self, fh: int) -> Handle:
        handle = self._handles.get(fh)
        if handle is None:
            raise FsError(errno.EBADF)
        return handle

    def _entry(self, inode: Inode) -> pyfuse3.EntryAttributes:
        return attributes(self.files.overlay(inode))

    # -- names

    @guarded
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if parent_inode & VIEW_BIT:
            return await self.view.lookup(parent_inode, name)
        if parent_inode == pyfuse3.ROOT_INODE and name == VIEW_NAME:
            return self.view.root()
        return self._entry(self.tree.lookup(parent_inode, name))

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for ino, count in inode_list:
            if ino & VIEW_BIT:
                self.view.forget(ino, count)

    @guarded
    async def getattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if inode & VIEW_BIT:
            return self.view.getattr(inode)
        return self._entry(self.tree.getattr(inode))

    @guarded
    async def setattr(
        self,
        inode: InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        if inode & VIEW_BIT:
            return self.view.setattr(inode, attr.st_size if fields.update_size else None)
        if fields.update_size:
            record = self.tree.getattr(inode)
            if stat.S_ISREG(record.mode):
                await self.files.resize(record, attr.st_size)
            else:
                self.tree.setattr(inode, size=attr.st_size)
        file = self.files.held(inode)
        if file is not None:
            self.files.persist(file)
        changed = self.tree.setattr(
            inode,
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime=attr.st_atime_ns if fields.update_atime else None,
            mtime=attr.st_mtime_ns if fields.update_mtime else None,
        )
        return self._entry(changed)

    @guarded
    async def readlink(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileNameT:
        if inode & VIEW_BIT:
            raise FsError(errno.EINVAL)
        return FileNameT(self.tree.readlink(inode))

    def _may_make(self, parent: int, name: bytes) -> None:
        if parent & VIEW_BIT:
            raise FsError(errno.EPERM)
        if parent == pyfuse3.ROOT_INODE and name == VIEW_NAME:
            raise FsError(errno.EEXIST)

    def _may_remove(self, parent: int, name: bytes) -> None:
        if parent & VIEW_BIT or (parent == pyfuse3.ROOT_INODE and name == VIEW_NAME):
            raise FsError(errno.EPERM)

    @guarded
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self._may_make(parent_inode, name)
        return self._entry(self.tree.mknod(parent_inode, name, mode, ctx.uid, ctx.gid, rdev=rdev))

    @guarded
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if parent_inode & VIEW_BIT:
            return self.view.mkdir(parent_inode, name)
        self._may_make(parent_inode, name)
        return self._entry(self.tree.mkdir(parent_inode, name, mode, ctx.uid, ctx.gid))

    @guarded
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self._may_make(parent_inode, name)
        return self._entry(self.tree.symlink(parent_inode, name, target, ctx.uid, ctx.gid))

    @guarded
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if inode & VIEW_BIT:
            raise FsError(errno.EPERM)
        self._may_make(new_parent_inode, new_name)
        return self._entry(self.tree.link(inode, new_parent_inode, new_name))

    def _gone(self, inode: Inode) -> Awaitable[None] | None:
        """A name is gone. Returns what must be awaited, if anything."""
        if inode.nlink:
            return None
        if stat.S_ISREG(inode.mode):
            return self.files.removed(inode)
        if inode.ino in self._open_dirs:
            self._removed_dirs.add(inode.ino)
        return None

    def unlink_now(self, parent: int, name: bytes) -> Awaitable[None] | None:
        """Returns what must be awaited, if anything."""
        self._may_remove(parent, name)
        return self._gone(self.tree.unlink(parent, name))

    @guarded
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext) -> None:
        if parent_inode & VIEW_BIT:
            await self.view.unlink(parent_inode, name)
            return
        later = self.unlink_now(parent_inode, name)
        if later is not None:
            await later

    @guarded
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext) -> None:
        self._may_remove(parent_inode, name)
        self._gone(self.tree.rmdir(parent_inode, name, keep=self._open_dirs.__contains__))

    @guarded
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        self._may_remove(parent_inode_old, name_old)
        self._may_remove(parent_inode_new, name_new)
        if self.files.any_held():  # a file written and renamed over another must not be stored there without its size
            file = self.files.held(self.tree.lookup(parent_inode_old, name_old).ino)
            if file is not None:
                await self.data.land(file.ino)
                if self.files.held(file.ino) is file:  # else its last close has been stored meanwhile
                    self.files.persist(file)
        done = self.tree.rename(
            parent_inode_old, name_old, parent_inode_new, name_new, flags, keep=self._open_dirs.__contains__
        )
        later = self._gone(done.other) if done.other is not None else None
        if later is not None:
            await later

    # -- files

    def create_file(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> tuple[FileHandleT, Inode]:
        self._check_handles()
        self._may_make(parent, name)
        inode = self.tree.create(parent, name, mode, uid, gid)
        file = self.files.acquire(inode)
        self.files.set_no_capability(file, True)
        return self._add(FileHandle(file)), inode

    def open_file(self, ino: int) -> FileHandleT:
        self._check_handles()
        record = self.tree.getattr(ino)
        if not stat.S_ISREG(record.mode):
            raise FsError(errno.EINVAL)
        return self._add(FileHandle(self.files.acquire(record)))

    async def empty(self, ino: int, uid: int) -> None:
        """O_TRUNC: the kernel leaves it to us (FUSE_ATOMIC_O_TRUNC, which libfuse asks for)."""
        record = self.tree.getattr(ino)
        if not stat.S_ISREG(record.mode):
            raise FsError(errno.EINVAL)
        await self.files.resize(record, 0)
        mode = record.mode & ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            mode &= ~stat.S_ISGID
        if uid and mode != record.mode:  # a truncation by another than root takes the set-id bits
            self.tree.setattr(ino, mode=stat.S_IMODE(mode))

    def flush_file(self, fh: int) -> None:
        handle = self.handle(fh)
        if isinstance(handle, FileHandle):
            self.files.persist(handle.file)

    def release_now(self, fh: int) -> Awaitable[None] | None:
        """Returns what must be awaited, if anything."""
        handle = self._handles.pop(fh, None)
        if isinstance(handle, FileHandle):
            return self.files.release(handle.file)
        if isinstance(handle, BlockHandle):
            self.view.release(handle)
        return None

    @guarded
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        if parent_inode & VIEW_BIT:
            self._check_handles()
            handle, entry = await self.view.create(parent_inode, name, flags)
            return pyfuse3.FileInfo(fh=self._add(handle), direct_io=True), entry
        fh, inode = self.create_file(parent_inode, name, mode, ctx.uid, ctx.gid)
        return pyfuse3.FileInfo(fh=fh), attributes(inode)

    @guarded
    async def open(self, inode: InodeT, flags: FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if inode & VIEW_BIT:
            self._check_handles()
            handle = self.view.open(inode, flags)
            return pyfuse3.FileInfo(fh=self._add(handle), keep_cache=True)
        if flags & os.O_TRUNC:
            await self.empty(inode, ctx.uid)
        # Pages read before are as good: only the kernel writes, and clients' writes drop them.
        return pyfuse3.FileInfo(fh=self.open_file(inode), keep_cache=True)

    @guarded
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        handle = self.handle(fh)
        if isinstance(handle, FileHandle):
            return await self.data.read(handle.file.ino, off, size)
        if isinstance(handle, BlockHandle):
            return await self.view.read(handle, off, size)
        if isinstance(handle, InfoHandle):
            return self.view.read_info(off, size)
        raise FsError(errno.EISDIR)

    @guarded
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        handle = self.handle(fh)
        if isinstance(handle, FileHandle):
            return await self.data.write(handle.file.ino, off, buf)
        if isinstance(handle, BlockHandle):
            return self.view.write(handle, off, buf)
        raise FsError(errno.EBADF)

    @guarded
    async def flush(self, fh: FileHandleT) -> None:
        handle = self.handle(fh)
        if isinstance(handle, BlockHandle):
            await self.view.flush(handle)
        else:
            self.flush_file(fh)

    @guarded
    async def release(self, fh: FileHandleT) -> None:
        later = self.release_now(fh)
        if later is not None:
            await later

    @guarded
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        handle = self.handle(fh)
        if isinstance(handle, FileHandle):
            await self.files.fsync(handle.file, datasync)
        elif isinstance(handle, BlockHandle):
            await self.view.fsync(handle)

    # -- directories

    def open_directory(self, ino: int) -> FileHandleT:
        self._check_handles()
        self._open_dirs[ino] = self._open_dirs.get(ino, 0) + 1
        return self._add(DirHandle(ino))

    def close_directory(self, fh: int) -> None:
        handle = self._handles.pop(fh, None)
        if not isinstance(handle, DirHandle):
            return
        left = self._open_dirs[handle.ino] - 1
        if left:
            self._open_dirs[handle.ino] = left
            return
        del self._open_dirs[handle.ino]
        if handle.ino in self._removed_dirs:
            self._removed_dirs.discard(handle.ino)
            self.tree.reclaim(handle.ino)

    @guarded
    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileHandleT:
        if inode & VIEW_BIT:
            self._check_handles()
            return self._add(await self.view.opendir(inode))
        return self.open_directory(inode)

    @guarded
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        handle = self.handle(fh)
        if isinstance(handle, ViewDir):
            await self.view.readdir(handle, start_id, token)
            return
        if not isinstance(handle, DirHandle):
            raise FsError(errno.ENOTDIR)
        cookie = start_id
        while page := self.tree.readdir_plus(handle.ino, cookie, READDIR_PAGE):
            for dentry, inode in page:
                cookie = dentry.cookie
                if not pyfuse3.readdir_reply(token, FileNameT(dentry.name), self._entry(inode), cookie):
                    return

    @guarded
    async def releasedir(self, fh: FileHandleT) -> None:
        self.close_directory(fh)

    @guarded
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        await self.files.sync()

    # -- the rest

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        space = self.data.stats()
        usage = self.tree.usage()
        out = pyfuse3.StatvfsData()
        out.f_bsize = out.f_frsize = BLOCK_SIZE
        out.f_blocks = space["capacity_bytes"] // BLOCK_SIZE
        out.f_bfree = space["free_bytes"] // BLOCK_SIZE
        out.f_bavail = (space["free_bytes"] - space["reserved_bytes"]) // BLOCK_SIZE
        out.f_files = usage.files + (1 << 32)
        out.f_ffree = out.f_favail = 1 << 32
        out.f_namemax = MAX_NAME
        return out

    @guarded
    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        if inode & VIEW_BIT:
            raise FsError(errno.EPERM)
        self.tree.setxattr(inode, name, value)
        file = self.files.held(inode)
        if file is not None:
            self.files.set_no_capability(file, False)

    def attribute(self, ino: int, name: bytes) -> bytes:
        file = self.files.held(ino) if name == CAPABILITY else None
        if file is None:
            return self.tree.getxattr(ino, name)
        if file.no_capability:
            raise FsError(errno.ENODATA)
        try:
            return self.tree.getxattr(ino, name)
        except FsError as error:
            self.files.set_no_capability(file, error.errno == errno.ENODATA)
            raise

    @guarded
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        if inode & VIEW_BIT:
            raise FsError(errno.ENODATA)
        return self.attribute(inode, name)

    @guarded
    async def listxattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> Sequence[XAttrNameT]:
        if inode & VIEW_BIT:
            return []
        return [XAttrNameT(name) for name in self.tree.listxattr(inode)]

    @guarded
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: pyfuse3.RequestContext) -> None:
        if inode & VIEW_BIT:
            raise FsError(errno.EPERM)
        self.tree.removexattr(inode, name)

    @guarded
    async def access(self, inode: InodeT, mode: ModeT, ctx: pyfuse3.RequestContext) -> bool:
        """Asked only without default_permissions."""
        return os.geteuid() in (0, ctx.uid)
