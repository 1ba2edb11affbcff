"""Runs the two measuring programs, ring_bench (ours) and fio, and reads what they print."""

from __future__ import annotations

import importlib.metadata
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

SLACK_S = 60.0  # beyond a program's own running time: laying out files, a slow disk
FIO_DIRECT = ("--ioengine=io_uring", "--direct=1", "--fixedbufs=1", "--registerfiles=1")
FIO_RANDOM = ("--norandommap", "--randrepeat=0")


class BenchError(Exception):
    """The bench cannot run; str() is one sentence that says why."""


class RingResult(msgspec.Struct, frozen=True):
    """ring_bench's line, as far as it is used here."""

    ops: int
    seconds: float
    ops_per_s: float
    bytes_per_s: float
    cpu_us_per_op: float
    p50_us: float
    p99_us: float
    errors: int
    first_error: int
    wrong: int
    there: int


class _FioSide(msgspec.Struct, frozen=True):
    iops: float
    bw_bytes: float
    total_ios: int
    io_bytes: int


class _FioJob(msgspec.Struct, frozen=True):
    error: int
    read: _FioSide
    write: _FioSide
    usr_cpu: float
    sys_cpu: float
    job_runtime: int  # ms


class _FioOutput(msgspec.Struct, frozen=True):
    jobs: list[_FioJob]


@dataclass(frozen=True, slots=True)
class FioResult:
    iops: float
    bytes_per_s: float
    cpu_us_per_io: float  # user and system of the job while it ran, without fio's own start and end
    bytes: int


def ring_bench_path() -> Path:
    try:
        path = Path(str(importlib.metadata.distribution("kvfs").locate_file("kvfs_tools/bin/ring_bench")))
    except importlib.metadata.PackageNotFoundError:
        raise BenchError("kvfs is not installed in this environment, so ring_bench is missing") from None
    if not path.is_file():
        raise BenchError(f"{path} is missing: install kvfs again")
    return path


