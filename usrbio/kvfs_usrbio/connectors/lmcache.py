# pyright: basic, reportMissingImports=false
"""KvfsConnector: LMCache's remote storage, inside the engine's process, on kvfs. In LMCache's configuration:

    remote_storage_plugins: ["kvfs"]
    extra_config:
      remote_storage_plugin.kvfs.module_path: kvfs_usrbio.connectors.lmcache
      remote_storage_plugin.kvfs.class_name: KvfsAdapter
      remote_storage_plugin.kvfs.path: /mnt/kvfs

or `remote_url: "kvfs:///mnt/kvfs"` beside the same three lines. An object is two values: its header, from which LMCache
knows how much memory to allocate, and its bytes, which move straight into and out of that memory if it can be shared.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from lmcache.v1.protocol import RemoteMetadata
from lmcache.v1.storage_backend.connector import ConnectorAdapter, ConnectorContext, extract_plugin_type
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

from kvfs_usrbio.connectors.lossy import Keys, LossyStore
from kvfs_usrbio.connectors.values import Values
from kvfs_usrbio.connectors.workers import Workers

FORMAT: Final = "lmcache-remote-1"
NAMESPACE: Final = "lmcache"
PLUGIN: Final = "kvfs"
SCHEME: Final = "kvfs://"
WORKERS: Final = 4
QUESTIONERS: Final = 2  # threads of their own for lookups: transfers may wait for a kvfs that hangs

Result = TypeVar("Result")

logger: Final = logging.getLogger(__name__)


class KvfsConnector(RemoteConnector):
    """`where`: a mount point, a data directory or a kvfs:// URL."""

    def __init__(self, where: str, context: ConnectorContext, namespace: str | None, version: str) -> None:
        super().__init__(context.config, context.metadata)
        self._memory = context.local_cpu_backend
        self._store = LossyStore(where, namespace, NAMESPACE)
        layout = [(list(shape), str(dtype)) for shape, dtype in zip(self.meta_shapes, self.meta_dtypes, strict=True)]
        facts = {"format": FORMAT, "version": version, "layout": layout, "kind": str(self.meta_fmt)}
        self._headers = Values(self._store, Keys({**facts, "part": "header"}))
        self._bodies = Values(self._store, Keys({**facts, "part": "body"}))
        self._movers = Workers(WORKERS, "kvfs-lmcache")
        self._questioners = Workers(QUESTIONERS, "kvfs-lmcache-ask")
        _close_after(self._memory, self._movers)

    async def exists(self, key: Any) -> bool:
        return await _ended(self._questioners, lambda: self.exists_sync(key))

    def exists_sync(self, key: Any) -> bool:
        return self._headers.exists(_names([key]))[0]

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: list[Any]) -> int:
        """How many of the first are all there."""
        return self._headers.match_prefix(_names(keys))

    async def batched_async_contains(self, lookup_id: str, keys: list[Any], pin: bool = False) -> int:
        return await _ended(self._questioners, lambda: self.batched_contains(keys))

    async def get(self, key: Any) -> Any:
        return (await self.batched_get([key]))[0]

    def support_batched_get(self) -> bool:
        return True

    async def batched_get(self, keys: list[Any]) -> list[Any]:
        job = self._movers.submit(lambda: self._get(keys))
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:  # LMCache waits no longer: what arrives later is given back then
            job.add_done_callback(_give_back)
            raise

    async def batched_get_non_blocking(self, lookup_id: str, keys: list[Any]) -> list[Any]:
        """Those before the first that is missing."""
        found = await self.batched_get(keys)
        end = next((i for i, one in enumerate(found) if one is None), len(found))
        for one in found[end:]:
            if one is not None:
                one.ref_count_down()
        return found[:end]

    async def put(self, key: Any, memory_obj: Any) -> None:
        await self.batched_put([key], [memory_obj])

    def support_batched_put(self) -> bool:
        return True

    async def batched_put(self, keys: list[Any], memory_objs: list[Any]) -> None:
        await _ended(self._movers, lambda: self._put(keys, memory_objs))

    def remove_sync(self, key: Any) -> bool:
        removed = self._headers.evict(_names([key]))[0]
        self._bodies.evict(_names([key]))
        return removed

    async def list(self) -> list[str]:
        """kvfs keeps digests of names, not the names."""
        return []

    async def close(self) -> None:
        """Waits at most some seconds for what is under way; a transfer that hangs with kvfs goes on until that does or this
        process ends."""
        await asyncio.to_thread(self._questioners.close)
        await asyncio.to_thread(self._movers.close)
        self._store.close()

    # -- inside

    def _get(self, keys: Sequence[Any]) -> list[Any]:
        names = _names(keys)
        headers = [bytearray(self.remote_metadata_bytes) for _ in keys]
        there = self._headers.get(names, [memoryview(header) for header in headers])
        objects: list[Any] = [
            self._allocate(header) if found else None for header, found in zip(headers, there, strict=True)
        ]
        wanted = [i for i, one in enumerate(objects) if one is not None]
        views = [_view(objects[i]) for i in wanted]
        for i, good in zip(wanted, self._bodies.get([names[i] for i in wanted], views), strict=True):
            if not good:
                self._headers.evict([names[i]])  # so that it is stored anew
                objects[i].ref_count_down()
                objects[i] = None
        return objects

    def _allocate(self, header: bytearray) -> Any:
        try:
            found = RemoteMetadata.deserialize(bytes(header))
        except (KeyError, ValueError) as error:
            logger.warning("kvfs: an object's header makes no sense: %s", error)
            return None
        made = self._memory.allocate(found.shapes, found.dtypes, found.fmt)
        if made is not None and len(_view(made)) != found.length:
            made.ref_count_down()
            return None
        return made

    def _put(self, keys: Sequence[Any], objects: Sequence[Any]) -> None:
        names = _names(keys)
        views = [_view(one) for one in objects]
        headers = [
            RemoteMetadata(len(view), one.get_shapes(), one.get_dtypes(), one.get_memory_format()).serialize()
            for one, view in zip(objects, views, strict=True)
        ]
        stored = self._bodies.put(names, views)
        good = [i for i, done in enumerate(stored) if done]
        self._headers.put([names[i] for i in good], [memoryview(headers[i]) for i in good])


