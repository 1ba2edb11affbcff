"""SGLang's host pool through its hf3fs client on kvfs beside its `file` backend on the file system of /var/tmp:

    python pool_bench.py [--pairs N] [--pages N] [--layout LAYOUT]

Runs of both take turns, each in a new process; prints medians. CPU time is the process's and, for kvfs, its daemon's. Both
write without a flush and read what was just written. INTEROP_WHEEL names a wheel of kvfs, as `make
interop` leaves in build/interop.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from commands import kvfs, running
from environments import Environment, environment

HERE = Path(__file__).parent
BACKENDS = ("hf3fs", "file")


class Measured(msgspec.Struct):
    """What sglang_pool.py prints."""

    bytes: int
    wrote: bool
    read: bool
    equal: bool
    write_s: float
    read_s: float
    write_cpu_s: float
    read_cpu_s: float


FIGURES: dict[str, Callable[[Measured], float]] = {
    "write, MB/s": lambda run: run.bytes / run.write_s / 1e6,
    "read, MB/s": lambda run: run.bytes / run.read_s / 1e6,
    "write, CPU ns/byte": lambda run: run.write_cpu_s / run.bytes * 1e9,
    "read, CPU ns/byte": lambda run: run.read_cpu_s / run.bytes * 1e9,
}


@dataclass(frozen=True, slots=True)
class Place:
    data: Path
    plain: Path
    config: Path

    def clear(self) -> None:
        for file in (self.data / "mnt").glob("hicache.*"):
            file.unlink()
        shutil.rmtree(self.plain, ignore_errors=True)
        self.plain.mkdir()


def measure(sglang: Environment, place: Place, backend: str, seed: int, options: argparse.Namespace) -> Measured:
    place.clear()
    daemon = ()
    if backend == "hf3fs":
        daemon = ("--daemon", str(json.loads(kvfs("status", "--dir", place.data, "--json"))["pid"]))
    variables = {
        "PYTHONPATH": str(HERE / "sglang_cpu"),
        "SGLANG_HICACHE_HF3FS_CONFIG_PATH": str(place.config),
        "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(place.plain),
    }
    rounds = ("--rounds", str(options.rounds), "--pages", str(options.pages), "--seed", str(seed))
    done = sglang.run(
        HERE / "sglang_pool.py", backend, options.layout, *rounds, *daemon, variables=variables, seconds=600
    )
    measured = msgspec.json.decode(done.stdout.splitlines()[-1], type=Measured)
    assert measured.wrote
    assert measured.read
    assert measured.equal
    return measured


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--pages", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layout", default="page_first")
    options = parser.parse_args()
    sglang = environment("sglang")
    root = Path(tempfile.mkdtemp(prefix="kvfs-", dir="/var/tmp"))
    found: dict[str, list[Measured]] = {backend: [] for backend in BACKENDS}
    try:
        with running(root / "kv", "--size", "8G") as data:
            place = Place(data, root / "plain", root / "config.json")
            settings = {
                "file_path_prefix": str(data / "mnt" / "hicache"),
                "file_size": 1 << 40,
                "numjobs": 4,
                "entries": 8,
            }
            place.config.write_text(json.dumps(settings))
            for pair in range(options.pairs):
                for backend in BACKENDS if pair % 2 else reversed(BACKENDS):
                    found[backend].append(measure(sglang, place, backend, pair, options))
    finally:
        shutil.rmtree(root)
    print_medians(found, options)


def print_medians(found: dict[str, list[Measured]], options: argparse.Namespace) -> None:
    size = found["file"][0].bytes
    print(f"{options.layout}, {size >> 20} MiB a run, medians of {options.pairs} runs each, taking turns")
    print(f"{'':24}{'hf3fs on kvfs':>16}{'file':>16}{'kvfs/file':>12}")
    for name, figure in FIGURES.items():
        kvfs_, file = (statistics.median(figure(run) for run in found[backend]) for backend in BACKENDS)
        print(f"{name:24}{kvfs_:16.3f}{file:16.3f}{kvfs_ / file:12.2f}")


if __name__ == "__main__":
    main()
