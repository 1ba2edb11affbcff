"""`kvfs replay`: a request trace against a running kvfs."""

import uuid
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvfs.cli.node import Directory, configured
from kvfs.cli.output import FAILED, USAGE, fail, print_json
from kvfs.config import Size

EXAMPLES = "Examples:  kvfs replay trace.jsonl   |   kvfs replay trace.jsonl --block-bytes 16K --limit 1000 --json"


def replay(
    trace: Annotated[Path, typer.Argument(help="JSON lines with hash_ids, as in Mooncake's FAST'25 traces.")],
    block_bytes: Annotated[str, typer.Option("--block-bytes", help="Bytes of one block.")] = "64K",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Requests to replay (default: all).")] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", help="Where (default: a new one).")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare every byte that comes back.")] = True,
    directory: Directory = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")] = False,
) -> None:
    """Match each request's prefix, get the hits, put the rest; print hit rate, speed and latencies.

    Exits 1 if a block came back with wrong bytes."""
    from kvfs_tools.replay import TraceError
    from kvfs_tools.replay import replay as run
    from kvfs_usrbio import BlockStore

    try:
        size = int(Size.parse(block_bytes))
    except ValueError as e:
        fail(str(e), code=USAGE)
    if not 8 <= size <= 16 << 20:
        fail("a block has 8 bytes to 16M", code=USAGE)
    place = (directory or configured().dir).absolute()
    try:
        store = BlockStore.open(place, namespace or f"replay/{uuid.uuid4().hex[:12]}")
        columns = (TextColumn("replaying"), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, transient=True, disable=json) as bar:
            with trace.open("rb") as lines:
                total = sum(1 for _ in lines)
            task = bar.add_task("replay", total=min(total, limit) if limit else total)
            report = run(
                store, trace, block_bytes=size, limit=limit, verify=verify, progress=lambda n: bar.advance(task, n)
            )
    except TraceError as e:
        fail(str(e))
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}" if e.filename else f"{place}: {e.strerror or e}")
    if json:
        print_json(report)
    else:
        typer.echo(f"requests    {report.requests}, {report.references} block references")
        typer.echo(f"prefix hits {report.prefix_hits} ({report.hit_rate * 100:.1f} %)")
        typer.echo(f"stored      {report.stored}, refused {report.refused}, vanished {report.vanished}")
        typer.echo(f"speed       {report.blocks_per_s:.0f} blocks/s, {report.bytes_per_s / 1e6:.0f} MB/s")
        for name, part in (("match", report.match), ("get", report.get), ("put", report.put)):
            typer.echo(f"{name:11s} p50 {part.p50:.2f} ms, p99 {part.p99:.2f} ms in {part.calls} calls")
        if verify:
            typer.echo(f"verified    {report.verified_bytes / 1e6:.1f} MB, {report.wrong} wrong")
    if report.wrong:
        raise typer.Exit(FAILED)