class KvfsAdapter(ConnectorAdapter):
    def __init__(self) -> None:
        super().__init__(SCHEME)

    def can_parse(self, url: str) -> bool:
        plugin = url.removeprefix("plugin://")
        return url.startswith(SCHEME) or (plugin != url and extract_plugin_type(plugin) == PLUGIN)

    def create_connector(self, context: ConnectorContext) -> RemoteConnector:
        extra = (context.config.extra_config if context.config else None) or {}

        def setting(name: str, otherwise: str | None) -> Any:
            return extra.get(f"remote_storage_plugin.{context.plugin_name or PLUGIN}.{name}", otherwise)

        where = context.url if context.url.startswith(SCHEME) else setting("path", None)
        if where is None:
            raise ValueError(f"extra_config: remote_storage_plugin.{context.plugin_name or PLUGIN}.path is missing")
        return KvfsConnector(where, context, setting("namespace", None), setting("version", ""))


def _close_after(memory: Any, movers: Workers) -> None:
    """LMCache frees its memory before it closes what moves data in and out of it: here it waits, and keeps the memory if
    kvfs hangs."""
    close = memory.close

    def closing() -> None:
        if movers.close():
            close()
        else:
            logger.warning("kvfs: transfers are under way: LMCache's memory is freed when this process ends")

    memory.close = closing


def _give_back(job: Future[list[Any]]) -> None:
    if not job.cancelled() and job.exception() is None:
        for one in job.result():
            if one is not None:
                one.ref_count_down()


async def _ended(workers: Workers, call: Callable[[], Result]) -> Result:
    return await asyncio.wrap_future(workers.submit(call))


def _names(keys: Sequence[Any]) -> list[bytes]:
    return [key.to_string().encode() for key in keys]


def _view(memory_obj: Any) -> memoryview:
    return memoryview(memory_obj.byte_array).cast("B")
