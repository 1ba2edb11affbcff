"""The admin port: HTTP for Prometheus and for whoever watches over the process.

    /metrics   Prometheus text
    /healthz   200 when every target's thread has answered within HEALTH_S, else 503
    /readyz    200 while clients can connect, else 503

One request a connection. A client wastes at most one of MAX_CLIENTS places for REQUEST_S; more clients wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

import h11
import trio
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

MAX_CLIENTS: Final = 32
REQUEST_S: Final = 10.0
HEALTH_S: Final = 5.0
HEAD_BYTES: Final = 16384
BACKLOG: Final = 64
_TEXT: Final = "text/plain; charset=utf-8"
_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    503: "Service Unavailable",
}


class Pages:
    """What is shown. `alive` blocks until the reactors have answered, and so does a scrape: one thread at a time does either."""

    def __init__(self, registry: CollectorRegistry, alive: Callable[[], None], ready: Callable[[], bool]) -> None:
        self._registry = registry
        self._alive = alive
        self._ready = ready
        self._threads = trio.CapacityLimiter(1)

    async def page(self, path: str) -> tuple[int, str, bytes]:
        """Status, type and body."""
        match path:
            case "/metrics":
                body = await self._within(lambda: generate_latest(self._registry))
                return (503, _TEXT, b"a target does not answer\n") if body is None else (200, CONTENT_TYPE_LATEST, body)
            case "/healthz":
                body = await self._within(self._health)
                return (503, _TEXT, b"a target does not answer\n") if body is None else (200, _TEXT, body)
            case "/readyz":
                return (200, _TEXT, b"ready\n") if self._ready() else (503, _TEXT, b"not ready\n")
            case _:
                return 404, _TEXT, b"there are /metrics, /healthz and /readyz\n"

    def _health(self) -> bytes:
        self._alive()
        return b"ok\n"

    async def _within(self, work: Callable[[], bytes]) -> bytes | None:
        """None: not in time, or it failed. The thread is left behind, and its place with it until it comes back."""
        with trio.move_on_after(HEALTH_S), contextlib.suppress(OSError):
            return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._threads)
        return None


async def serve(
    place: tuple[str, int], pages: Pages, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    """Until cancelled; the port is what it has started with."""
    listeners = await trio.open_tcp_listeners(place[1], host=place[0], backlog=BACKLOG)
    limit = trio.CapacityLimiter(MAX_CLIENTS)
    async with trio.open_nursery() as nursery:
        task_status.started(listeners[0].socket.getsockname()[1])
        try:
            while True:
                await limit.acquire_on_behalf_of(token := object())
                try:
                    stream = await listeners[0].accept()
                except BaseException:
                    limit.release_on_behalf_of(token)
                    raise
                nursery.start_soon(_client, stream, pages, limit, token)
        finally:
            for listener in listeners:
                with trio.CancelScope(shield=True):
                    await listener.aclose()


async def _client(stream: trio.SocketStream, pages: Pages, limit: trio.CapacityLimiter, token: object) -> None:
    try:
        with trio.move_on_after(REQUEST_S), contextlib.suppress(trio.BrokenResourceError, h11.LocalProtocolError):
            await _answer(stream, pages)
    finally:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)
        limit.release_on_behalf_of(token)


async def _answer(stream: trio.SocketStream, pages: Pages) -> None:
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
    only_head = False
    try:
        while (event := http.next_event()) is h11.NEED_DATA:
            http.receive_data(await stream.receive_some(4096))
    except h11.RemoteProtocolError as e:
        status, kind, body = e.error_status_hint, _TEXT, b"this is no request\n"
    else:
        if not isinstance(event, h11.Request):
            return
        only_head = event.method == b"HEAD"
        if event.method in (b"GET", b"HEAD"):
            status, kind, body = await pages.page(event.target.decode("ascii").partition("?")[0])
        else:
            status, kind, body = 405, _TEXT, b"only GET\n"
    headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Connection", "close")]
    head = h11.Response(status_code=status, headers=headers, reason=_REASONS.get(status, ""))
    out = http.send(head) or b""
    if not only_head:
        out += http.send(h11.Data(data=body)) or b""
    await stream.send_all(out)
    await stream.send_eof()
    # What the client still sends is taken in, within limits: closing over it would reset the connection under the answer.
    with trio.move_on_after(1):
        for _ in range(64):
            if not await stream.receive_some(4096):
                break
