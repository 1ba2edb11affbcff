"""`kvfs bench`: this machine's figures, beside fio's."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kvfs.cli.node import Directory, configured
from kvfs.cli.output import FAILED, USAGE, fail, print_json
from kvfs.config import Size

if TYPE_CHECKING:
    from kvfs_tools.bench.report import Report, Row

EXAMPLES = "Examples:  kvfs bench --quick   |   kvfs bench --dir /data/kvfs   |   kvfs bench --json > bench.json"
QUICK_ROUNDS, QUICK_SECONDS, QUICK_SIZE = 3, 1.0, 1 << 30
WIDTH = 150  # where the output goes to a file; narrower terminals break lines
_COLUMNS: tuple[tuple[str, Literal["left", "right"], bool], ...] = (
    ("kvfs", "right", False),
    ("against", "left", True),
    ("", "right", False),
    ("ratio", "right", False),
    ("target", "right", False),
    ("", "left", False),
)
_STYLE = {"pass": "green", "short": "bold red", "no fio": "yellow"}


def bench(
    directory: Directory = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, max=99, help="Rounds (default: 5).")] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0.1, max=600, help="Of one measurement (default: 3).")
    ] = None,
    size: Annotated[str | None, typer.Option("--size", help="Bytes of the scratch store (default: 4G).")] = None,
    memory: Annotated[str, typer.Option("--memory", help="Bytes of the memory tier, where it is measured.")] = "512M",
    quick: Annotated[bool, typer.Option("--quick", help="About a minute: 3 rounds of 1 s, 1G.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print each command that is run.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 if a target is not reached.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")] = False,
) -> None:
    """Measure reads and writes over the ring against fio on the same file system.

    Starts a daemon of its own in a scratch directory next to the data directory and removes it afterwards; existing
    data is not touched. Without fio there are no ratios."""
    from kvfs_tools.bench.measure import Listener, Plan
    from kvfs_tools.bench.measure import bench as run
    from kvfs_tools.bench.programs import BenchError

    default = Plan(QUICK_ROUNDS, QUICK_SECONDS, QUICK_SIZE) if quick else Plan()
    try:
        plan = Plan(
            rounds=rounds or default.rounds,
            seconds=seconds or default.seconds,
            store=int(Size.parse(size)) if size is not None else default.store,
            memory=int(Size.parse(memory)),
        )
    except ValueError as e:
        fail(str(e), code=USAGE)
    beside = (directory or configured().dir).absolute().parent
    errors = Console(stderr=True)
    try:
        with Progress(
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=errors,
            transient=True,
            disable=not errors.is_terminal,
        ) as bar:
            task = bar.add_task("", total=None)

            def step(what: str) -> None:
                bar.update(task, advance=1, description=what)

            report = run(
                beside,
                plan,
                Listener(
                    begin=lambda total: bar.update(task, total=total),
                    step=step,
                    command=lambda line: errors.print(line, highlight=False, soft_wrap=True) if verbose else None,
                ),
            )
    except BenchError as e:
        fail(str(e))
    if json:
        print_json(report)
    else:
        _print(report)
    if strict and report.short:
        raise typer.Exit(FAILED)


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.2f} {unit}" if value < 100 else f"{value:,.0f} {unit}"


def _target(row: "Row") -> str:
    sign = "<=" if row.target.at_most else ">="
    return f"{sign} {row.target.value:,.0f}" if row.target.absolute else f"{sign} {row.target.value:g} x"


def _print(report: "Report") -> None:
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(show_lines=console.width < WIDTH)
    table.add_column("measured")
    for title, justify, wrap in _COLUMNS:
        table.add_column(title, justify=justify, no_wrap=not wrap)
    for row in report.rows:
        table.add_row(
            row.what + (f" ({row.note})" if row.note else ""),
            _number(row.ours, row.unit),
            row.against,
            _number(row.other, row.unit),
            f"{row.ratio:.2f} x" if row.ratio is not None else "",
            _target(row),
            Text(row.verdict, style=_STYLE[row.verdict]),
        )
    console.print(table)
    m = report.machine
    console.print(
        f"{report.rounds} rounds of {report.seconds:g} s; {m.cpus} CPUs, Linux {m.kernel}, load {m.load:.1f} at the start"
        + (f", {m.fio}." if m.fio else "."),
        soft_wrap=True,
    )
    for note in report.notes:
        console.print(note, soft_wrap=True)
