"""`kvfs replay`: a request trace against a running kvfs."""

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvfs import daemon
from kvfs.cli.node import Directory, configured, resolve, split_namespace
from kvfs.cli.output import FAILED, USAGE, fail, print_json
from kvfs.config import MIN_STORE, Size

if TYPE_CHECKING:
    from kvfs_tools.replay import Report

EXAMPLES = (
    "Examples:  kvfs replay trace.jsonl   |   kvfs replay trace.jsonl --capacity 2G --block-bytes 16K --limit 1000"
)
SCRATCH_ROOM = 128 << 20  # beyond the store itself: metadata and log


def _run(
    place: Path, namespace: str, trace: Path, size: int, limit: int | None, verify: bool, *, quiet: bool
) -> "Report":
    from kvfs_tools.replay import replay as run
    from kvfs_usrbio import BlockStore

    def evictions() -> int:
        status = daemon.ask(place, "status").status
        return status.stats["evictions"] if status is not None else 0

    columns = (TextColumn("replaying"), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        with trace.open("rb") as lines:
            total = sum(1 for _ in lines)
        task = bar.add_task("replay", total=min(total, limit) if limit else total)
        with BlockStore.open(place, namespace) as store:
            return run(
                store,
                trace,
                block_bytes=size,
                limit=limit,
                verify=verify,
                progress=lambda n: bar.advance(task, n),
                evictions=evictions,
            )


def replay(
    trace: Annotated[Path, typer.Argument(help="JSON lines with hash_ids, as in Mooncake's FAST'25 traces.")],
    block_bytes: Annotated[str, typer.Option("--block-bytes", help="Bytes of one block.")] = "64K",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Requests to replay (default: all).")] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", help="Where (default: a new one).")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare every byte that comes back.")] = True,
    capacity: Annotated[
        str | None,
        typer.Option(
            "--capacity", help="In a scratch store of this size, beside the data directory, removed at the end."
        ),
    ] = None,
    directory: Directory = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")] = False,
) -> None:
    """Match each request's prefix, get the hits, put the rest; print hit rate, speed and latencies.

    With --capacity the store is new and of that size, so that what does not fit is evicted; otherwise the running kvfs
    is used. Exits 1 if a block came back with wrong bytes."""
    from kvfs_tools.bench.programs import BenchError
    from kvfs_tools.bench.scratch import scratch
    from kvfs_tools.replay import TraceError

    try:
        size = int(Size.parse(block_bytes))
        room = Size.parse(capacity) if capacity is not None else None
    except ValueError as e:
        fail(str(e), code=USAGE)
    if not 8 <= size <= 16 << 20:
        fail("a block has 8 bytes to 16M", code=USAGE)
    if room is not None and room < MIN_STORE:
        fail(f"--capacity is at least {MIN_STORE >> 20}M", code=USAGE)
    name = "/".join(split_namespace(namespace)) if namespace else f"replay/{uuid.uuid4().hex[:12]}"
    place = resolve(directory)
    try:
        if room is None:
            report = _run(place, name, trace, size, limit, verify, quiet=json)
        else:
            with scratch(place.parent, room + SCRATCH_ROOM) as made:
                made.up(size=room, memory=configured().store.memory)
                report = _run(made.layout.root, name, trace, size, limit, verify, quiet=json)
    except (TraceError, BenchError, daemon.DaemonError) as e:
        fail(str(e))
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}" if e.filename else f"{place}: {e.strerror or e}")
    if json:
        print_json(report)
    else:
        typer.echo(f"requests    {report.requests}, {report.references} block references")
        typer.echo(f"prefix hits {report.prefix_hits} ({report.hit_rate * 100:.1f} %)")
        typer.echo(
            f"stored      {report.stored}, refused {report.refused}, vanished {report.vanished}, evicted {report.evictions}"
        )
        typer.echo(f"speed       {report.blocks_per_s:.0f} blocks/s, {report.bytes_per_s / 1e6:.0f} MB/s")
        for name, part in (("match", report.match), ("get", report.get), ("put", report.put)):
            typer.echo(f"{name:11s} p50 {part.p50:.2f} ms, p99 {part.p99:.2f} ms in {part.calls} calls")
        if verify:
            typer.echo(f"verified    {report.verified_bytes / 1e6:.1f} MB, {report.wrong} wrong")
    if report.wrong:
        raise typer.Exit(FAILED)