def output(command: Sequence[str], timeout: float, environ: Mapping[str, str] | None = None) -> bytes:
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False, env=environ
        )
    except subprocess.TimeoutExpired as e:
        said = ((e.stderr or b"") + (e.stdout or b"")).decode(errors="replace").strip().splitlines()
        last = f"; it said: {said[-1][:300]}" if said else ""
        raise BenchError(f"{name} did not end within {timeout:.0f} s: {shlex.join(command)}{last}") from None
    except OSError as e:
        raise BenchError(f"{name} cannot be started: {e.strerror}") from e
    # ring_bench exits 1 with its line when operations failed; the line says it better.
    if done.returncode != 0 and not done.stdout.lstrip().startswith(b"{"):
        said = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
        raise BenchError(f"{name} failed: {said[-1][:300] if said else f'exit code {done.returncode}'}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Ring:
    """ring_bench on one daemon's socket. `say` gets each command line."""

    program: Path
    socket: Path
    daemon: int
    say: Callable[[str], None]

    def run(self, target: str, op: str, *, seconds: float = 0.0, flags: Sequence[str] = (), **numbers: int):
        command = [str(self.program), str(self.socket), target, "--op", op, "--daemon", str(self.daemon)]
        for name, value in numbers.items():
            command += [f"--{name}", str(value)]
        if seconds:
            command += ["--seconds", f"{seconds:g}"]
        command += flags
        self.say(shlex.join(command))
        raw = output(command, seconds + SLACK_S * (1 if seconds else 5))
        try:
            result = msgspec.json.decode(raw, type=RingResult)
        except msgspec.DecodeError as e:
            raise BenchError(f"ring_bench gave no valid answer: {e}") from e
        if result.wrong:
            raise BenchError(f"{result.wrong} of {result.ops} {op} operations returned another block's bytes")
        if result.errors:
            raise BenchError(
                f"{result.errors} of {result.ops} {op} operations failed, the first with errno {result.first_error}"
            )
        return result


def batches(depth: int) -> list[str]:
    """fio hands over as many at once and takes as many before it goes on."""
    return [f"--iodepth_batch_{what}={depth}" for what in ("submit", "complete_min", "complete_max")]


@dataclass(frozen=True, slots=True)
class Fio:
    """fio, if there is one. `say` gets each command line."""

    program: Path
    say: Callable[[str], None]

    @classmethod
    def find(cls, say: Callable[[str], None]) -> Fio | None:
        found = shutil.which("fio")
        return cls(Path(found), say) if found else None

    def version(self) -> str:
        return output([str(self.program), "--version"], SLACK_S).decode(errors="replace").strip()

    def lay_out(self, file: Path, size: int) -> None:
        """Writes every byte once, so that reads find data and writes allocate nothing."""
        self._job(file, "--rw=write", "--bs=1M", f"--size={size}", "--iodepth=8", "--end_fsync=1", *FIO_DIRECT)

    def random(
        self, file: Path, rw: str, *, size: int, block: int, depth: int, seconds: float, more: Sequence[str] = ()
    ):
        return self._job(
            file,
            f"--rw={rw}",
            f"--bs={block}",
            f"--size={size}",
            f"--iodepth={depth}",
            f"--runtime={seconds:g}",
            "--time_based",
            *FIO_DIRECT,
            *FIO_RANDOM,
            *more,
            seconds=seconds,
        )

    def usrbio(
        self, file: Path, engine: Path, mount: Path, rw: str, *, size: int, block: int, depth: int, seconds: float
    ) -> FioResult:
        """3FS's engine. It works in whole batches only: all four depths are the same."""
        return self._job(
            file,
            f"--rw={rw}",
            f"--bs={block}",
            f"--size={size}",
            f"--ioengine=external:{engine.absolute()}",
            f"--mountpoint={mount}",
            f"--ior_depth={depth}",
            f"--iodepth={depth}",
            *batches(depth),
            f"--runtime={seconds:g}",
            "--time_based",
            "--direct=1",
            *FIO_RANDOM,
            seconds=seconds,
        )

    def pread(self, file: Path, *, size: int, block: int, jobs: int, seconds: float):
        return self._job(
            file,
            "--rw=randread",
            f"--bs={block}",
            f"--size={size}",
            "--ioengine=psync",
            "--direct=1",
            f"--numjobs={jobs}",
            f"--runtime={seconds:g}",
            "--time_based",
            *FIO_RANDOM,
            seconds=seconds,
        )

    def through(self, file: Path, rw: str, *, size: int, block: int, jobs: int = 1, seconds: float = 0.0) -> FioResult:
        """psync, O_DIRECT: the whole file once, or for `seconds`. Writes end with an fsync, which counts.

        Threads, so that nothing is left when fio is killed; no fallocate(), which not every file system has.
        """
        more = [f"--runtime={seconds:g}", "--time_based", *FIO_RANDOM] if seconds else []
        if "write" in rw:
            more.append("--end_fsync=1")
        result = self._job(
            file,
            f"--rw={rw}",
            f"--bs={block}",
            f"--size={size}",
            "--ioengine=psync",
            "--direct=1",
            "--thread",
            "--fallocate=none",
            f"--numjobs={jobs}",
            *more,
            seconds=seconds,
        )
        if result.bytes < block or (not seconds and result.bytes != size * jobs):
            raise BenchError(f"fio did {result.bytes} bytes of {size * jobs} on {file}")
        return result

    def _job(self, file: Path, *options: str, seconds: float = 0.0) -> FioResult:
        command = [str(self.program), "--name=bench", f"--filename={file}", *options]
        command += ["--group_reporting", "--output-format=json"]
        self.say(shlex.join(command))
        raw = output(command, seconds + SLACK_S * (1 if seconds else 5))
        try:
            jobs = msgspec.json.decode(raw[raw.index(b"{") :], type=_FioOutput).jobs
        except (msgspec.DecodeError, ValueError) as e:
            raise BenchError(f"fio gave no valid JSON: {e}") from e
        if not jobs or jobs[0].error:
            raise BenchError(f"fio failed with errno {jobs[0].error if jobs else 'unknown'} on {file}")
        job = jobs[0]
        ios = max(1, job.read.total_ios + job.write.total_ios)
        cpu_s = (job.usr_cpu + job.sys_cpu) / 100 * job.job_runtime / 1000
        return FioResult(
            iops=job.read.iops + job.write.iops,
            bytes_per_s=job.read.bw_bytes + job.write.bw_bytes,
            cpu_us_per_io=cpu_s / ios * 1e6,
            bytes=job.read.io_bytes + job.write.io_bytes,
        )
