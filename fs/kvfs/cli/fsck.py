"""`kvfs fsck`: check and repair of a stopped data directory."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from typer.core import TyperCommand

from kvfs.cli.node import configured
from kvfs.cli.output import USAGE, fail, print_json

EXAMPLES = (
    "Examples:  kvfs fsck   |   kvfs fsck /data/kvfs --data   |   kvfs fsck /data/kvfs --repair --json   |   "
    "kvfs fsck /var/lib/kvfs/0.kvfs"
)
SHOWN = 50


class Command(TyperCommand):
    """Exits 16 on wrong usage, as fsck(8) says."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as e:  # the class of usage errors is not public in typer
            if getattr(e, "exit_code", None) == USAGE:
                e.exit_code = 16  # pyright: ignore[reportAttributeAccessIssue]
            raise


def fsck(
    directory: Annotated[
        Path | None, typer.Argument(help="Data directory (default: the configured one), or a chunk server's device.")
    ] = None,
    data: Annotated[bool, typer.Option("--data", help="Read every chunk and compare it with its checksums.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is unsound; what is sound stays.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")] = False,
) -> None:
    """Check a stopped kvfs: chunk store, metadata, and chunks that belong to nobody. Of a chunk server the store alone.

    Exits 0 if it is clean, 1 if everything found was mended, 4 if something is left, 8 if it cannot be checked
    (running, not a kvfs, another version), 16 on wrong usage."""
    from kvfs_tools.fsck import Exit, FsckError
    from kvfs_tools.fsck import fsck as run

    place = (directory or configured().dir).absolute()
    columns = (TextColumn("checking"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    try:
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=json or not console.is_terminal) as bar:
            task = bar.add_task("fsck", total=None, visible=data or repair)
            report = run(
                place,
                data=data,
                repair=repair,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except FsckError as e:
        fail(str(e), code=Exit.OPERATIONAL)
    if json:
        print_json(report)
    else:
        for problem in report.problems[:SHOWN]:
            typer.echo(str(problem))
        if report.found > SHOWN:
            typer.echo(f"... and {report.found - SHOWN} more (see --json)")
        typer.echo(
            f"{place}: {report.blocks} blocks, {report.file_chunks} file chunks, {report.inodes} inodes, "
            f"{report.data_bytes / 1e6:.1f} MB of data" + (f", {report.verified_bytes / 1e6:.1f} MB verified" * data)
        )
        if report.salvaged_blocks:
            typer.echo(f"{report.salvaged_blocks} blocks or pieces were found again")
        if report.unfinished_chunks:
            then = "dropped" if repair else "the next start drops them"
            typer.echo(f"{report.unfinished_chunks} chunks that a crash left without a name or size: {then}")
        if not report.orphans_compared:
            typer.echo("chunks were not compared with metadata: it is damaged, or elsewhere")
        if report.found == 0:
            typer.echo("clean")
        elif report.left == 0:
            typer.echo(f"{report.found} problems, all mended")
        else:
            hint = "" if repair else f"; mend what can be with `kvfs fsck {place} --repair`"
            typer.echo(f"{report.found} problems, {report.left} left{hint}")
    raise typer.Exit(report.exit_code)
