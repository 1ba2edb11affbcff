"""A store on chunk servers without a daemon: the node that talks to them runs inside this process.

Everything else is as with a daemon: the ring client connects to the node's control socket, in a directory of its own. This
module alone needs the package `kvfs`, whose extension has the node; it is imported when such a store is opened.

Settings come from KVFS_REMOTE_* variables (docs/operating.md), as for a mount.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvfs.node import Node

SCHEME: Final = "kvfs://"
DEADLINE_SHARE: Final = 0.9
"""Of a call's timeout: servers that do not answer are an answer, which should come before the whole call is given up."""


def is_remote(where: str | os.PathLike[str]) -> bool:
    """kvfs://HOST:PORT...; not kvfs:///PATH."""
    text = os.fspath(where)
    return text.startswith(SCHEME) and text.removeprefix(SCHEME).partition("/")[0] not in ("", "localhost")


def check(url: str) -> None:
    """ValueError: it can name no namespace on chunk servers."""
    try:
        from kvfs.cluster.remote import parse_url
    except ModuleNotFoundError as e:
        raise ImportError(f"{url}: stores on chunk servers need the package kvfs: {e}") from e
    parse_url(url)


def _end(node: Node, directory: Path, process: int) -> None:
    if os.getpid() != process:
        return  # a forked child has neither the node's threads nor a right to its files
    try:
        node.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class InProcess:
    """A running node; `stop` it, or let go of it."""

    def __init__(self, node: Node, directory: Path, tenant: str, name: str) -> None:
        self.socket = str(directory / "sock")
        self.tenant = tenant
        self.name = name
        self._end = weakref.finalize(self, _end, node, directory, os.getpid())

    def stop(self) -> None:
        self._end()


def start(url: str, token: str | os.PathLike[str] | bytes | None, timeout: float | None) -> InProcess:
    """ValueError: no such URL or token; OSError: nobody answers, no such namespace, no right to it."""
    try:
        from kvfs.cluster import remote
        from kvfs.cluster.map import Class
        from kvfs.config import load
        from kvfs.node import Namespace, Node, NodeConfig
    except ModuleNotFoundError as e:
        raise ImportError(f"{url}: stores on chunk servers need the package kvfs: {e}") from e
    settings = load().remote
    reached = remote.reach(url, settings.token if token is None else token)
    config = reached.config(
        transport=settings.transport,
        connections=settings.connections,
        deadline=settings.deadline if timeout is None else max(timeout * DEADLINE_SHARE, 0.1),
        data_sums=settings.data_sums,
        rails=settings.rails,
    )
    found = reached.namespace
    if found.cls is Class.VOLUME:
        raise ValueError(f"{url}: {found} is a volume: mount it")
    directory = Path(tempfile.mkdtemp(prefix="kvfs-"))
    try:
        node = Node.start(NodeConfig(data=None, socket=directory / "sock", remote=config))
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    made = InProcess(node, directory, found.tenant, found.name)
    try:
        node.put_namespace(found.tenant, found.name, Namespace(found.id, evictable=found.cls is Class.CACHE))
    except BaseException:
        made.stop()
        raise
    return made
