"""A node in a process of its own, for the tests of the block API: it may be frozen and killed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

DAEMON = """
import sys, trio
from pathlib import Path
from kvfs.node import Namespace, Node, NodeConfig, format_store

async def resolve(tenant, name, uid):
    return Namespace(id=9) if name == "asked" else None

async def main(directory):
    format_store(directory / "data", 512 << 20, segment_bytes=16 << 20, journal_bytes=16 << 20)
    async with Node.open(NodeConfig(directory / "data", socket=directory / "kvfs.sock")) as node:
        node.put_namespace("default", "default", Namespace(id=1))
        node.put_namespace("acme", "llama", Namespace(id=2))
        print("ready", flush=True)
        with trio.open_signal_receiver(__import__("signal").SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(node.serve_upcalls, resolve)
                async for _ in signals:
                    nursery.cancel_scope.cancel()
                    break

trio.run(main, Path(sys.argv[1]))
"""


@dataclass
class Daemon:
    directory: Path
    process: subprocess.Popen[bytes]


def python(code: str, argument: Path) -> subprocess.Popen[bytes]:
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    process = subprocess.Popen([sys.executable, "-c", code, str(argument)], stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def end(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    finally:
        assert process.stdout is not None
        process.stdout.close()
