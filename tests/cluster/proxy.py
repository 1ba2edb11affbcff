"""A proxy between clients and a chunk server that knows the frames of docs/wire-protocol.md and can damage them on their way."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto

HELLO, REPLY = 64, 88
HEADER = struct.Struct("<IBBHIIQQQQ")
REQUEST, RESPONSE = 1, 2
RECORD = {REQUEST: 88, RESPONSE: 24}
DATA_SUMS = 1


class Part(Enum):
    HEADER = auto()
    BODY = auto()
    PAYLOAD = auto()


@dataclass(frozen=True)
class Frame:
    kind: int
    header: bytearray
    body: bytearray
    payload: bytearray

    def sums(self) -> list[int]:
        """Of the results' payloads, in a response."""
        return [struct.unpack_from("<Q", self.body, at + 16)[0] for at in range(0, len(self.body), RECORD[RESPONSE])]


def damage(kind: int, part: Part, times: int | None = None) -> Callable[[Frame], bool]:
    """Flips a bit in that part of the next frames of this kind that have it; None: of all."""
    left = [times]

    def change(frame: Frame) -> bool:
        where = {Part.HEADER: frame.header, Part.BODY: frame.body, Part.PAYLOAD: frame.payload}[part]
        if frame.kind != kind or not where or left[0] == 0:
            return False
        if left[0] is not None:
            left[0] -= 1
        at = 16 if part is Part.HEADER else len(where) // 2  # 16: how many bytes of payload follow
        where[at] ^= 0x10
        return True

    return change


class Proxy:
    """`change` is called for each frame, one at a time, and says if it has damaged it."""

    def __init__(self, port: int) -> None:
        self.server = port
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self.listener.getsockname()[1])
        self.change: Callable[[Frame], bool] | None = None
        self.damaged = 0
        self.features: set[int] = set()  # that servers have agreed to, of all sessions
        self.sums: set[bool] = set()  # whether payloads came with one
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def end(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        for s in self._sockets:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for s in [self.listener, *self._sockets]:
            s.close()

    def _start(self, what: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=self._quietly, args=(what, *arguments), daemon=True)
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _quietly(what: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(OSError, EOFError):
            what(*arguments)

    def _accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", self.server), timeout=10)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for s in (client, server):
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [client, server]
            self._start(self._pass, client, server, self._client_hello)
            self._start(self._pass, server, client, self._server_hello)

    def _pass(self, source: socket.socket, to: socket.socket, hello: Callable[[socket.socket], bytes]) -> None:
        try:
            to.sendall(hello(source))
            while True:
                header = bytearray(_exactly(source, HEADER.size))
                _, kind, _, count, _, _, payload, _, _, _ = HEADER.unpack(header)
                body = bytearray(_exactly(source, RECORD.get(kind, 0) * count))
                frame = Frame(kind, header, body, bytearray(_exactly(source, payload)))
                with self._lock:
                    if kind == RESPONSE and payload:
                        self.sums.add(any(frame.sums()))
                    if self.change is not None:
                        self.damaged += self.change(frame)
                to.sendall(frame.header + frame.body + frame.payload)
        finally:
            for s in (source, to):
                with contextlib.suppress(OSError):
                    s.shutdown(socket.SHUT_RDWR)

    def _client_hello(self, source: socket.socket) -> bytes:
        hello = _exactly(source, HELLO)
        return hello + _exactly(source, struct.unpack_from("<I", hello, 52)[0])

    def _server_hello(self, source: socket.socket) -> bytes:
        reply = _exactly(source, REPLY)
        size = struct.unpack_from("<I", reply, 76)[0]
        if not size:
            with self._lock:
                self.features.add(struct.unpack_from("<Q", reply, 16)[0])
        return reply + _exactly(source, size)


def _exactly(source: socket.socket, count: int) -> bytes:
    out = bytearray()
    while len(out) < count:
        part = source.recv(min(count - len(out), 1 << 20))
        if not part:
            raise EOFError
        out += part
    return bytes(out)


@contextmanager
def proxy(port: int) -> Generator[Proxy]:
    made = Proxy(port)
    try:
        yield made
    finally:
        made.end()
