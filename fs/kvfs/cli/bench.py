"""`kvfs bench`: this machine's figures, beside fio's; `kvfs bench posix`: the mount's, beside another file system's;
`kvfs bench usrbio`: those of a program written for 3FS; `kvfs bench net`: those of a chunk server; `kvfs bench
ttft`: those of an inference engine."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kvfs.cli.node import Directory, configured
from kvfs.cli.output import FAILED, USAGE, fail, print_json
from kvfs.config import Size

if TYPE_CHECKING:
    from kvfs_tools.bench.measure import Listener
    from kvfs_tools.bench.report import Machine, PosixReport, Report, Target

EXAMPLES = "Examples:  kvfs bench --quick   |   kvfs bench --dir /data/kvfs   |   kvfs bench --json > bench.json"
POSIX_EXAMPLES = (
    "Examples:  kvfs bench posix --quick   |   kvfs bench posix --peer juicefs   |   "
    "kvfs bench posix --quick --only 4k --only create"
)
USRBIO_EXAMPLES = (
    "Examples:  kvfs bench usrbio --engine ./hf3fs_usrbio.so   |   kvfs bench usrbio --engine ENGINE --fio ./fio --json"
)
NET_EXAMPLES = "Examples:  kvfs bench net   |   kvfs bench net --mooncake ./mooncake-venv/bin/python --json"
TTFT_EXAMPLES = (
    "Examples:  kvfs bench ttft --python vllm-env/bin/python --breakdown   |   "
    "kvfs bench ttft --python PYTHON --tokens 4096 --rounds 1 --questions 0"
)
QUICK_ROUNDS, QUICK_SECONDS, QUICK_SIZE = 3, 1.0, 1 << 30
QUICK_POSIX_ROUNDS, QUICK_FILE, QUICK_FILES = 2, 256 << 20, 10_000
WIDTH = 150  # where the output goes to a file; narrower terminals break lines
_COLUMNS: tuple[tuple[str, Literal["left", "right"], bool], ...] = (
    ("kvfs", "right", False),
    ("against", "left", True),
    ("", "right", False),
    ("ratio", "right", False),
    ("target", "right", False),
    ("", "left", False),
)
_STYLE = {"pass": "green", "short": "bold red", "no fio": "yellow", "no peer": "yellow"}


R = TypeVar("R", "Report", "PosixReport")

app = typer.Typer(rich_markup_mode="rich")

Rounds = Annotated[int | None, typer.Option("--rounds", min=1, max=99, help="Rounds (default: 5).")]
Seconds = Annotated[float | None, typer.Option("--seconds", min=0.1, max=600, help="Of one measurement (default: 3).")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print each command that is run.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit 1 if a target is not reached.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]


@app.callback(invoke_without_command=True, epilog=EXAMPLES)
def bench(
    context: typer.Context,
    directory: Directory = None,
    rounds: Rounds = None,
    seconds: Seconds = None,
    size: Annotated[str | None, typer.Option("--size", help="Bytes of the scratch store (default: 4G).")] = None,
    memory: Annotated[str, typer.Option("--memory", help="Bytes of the memory tier, where it is measured.")] = "512M",
    quick: Annotated[bool, typer.Option("--quick", help="About a minute: 3 rounds of 1 s, 1G.")] = False,
    verbose: Verbose = False,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Measure reads and writes over the ring against fio on the same file system.

    Starts a daemon of its own in a scratch directory next to the data directory and removes it afterwards; existing
    data is not touched. Without fio there are no ratios. `kvfs bench posix` measures the mount, `kvfs bench usrbio` a
    program written for 3FS."""
    if context.invoked_subcommand is not None:
        for name in context.params:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                fail(f"options of {context.invoked_subcommand} come after its name", code=USAGE)
        return
    from kvfs_tools.bench.measure import Plan
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
    try:
        with _listener(verbose) as listener:
            report = run(_beside(directory), plan, listener)
    except BenchError as e:
        fail(str(e))
    _deliver(report, _print, json=json, strict=strict)


