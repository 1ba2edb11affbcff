"""A store served over its own ring alone, for `kvfs bench net`:

    python -m kvfs_tools.bench.ringhost STORE SOCKET NAMESPACE ID MEMORY

MEMORY: bytes of the memory tier. Prints a line when clients may come; ends with its standard input.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvfs.node import Namespace, Node, NodeConfig


def main() -> None:
    store, socket, namespace, number, memory = sys.argv[1:]
    node = Node.start(NodeConfig(Path(store), socket=Path(socket), memory_bytes=int(memory)))
    try:
        tenant, _, name = namespace.partition("/")
        node.put_namespace(tenant, name, Namespace(int(number), evictable=False))
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        node.stop()


if __name__ == "__main__":
    main()
