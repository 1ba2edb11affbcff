"""Two rails beside one, for `kvfs bench net`: a server's host and a client's with two cables, each shaped alike.

The shape is narrow enough that neither a CPU nor the disk bounds it. Owns the hosts, see `kvfs_tools.hosts`; Unavailable where there can be none.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvfs_tools.bench.chunkserver import ChunkServer, Workers
from kvfs_tools.bench.measure import MB1, Listener
from kvfs_tools.bench.report import Row, Target, summarise
from kvfs_tools.hosts import Cable, network

MBITS: Final = 300
BATCH: Final = 16
COUNT: Final = 32  # blocks of 1 MiB
STORE: Final = 256 << 20
MEMORY: Final = 128 << 20
DISK: Final = 2 * STORE
RAILS: Final = 2


@dataclass(frozen=True, slots=True)
class _Measured:
    mb_per_s: float
    apart: float  # per cent of the rails' mean that lie between them


def _measure(workers: Workers, cables: list[Cable], seconds: float, seed: int) -> _Measured:
    before = [cable.a.carried()[1] for cable in cables]
    found = workers.run("get", MB1, COUNT, batch=BATCH, seconds=seconds, seed=seed)
    carried = [cable.a.carried()[1] - b for cable, b in zip(cables, before, strict=True)]
    apart = (max(carried) - min(carried)) * len(carried) / sum(carried) * 100
    return _Measured(found.per_s * MB1 / 1e6, apart)


def two_rails(root: Path, rounds: int, seconds: float, listen: Listener) -> list[Row]:
    """A server with an address on each of two cables, and one with an address on the first alone; the same client's host."""
    with network() as net, contextlib.ExitStack() as stack:
        server, client = net.host("server"), net.host("client")
        cables = [net.cable(server, client) for _ in range(RAILS)]
        listen.step("putting the blocks that two rails carry")
        sides: list[Workers] = []
        for count in (RAILS, 1):
            place = root / f"rails-{count}"
            place.mkdir()
            made = ChunkServer(place, STORE, addresses=[c.a.address for c in cables[:count]], host=server)
            stack.enter_context(made.running(MEMORY))
            sides.append(Workers(made, listen.command, client))
            sides[-1].run("put", MB1, COUNT, batch=BATCH)
        for cable in cables:
            cable.shape(MBITS)
        both, single = sides
        pairs: list[tuple[float, float | None]] = []
        apart: list[tuple[float, float | None]] = []
        for number in range(rounds):
            listen.step(f"round {number + 1} of {rounds}: two rails and one")
            first = None if number % 2 else _measure(single, cables[:1], seconds, number)
            two = _measure(both, cables, seconds, number)
            one = first or _measure(single, cables[:1], seconds, number)
            pairs.append((two.mb_per_s, one.mb_per_s))
            apart.append((two.apart, None))
    what = f"1 MiB gets over two rails of {MBITS} Mbit/s each (tc tbf), batches of {BATCH}"
    return [
        summarise("net-rails", what, "MB/s", "one of them", Target(1.8), pairs),
        summarise(
            "net-rails-apart",
            "the same: what lies between the bytes of the two, of their mean",
            "%",
            "",
            Target(10, at_most=True, absolute=True),
            apart,
        ),
    ]