@app.command("posix", epilog=POSIX_EXAMPLES)
def posix(
    directory: Directory = None,
    peer: Annotated[
        Literal["juicefs"] | None, typer.Option("--peer", help="The file system to compare with: juicefs.")
    ] = None,
    peer_program: Annotated[
        Path | None,
        typer.Option(
            "--peer-program", help="Its program (default: on PATH or beside this Python, else from PyPI for this run)."
        ),
    ] = None,
    rounds: Rounds = None,
    seconds: Seconds = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Bytes of the file that is read and written (default: 1G).")
    ] = None,
    files: Annotated[
        int | None, typer.Option("--files", min=1, max=10_000_000, help="In the large directory (default: 100000).")
    ] = None,
    memory: Annotated[str, typer.Option("--memory", help="Bytes of kvfs's memory tier.")] = "512M",
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Only measures with this in their name; may be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes: 2 rounds of 1 s, 256M, 10000 files.")] = False,
    verbose: Verbose = False,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Measure the mount against another FUSE file system and against the bare file system below both.

    Measures, by name: write-1m, read-1m, read-4k, write-4k (fio, O_DIRECT); cached-read, cached-mmap (from the page
    cache); create-1, create-4, stat, readdir, unlink (small files). kvfs, the peer and a plain directory run in turn in
    a scratch directory next to the data directory, on the same disk; it and everything started are gone afterwards, after
    Ctrl-C, too. Without --peer only the page cache has a target. Use an idle machine, and root, so that caches can be
    dropped."""
    from kvfs_tools.bench.posix import PosixPlan, bench_posix
    from kvfs_tools.bench.programs import BenchError

    default = PosixPlan(QUICK_POSIX_ROUNDS, QUICK_SECONDS, QUICK_FILE, QUICK_FILES) if quick else PosixPlan()
    try:
        plan = PosixPlan(
            rounds=rounds or default.rounds,
            seconds=seconds or default.seconds,
            file=int(Size.parse(size)) if size is not None else default.file,
            files=files or default.files,
            memory=int(Size.parse(memory)),
            only=tuple(only or ()),
        )
    except ValueError as e:
        fail(str(e), code=USAGE)
    if peer_program is not None and peer is None:
        fail("--peer-program needs --peer", code=USAGE)
    try:
        with _listener(verbose) as listener:
            report = bench_posix(
                _beside(directory), plan, peer=peer is not None, peer_program=peer_program, listen=listener
            )
    except BenchError as e:
        fail(str(e))
    _deliver(report, _print_posix, json=json, strict=strict)


@app.command("usrbio", epilog=USRBIO_EXAMPLES)
def usrbio(
    engine: Annotated[
        Path, typer.Option("--engine", help="3FS's fio engine, built against `kvfs usrbio --print-flags`.")
    ],
    directory: Directory = None,
    fio: Annotated[
        Path | None, typer.Option("--fio", help="The fio whose source it was built with (default: on PATH).")
    ] = None,
    rounds: Rounds = None,
    seconds: Seconds = None,
    size: Annotated[str | None, typer.Option("--size", help="Bytes of the file that is read (default: 1G).")] = None,
    verbose: Verbose = False,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Measure a program written for 3FS: random reads by 3FS's own fio engine.

    Beside it, in turn: the same fio with io_uring on the disk below, and with pread through the mount. The engine is
    benchmarks/fio_usrbio of 3FS's source, unmodified."""
    from kvfs_tools.bench.programs import BenchError
    from kvfs_tools.bench.usrbio import UsrbioPlan, bench_usrbio

    default = UsrbioPlan()
    try:
        plan = UsrbioPlan(
            rounds=rounds or default.rounds,
            seconds=seconds or default.seconds,
            file=int(Size.parse(size)) if size is not None else default.file,
        )
    except ValueError as e:
        fail(str(e), code=USAGE)
    try:
        with _listener(verbose) as listener:
            report = bench_usrbio(_beside(directory), plan, engine=engine, program=fio, listen=listener)
    except BenchError as e:
        fail(str(e))
    _deliver(report, _print, json=json, strict=strict)


