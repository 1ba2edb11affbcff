"""SGLang's host pool through kvfs's own backend and through its hf3fs client on kvfs, beside its `file` backend on the file
system of /var/tmp and a mere copy of the same bytes in memory:

    python pool_bench.py [--pairs N] [--pages N] [--page-size TOKENS] [--layout LAYOUT] [--backends NAMES]

Runs of all take turns, each in a new process; prints medians. CPU time is the process's and, for kvfs, its daemon's. All
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
from kvfs_usrbio import BlockStore

HERE = Path(__file__).parent
BACKENDS = ("kvfs", "hf3fs", "file", "memcpy")
ON_KVFS = ("kvfs", "hf3fs")


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
        with BlockStore.open(self.data, "sglang") as store:
            store.evict([entry.key for entry in store.scan()])
        shutil.rmtree(self.plain, ignore_errors=True)
        self.plain.mkdir()


def measure(sglang: Environment, place: Place, backend: str, seed: int, options: argparse.Namespace) -> Measured:
    place.clear()
    daemon = ()
    if backend in ON_KVFS:
        daemon = ("--daemon", str(json.loads(kvfs("status", "--dir", place.data, "--json"))["pid"]))
    variables = {
        "PYTHONPATH": str(HERE / "sglang_cpu"),
        "SGLANG_HICACHE_HF3FS_CONFIG_PATH": str(place.config),
        "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(place.plain),
    }
    rounds = ("--rounds", str(options.rounds), "--pages", str(options.pages), "--seed", str(seed))
    kind = ("--page-size", str(options.page_size), "--allocator", "shm", "--kvfs", str(place.data / "mnt"))
    done = sglang.run(
        HERE / "sglang_pool.py", backend, options.layout, *rounds, *kind, *daemon, variables=variables, seconds=600
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
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--layout", default="page_first")
    parser.add_argument("--memory", default="512M")  # kvfs's tier; `file` has all the page cache
    parser.add_argument("--backends", default=",".join(BACKENDS))
    options = parser.parse_args()
    sglang = environment("sglang")
    root = Path(tempfile.mkdtemp(prefix="kvfs-", dir="/var/tmp"))
    backends: list[str] = options.backends.split(",")
    found: dict[str, list[Measured]] = {backend: [] for backend in backends}
    try:
        with running(root / "kv", "--size", "8G", "--memory", options.memory) as data:
            place = Place(data, root / "plain", root / "config.json")
            settings = {
                "file_path_prefix": str(data / "mnt" / "hicache"),
                "file_size": 1 << 40,
                "numjobs": 4,
                "entries": 8,
            }
            place.config.write_text(json.dumps(settings))
            for pair in range(options.pairs):
                for backend in backends if pair % 2 else reversed(backends):
                    found[backend].append(measure(sglang, place, backend, pair, options))
    finally:
        shutil.rmtree(root)
    print_medians(found, options)


def print_medians(found: dict[str, list[Measured]], options: argparse.Namespace) -> None:
    size = next(iter(found.values()))[0].bytes
    print(
        f"{options.layout}, {size >> 20} MiB a run, medians of {options.pairs} runs each, taking turns; in brackets: to file"
    )
    print(f"{'':24}" + "".join(f"{backend:>20}" for backend in found))
    for name, figure in FIGURES.items():
        medians = {backend: statistics.median(map(figure, runs)) for backend, runs in found.items()}
        to_file = {
            backend: f" ({median / medians['file']:.2f})" if "file" in medians else ""
            for backend, median in medians.items()
        }
        print(f"{name:24}" + "".join(f"{f'{median:.3f}{to_file[backend]}':>20}" for backend, median in medians.items()))


if __name__ == "__main__":
    main()
