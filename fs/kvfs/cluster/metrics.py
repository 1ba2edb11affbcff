"""What a chunk server tells Prometheus: counters and gauges of its targets and of its connections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class Counted(Protocol):
    """What has statistics: a node or a native server."""

    def stats(self) -> dict[str, int]: ...


TARGET_GAUGES: Final = {
    "chunks": "Chunks in the store.",
    "block_chunks": "Chunks of KV blocks in the store.",
    "file_chunks": "Chunks of files in the store.",
    "data_bytes": "Bytes of data in the store.",
    "slot_bytes": "Bytes of the slots that hold the data.",
    "capacity_bytes": "Bytes of all segments.",
    "free_bytes": "Bytes that are free.",
    "reserved_bytes": "Of the free bytes, those kept for checkpoints.",
    "free_segments": "Segments that are free.",
    "total_segments": "Segments of the store.",
    "index_bytes": "Memory of the index.",
    "mem_bytes": "Memory of the tier of hot pages.",
}
TARGET_COUNTERS: Final = {
    "gets": "Gets of chunks.",
    "get_hits": "Gets that found their chunk.",
    "puts": "Puts of chunks.",
    "puts_existed": "Puts whose key was there.",
    "deletes": "Chunks deleted.",
    "writes": "Writes of file chunks.",
    "evictions": "Cache blocks dropped to make room.",
    "checksum_errors": "Reads whose data did not match its checksum.",
    "io_errors": "Device operations that failed.",
    "mem_hits": "Reads answered from the tier of hot pages.",
    "journal_groups": "Groups written to the journal.",
    "checkpoints": "Checkpoints written.",
    "flushes": "Barriers of the device.",
    "moves": "Chunks moved to empty a segment.",
    "bytes_read": "Bytes read by users.",
    "bytes_written": "Bytes written by users.",
    "turns": "Turns of the reactor.",
    "sleeps": "Times that the reactor slept.",
}
SERVER_GAUGES: Final = {
    "sessions": "Sessions of clients.",
    "connections": "Connections of clients.",
    "buffers_used": "Bytes of buffers with data on its way.",
    "buffers_total": "Bytes of buffers.",
}
SERVER_COUNTERS: Final = {
    "sessions_opened": "Sessions begun.",
    "sessions_superseded": "Sessions that ended because their client began another.",
    "connections_opened": "Connections accepted.",
    "refused": "Connections refused: limits, or no valid capability.",
    "protocol_errors": "Connections ended because of what the client sent.",
    "denied": "Operations that the client had no right to.",
    "ops": "Operations.",
    "gets": "Gets.",
    "puts": "Puts.",
    "writes": "Writes of file chunks.",
    "stale_maps": "Operations of clients with an older cluster map.",
    "replayed": "Operations asked for again, and answered from memory.",
    "cancelled": "Operations cancelled before they began.",
    "bytes_in": "Bytes of data from clients.",
    "bytes_out": "Bytes of data to clients.",
    "frames_in": "Frames from clients.",
    "frames_out": "Frames to clients.",
    "calls": "io_uring requests on sockets, RDMA doorbells, and bells of shared memory.",
    "rdma": "RDMA READ and WRITE operations.",
    "copied": "Bytes copied in user space.",
}


class Source(Collector):
    """Reads everything anew at each scrape, which waits for the reactors: not on trio's thread."""

    def __init__(self, nodes: Sequence[Counted], server: Counted, names: Sequence[str], map_version: int) -> None:
        self.nodes = nodes
        self.server = server
        self.names = names
        self.map_version = map_version

    def alive(self) -> None:
        """Returns when every target's thread has answered."""
        for node in self.nodes:
            node.stats()
        self.server.stats()

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        stats = [node.stats() for node in self.nodes]
        for name, text in (TARGET_GAUGES | TARGET_COUNTERS).items():
            family = GaugeMetricFamily if name in TARGET_GAUGES else CounterMetricFamily
            metric = family(f"kvfs_target_{name}", text, labels=("target",))
            for target, values in zip(self.names, stats, strict=True):
                metric.add_metric((target,), values[name])
            yield metric
        values = self.server.stats()
        for name, text in SERVER_GAUGES.items():
            yield GaugeMetricFamily(f"kvfs_server_{name}", text, value=values[name])
        for name, text in SERVER_COUNTERS.items():
            yield CounterMetricFamily(f"kvfs_server_{name}", text, value=values[name])
        yield GaugeMetricFamily("kvfs_map_version", "Version of the cluster map in use.", value=self.map_version)


def registry(source: Source) -> CollectorRegistry:
    made = CollectorRegistry()
    made.register(source)
    return made