@app.command("net", epilog=NET_EXAMPLES)
def net(
    directory: Directory = None,
    mooncake: Annotated[
        Path | None,
        typer.Option(
            "--mooncake",
            help="A Python with mooncake-transfer-engine-non-cuda and numpy, to compare with Mooncake Store.",
        ),
    ] = None,
    rounds: Rounds = None,
    seconds: Seconds = None,
    quick: Annotated[bool, typer.Option("--quick", help="3 rounds of 1 s.")] = False,
    verbose: Verbose = False,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Measure a chunk server over loopback TCP and shared memory: small and large blocks from memory, small ones from disk; and
    over two rails.

    Beside it, in turn: Mooncake Store (with --mooncake), a plain sender and receiver of messages of 1 MiB, the same store
    over its own ring, and one rail. Rails join network namespaces and are shaped, for which root, iproute2 and util-linux are needed.
    Server, client and peers are processes of their own, started and ended here."""
    from kvfs_tools.bench.net import NetPlan, bench_net
    from kvfs_tools.bench.programs import BenchError

    default = NetPlan(QUICK_ROUNDS, QUICK_SECONDS) if quick else NetPlan()
    plan = NetPlan(rounds=rounds or default.rounds, seconds=seconds or default.seconds)
    try:
        with _listener(verbose) as listener:
            report = bench_net(_beside(directory), plan, mooncake=mooncake, listen=listener)
    except BenchError as e:
        fail(str(e))
    _deliver(report, _print, json=json, strict=strict)


@app.command("ttft", epilog=TTFT_EXAMPLES)
def ttft(
    python: Annotated[Path, typer.Option("--python", help="The Python of an environment with vLLM and kvfs.")],
    directory: Directory = None,
    shape: Annotated[Literal["tiny", "small"], typer.Option("--shape", help="Of the model.")] = "small",
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", help="Of a prompt; may be repeated (default: 4096, 8192).")
    ] = None,
    rounds: Rounds = None,
    contexts: Annotated[int, typer.Option("--contexts", min=0, help="That are shared.")] = 8,
    questions: Annotated[int, typer.Option("--questions", min=0, help="Over each of them; 0: not measured.")] = 20,
    context_tokens: Annotated[int, typer.Option("--context-tokens", help="Of one of them.")] = 4096,
    example: Annotated[
        bool, typer.Option("--example/--no-example", help="Compare with vLLM's connector that keeps files.")
    ] = True,
    lmcache: Annotated[
        bool,
        typer.Option("--lmcache", help="Compare with LMCache's server on files; needs lmcache in that environment."),
    ] = False,
    computed: Annotated[
        int | None,
        typer.Option("--computed", min=1, help="Questions over each context without kvfs (default: as many as with)."),
    ] = None,
    memory: Annotated[str, typer.Option("--memory", help="Bytes of kvfs's memory tier.")] = "512M",
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Where the time of a hit goes.")] = False,
    verbose: Verbose = False,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Measure the time to the first token in vLLM: with the prompt's KV in kvfs, beside computing it.

    Each figure comes from engine processes of their own. Use an idle machine; a full run takes hours on a few cores."""
    from kvfs_tools.bench.programs import BenchError
    from kvfs_tools.bench.ttft import TtftPlan, bench_ttft

    try:
        plan = TtftPlan(
            python=python.absolute(),
            shape=shape,
            tokens=tuple(tokens or (4096, 8192)),
            rounds=rounds or 5,
            contexts=contexts,
            questions=questions,
            context_tokens=context_tokens,
            example=example,
            lmcache=lmcache,
            computed=computed or questions,
            memory=int(Size.parse(memory)),
        )
    except ValueError as e:
        fail(str(e), code=USAGE)
    try:
        with _listener(verbose) as listener:
            report = bench_ttft(_beside(directory), plan, breakdown=breakdown, listen=listener)
    except BenchError as e:
        fail(str(e))
    _deliver(report, _print, json=json, strict=strict)


def _deliver(report: R, show: Callable[[R], None], *, json: bool, strict: bool) -> None:
    if json:
        print_json(report)
    else:
        show(report)
    if strict and report.short:
        raise typer.Exit(FAILED)


def _beside(directory: Path | None) -> Path:
    return (directory or configured().dir).absolute().parent


@contextmanager
def _listener(verbose: bool) -> "Generator[Listener]":
    """Shows what goes on, on standard error."""
    from kvfs_tools.bench.measure import Listener

    errors = Console(stderr=True)

    def line(text: str) -> None:
        errors.print(text, highlight=False, soft_wrap=True, markup=False)

    with Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    ) as bar:
        task = bar.add_task("", total=None)
        yield Listener(
            begin=lambda total: bar.update(task, total=total),
            step=lambda what: bar.update(task, advance=1, description=what),
            command=line if verbose else lambda _: None,
            say=line,
        )


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.2f} {unit}" if value < 100 else f"{value:,.0f} {unit}"


def _target(target: "Target") -> str:
    sign = "<=" if target.at_most else ">="
    return f"{sign} {target.value:,.0f}" if target.absolute else f"{sign} {target.value:g} x"


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    return console


def _print(report: "Report") -> None:
    console = _console()
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
            _target(row.target),
            Text(row.verdict, style=_STYLE[row.verdict]),
        )
    console.print(table)
    _print_circumstances(report.rounds, report.seconds, report.machine, report.notes)


def _print_posix(report: "PosixReport") -> None:
    console = _console()
    table = Table(show_lines=console.width < WIDTH)
    table.add_column("measured")
    contenders = list(report.rows[0].medians)
    others = [name for name in contenders if name in report.rows[0].ratios]
    titles = {"raw": f"raw {report.file_system}"}
    for title in (*(titles.get(name, name) for name in contenders), *(f"to {name}" for name in others), "target"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for row in report.rows:
        table.add_row(
            f"{row.what} ({row.name})",
            *(_number(row.medians[name], row.unit) for name in contenders),
            *(f"{row.ratios[name]:.2f} x" for name in others),
            f"{_target(row.target)} {row.against}",
            Text(row.verdict, style=_STYLE[row.verdict]),
        )
    console.print(table)
    peer = [report.peer] if report.peer else []
    _print_circumstances(report.rounds, report.seconds, report.machine, [*peer, *report.notes])


def _print_circumstances(rounds: int, seconds: float, m: "Machine", notes: list[str]) -> None:
    console = _console()
    console.print(
        f"{rounds} rounds of {seconds:g} s; {m.cpus} CPUs, Linux {m.kernel}, load {m.load:.1f} at the start"
        + (f", {m.fio}." if m.fio else "."),
        soft_wrap=True,
    )
    for note in notes:
        console.print(note, soft_wrap=True)
