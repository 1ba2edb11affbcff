"""Mounts, serves and unmounts: one mount per process (pyfuse3 has one session)."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pyfuse3
import trio
import trio.to_thread

from kvfs.dataplane import DataPlane
from kvfs.meta.tree import Tree
from kvfs.node import Node

from . import channel
from .attrs import log
from .blocks import BlockView, Info, MakeNamespace
from .channel import MountError
from .direct import DirectRequests
from .files import OpenFiles
from .ops import MountOps

UNMOUNT_TIMEOUT_S: Final = 10
MAX_TASKS: Final = 64
READ_AHEAD_KB: Final = 1024


def is_mounted(point: Path) -> bool:
    """Whether something is mounted exactly there, dead or alive."""
    wanted = os.path.realpath(point.parent) + "/" + point.name
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            where = line.split(" ", 5)[4]
            if "\\" in where:
                for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                    where = where.replace(code, char)
            if where == wanted:
                return True
    return False


def unmount(point: Path) -> None:
    """Lazily: works whoever still has files open. Harmless when nothing is mounted there."""
    tool = shutil.which("fusermount3") or shutil.which("fusermount")
    if tool is None or not is_mounted(point):
        return
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([tool, "-uzq", str(point)], check=False, timeout=UNMOUNT_TIMEOUT_S, capture_output=True)


def prepare(point: Path) -> None:
    """Makes the directory if there is none; removes a mount whose daemon died; refuses any other use of the place."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MountError("cannot open /dev/fuse: no FUSE in this kernel or container, or no right to it.")
    try:
        point.mkdir(parents=True, exist_ok=True)
        entries = os.listdir(point)
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED) or (error.errno == errno.EEXIST and is_mounted(point)):
            log.warning("a mount whose daemon is gone is removed", mount=str(point))
            unmount(point)
            if is_mounted(point):
                raise MountError(f"{point} is a dead mount: unmount it with fusermount3 -uz {point}.") from error
            return prepare(point)
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise MountError(f"{point} is not a directory.") from error
        raise MountError(f"cannot use {point} as mount point: {error.strerror}.") from error
    if is_mounted(point):
        raise MountError(f"something is mounted at {point} already.")
    if entries:
        raise MountError(
            f"{point} is not empty: mounting would hide {len(entries)} entries. Choose an empty directory."
        )
    return None


def _may_allow_other() -> bool:
    if os.geteuid() == 0:
        return True
    try:
        lines = Path("/etc/fuse.conf").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _read_ahead(device: int) -> None:
    """A sequential reader is asked for in requests of 1 MiB, not 128 KiB; only root may set it."""
    where = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    with contextlib.suppress(OSError):
        where.write_text(str(READ_AHEAD_KB))


def ended() -> None:
    """The node saw the kernel end the mount: `serve` returns."""
    if pyfuse3.trio_token is not None:
        pyfuse3.terminate()


async def serve(
    point: Path,
    tree: Tree,
    data: DataPlane,
    make_namespace: MakeNamespace,
    files: OpenFiles,
    info: Info,
    *,
    node: Node | None = None,
    source: str = "kvfs",
    mounted: Callable[[int], None] = lambda _: None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until cancelled or unmounted by someone else; then nothing is mounted and every size is in the tree.

    With `node` reads and writes of open files go past Python, see `channel`. `source` is what mount tables name; it holds
    no comma. `mounted` gets the mount's st_dev as soon as there is one.
    """
    prepare(point)
    ops = MountOps(tree, data, BlockView(tree.store, data, make_namespace, info), files)
    await files.recover()
    options = {f"fsname={source}", "subtype=kvfs", "default_permissions"}
    if _may_allow_other():
        options.add("allow_other")
    direct: channel.Channel | None = None
    try:
        if node is not None:
            direct = channel.Channel.open(node, await trio.to_thread.run_sync(channel.mount, point, options))
        pyfuse3.init(ops, direct.place if direct else str(point), options)
    except (RuntimeError, OSError) as error:
        unmount(point)
        if direct:
            direct.close()
        raise MountError(f"mounting at {point} failed: {error}.") from error
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(files.persist_periodically)
            nursery.start_soon(files.store_groups)
            nursery.start_soon(files.reclaim_removed)

            async def announce() -> None:
                status = await trio.to_thread.run_sync(os.stat, point)
                _read_ahead(status.st_dev)
                mounted(status.st_dev)
                log.info("mounted", mount=str(point))
                task_status.started()

            nursery.start_soon(announce)
            if direct:
                nursery.start_soon(DirectRequests(ops, direct.node, direct.requests, direct.kernel).serve)
            await pyfuse3.main(min_tasks=1, max_tasks=MAX_TASKS)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(unmount, point)
                pyfuse3.close(unmount=False)
                if direct:
                    await trio.to_thread.run_sync(direct.close)
            finally:
                await files.settle()  # the node has answered writes until here
        log.info("unmounted", mount=str(point))
