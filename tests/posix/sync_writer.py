"""A careful writer for the tests: `python sync_writer.py DIR` takes numbered steps until it is killed or fails.

Each step appends a record to `log`, replaces `state` by a new file, creates `step-N` and removes the one ten steps
before, all synced; then its number is printed.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

KEPT_STEPS = 10


def record(step: int) -> bytes:
    return b"%08d:" % step + bytes([step % 251]) * (step * 97 % 3000) + b"\n"


def state(step: int) -> bytes:
    return b"%08d:" % step + bytes([step % 241]) * (step * 7919 % 200_000)


def write_synced(path: Path, data: bytes, flags: int = os.O_CREAT | os.O_EXCL) -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    assert os.write(fd, data) == len(data)
    os.fsync(fd)
    os.close(fd)


def main(directory: Path) -> None:
    numbers = [int(name.removeprefix("step-")) for name in os.listdir(directory) if name.startswith("step-")]
    top = os.open(directory, os.O_RDONLY)
    for step in itertools.count(max(numbers, default=0) + 1):
        write_synced(directory / "log", record(step), os.O_CREAT | os.O_APPEND)
        (directory / "state.new").unlink(missing_ok=True)
        write_synced(directory / "state.new", state(step))
        (directory / "state.new").rename(directory / "state")
        write_synced(directory / f"step-{step}", record(step))
        if step > KEPT_STEPS:
            (directory / f"step-{step - KEPT_STEPS}").unlink()
        os.fsync(top)
        print(step, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
