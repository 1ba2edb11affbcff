"""A plain sender and a plain receiver over loopback TCP, a blocking call for each message of 1 MiB: what any program that moves
blocks between two processes pays. As a program it is the sender: `plain_pair.py PORT BYTES SECONDS`.

Both go through memory as large as what kvfs and its client have, in turn. (iperf3 sends and receives one buffer that stays in the
CPU's cache.)
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from typing import Final

from kvfs_tools.bench.programs import SLACK_S, BenchError

MESSAGE: Final = 1 << 20


def receive(sent_from: int, into: int, seconds: float) -> float:
    """Bytes a second of a sender that goes through `sent_from` bytes and a receiver that fills `into` bytes again and again.
    BenchError if the sender fails."""
    memory = memoryview(bytearray(into))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SLACK_S)
        port: int = listener.getsockname()[1]
        line = [sys.executable, __file__, str(port), str(sent_from), str(seconds)]
        with subprocess.Popen(line, stdin=subprocess.DEVNULL) as sender:
            try:
                connection, _ = listener.accept()
                with connection:
                    return _take(connection, memory)
            except OSError as e:
                raise BenchError(f"the plain sender and receiver: {e}") from e
            finally:
                sender.kill()


def _take(connection: socket.socket, memory: memoryview) -> float:
    connection.settimeout(None)
    at = total = 0
    begun = time.perf_counter()
    while (got := connection.recv_into(memory[at : at + MESSAGE], MESSAGE, socket.MSG_WAITALL)) == MESSAGE:
        total += got
        at = (at + MESSAGE) % len(memory)
    return total / (time.perf_counter() - begun)


def send(port: int, size: int, seconds: float) -> None:
    memory = memoryview(bytes(range(256)) * (size // 256))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = time.perf_counter() + seconds
        at = 0
        while time.perf_counter() < end:
            connection.sendall(memory[at : at + MESSAGE])
            at = (at + MESSAGE) % len(memory)


if __name__ == "__main__":
    send(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
