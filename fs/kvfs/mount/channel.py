"""Mounts through fusermount3 and puts the native node between the kernel and pyfuse3: reads and writes of open files never
reach Python, the most frequent other requests come to `direct`, and the rest to pyfuse3 through a socket that it serves as
if it were /dev/fuse.

libfuse takes an open descriptor for a mounted /dev/fuse when the mount point is `/dev/fd/N`.
"""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .attrs import log
from .direct import DirectRequests

if TYPE_CHECKING:
    from kvfs.node import Node

MOUNT_TIMEOUT_S: Final = 10
COMM_ENV: Final = "_FUSE_COMMFD"
"""Names the descriptor on which fusermount3 sends the mounted /dev/fuse (libfuse, lib/mount.c)."""
SOCKET_BYTES: Final = 8 << 20
SO_SNDBUFFORCE: Final = 32
"""SO_SNDBUF beyond net.core.wmem_max, for root (socket(7)); the module `socket` lacks it."""


class MountError(Exception):
    """Cannot mount here; the text says why and what to do."""


def mount(point: Path, options: Iterable[str]) -> int:
    """Mounts a FUSE file system and returns its /dev/fuse; MountError says what fusermount3 said."""
    tool = shutil.which("fusermount3")
    if tool is None:
        raise MountError("fusermount3 is missing: install the package fuse3.")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.settimeout(MOUNT_TIMEOUT_S)
        try:
            done = subprocess.run(
                [tool, "-o", ",".join(sorted(options)), "--", str(point)],
                env={**os.environ, COMM_ENV: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=MOUNT_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MountError(f"fusermount3 did not mount at {point} within {MOUNT_TIMEOUT_S} s.") from None
        theirs.close()
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise MountError(f"mounting at {point} failed: {said[-1] if said else 'fusermount3 gave no reason'}.")
        try:
            _, ancillary, _, _ = ours.recvmsg(
                1, socket.CMSG_SPACE(array.array("i", [0]).itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise MountError(f"mounting at {point} failed: no descriptor came ({error}).") from error
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return array.array("i", data[:4])[0]
    raise MountError(f"mounting at {point} failed: no descriptor came.")


def _widen(end: socket.socket) -> None:
    try:
        end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SOCKET_BYTES)
    except PermissionError:  # the node then asks the kernel for smaller requests
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)


@dataclass(slots=True)
class Channel:
    """The node serving a mount."""

    node: Node
    session: socket.socket
    """pyfuse3's end. It closes it."""
    requests: socket.socket
    """Brings what `direct` answers."""
    kernel: int
    """/dev/fuse, for these answers."""

    @classmethod
    def open(cls, node: Node, kernel: int) -> Channel:
        """`kernel` is /dev/fuse as `mount` gives it; it is the node's from now on."""
        try:
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            os.close(kernel)
            raise
        _widen(near)
        _widen(far)
        source, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        answers = os.dup(kernel)
        try:
            node.fuse_start(kernel, near.detach())
            try:
                node.fuse_direct(source.detach(), DirectRequests.OPCODES)
            except BaseException:
                node.fuse_stop()
                raise
        except BaseException:
            for end in (far, source, requests):
                end.close()
            os.close(answers)
            raise
        return cls(node, far, requests, answers)

    @property
    def place(self) -> str:
        """What stands for the mount point in pyfuse3.init."""
        return f"/dev/fd/{self.session.detach()}"

    def close(self) -> None:
        """After pyfuse3 has closed its end. Nobody serves the kernel any more."""
        with contextlib.suppress(OSError):
            self.node.fuse_stop()
        self.session.close()
        self.requests.close()
        if self.kernel >= 0:
            os.close(self.kernel)
            self.kernel = -1
        log.debug("channel closed")
