"""A careless writer for the tests: `python plain_writer.py DIR` writes files front to back until it is killed or fails.

`file-N` are written and closed one after the other, `log` is appended to all the time; nothing is ever synced. The number
of each closed file is printed.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from pathlib import Path

LOG_SEED = -1
LOG_MAX = 64 << 20


def content(number: int, length: int) -> bytes:
    """The first bytes of what is written to `file-N`."""
    words = random.Random(number).randbytes((length + 3) // 4 * 4)  # a part of a word depends on the length
    return words[:length]


def main(directory: Path) -> None:
    rng = random.Random(os.getpid())
    whole = content(LOG_SEED, LOG_MAX)
    log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT)
    logged = 0
    for number in itertools.count():
        data = content(number, 1 + rng.randrange(rng.choice((3000, 3000, 3000, 300_000))))
        fd = os.open(directory / f"file-{number}", os.O_WRONLY | os.O_CREAT)
        at = 0
        while at < len(data):
            at += os.write(fd, data[at : at + rng.choice((100, 4096, 10_000, 65_536, 131_072))])
            logged += os.write(log, whole[logged : logged + rng.randrange(1, 9000)])
        os.close(fd)
        print(number, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
