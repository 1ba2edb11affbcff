"""A daemon for the mount's tests: `python daemon.py DIR MOUNT` serves DIR (made if new) until SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable
from pathlib import Path

import structlog
import trio

from kvfs.dataplane import DataPlane
from kvfs.meta import namespaces
from kvfs.meta.group import GroupStore
from kvfs.meta.schema import Namespace
from kvfs.meta.sqlite import SqliteStore
from kvfs.meta.tree import Tree
from kvfs.mount import service
from kvfs.mount.blocks import Info
from kvfs.mount.files import OpenFiles
from kvfs.node import FileQuestions, Node, NodeConfig, format_store
from kvfs.node import Namespace as NodeNamespace

SIZE = 256 << 20
PYFUSE3_ALONE = "KVFS_TEST_PYFUSE3_ALONE"
"""Set: pyfuse3 serves the mount alone, as with `fuse.native = false`."""


async def main(directory: Path, point: Path) -> None:
    data_file = directory / "store.kvfs"
    if not data_file.exists():
        format_store(data_file, SIZE, segment_bytes=16 << 20, journal_bytes=8 << 20)
    store = GroupStore(SqliteStore(directory / "meta.db"))
    tree = Tree(store)
    config = NodeConfig(data_file, socket=directory / "sock")
    async with Node.open(config) as node, DataPlane.open(node) as data, trio.open_nursery() as nursery:
        direct = None if os.environ.get(PYFUSE3_ALONE) else node
        files = OpenFiles(tree, data, direct)

        def make_namespace(tenant: str, name: str) -> Namespace:
            made = namespaces.create(store, tenant, name)
            node.put_namespace(tenant, name, NodeNamespace(made.id))
            return made

        async def stop_on_signal() -> None:
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

        async def resolve(tenant: str, name: str, uid: int) -> NodeNamespace:
            del uid
            return NodeNamespace(make_namespace(tenant, name).id)

        def serve(task_status: trio.TaskStatus[None]) -> Awaitable[None]:
            info = Info(str(directory / "sock"), str(directory))
            return service.serve(
                point,
                tree,
                data,
                make_namespace,
                files,
                info,
                node=direct,
                mounted=node.set_mount,
                task_status=task_status,
            )

        nursery.start_soon(stop_on_signal)
        nursery.start_soon(node.serve_upcalls, resolve, FileQuestions(files.drop_cached, files.store, service.ended))
        await nursery.start(serve)
        print("mounted", flush=True)
    store.close()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    trio.run(main, Path(sys.argv[1]), Path(sys.argv[2]))
