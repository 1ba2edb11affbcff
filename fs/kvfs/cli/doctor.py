"""`kvfs doctor`: what this host offers, and what to do about what is missing."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvfs.cli.output import FAILED, fail, print_json
from kvfs.config import ConfigError, load

EXAMPLES = "Examples:  kvfs doctor   |   kvfs doctor --dir /data/kvfs   |   kvfs doctor --json"
_STYLE = {"ok": "green", "absent": "yellow", "missing": "bold red"}


def doctor(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Data directory to try direct I/O in (default: the configured one).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")] = False,
) -> None:
    """Check this host: FUSE, io_uring, memory limits, RDMA, GPU. Exits 1 if kvfs cannot run here."""
    from kvfs_tools.doctor import examine

    try:
        place = directory if directory is not None else load().dir
    except ConfigError as error:
        fail(str(error))
    report = examine(place)
    if json:
        print_json(report)
    else:
        table = Table(box=None, pad_edge=False)
        for title in ("check", "status", "found"):
            table.add_column(title, overflow="fold")
        for check in report.checks:
            table.add_row(check.name, Text(check.status, style=_STYLE[check.status]), Text(check.detail))
        console = Console()
        console.print(table)
        for check in report.checks:
            if check.remedy:
                console.print(Text(f"{check.name}: {check.remedy}"), soft_wrap=True)
        console.print("kvfs can run here." if report.ok else "kvfs cannot run here until what is missing is there.")
    if not report.ok:
        raise typer.Exit(FAILED)
