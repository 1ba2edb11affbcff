"""A git user for the tests: `python git_writer.py REPOSITORY` commits, and packs now and then, until git fails.

Everything that git writes is synced. The number of commits is printed when the last of them has returned.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

GIT = (
    "git", "-c", "core.fsync=all", "-c", "core.fsyncMethod=fsync", "-c", "gc.auto=0",
    "-c", "user.name=a", "-c", "user.email=a@example.com",
)  # fmt: skip


def main(repository: Path) -> None:
    os.chdir(repository)
    seed = int.from_bytes(os.urandom(4))
    rng = random.Random(seed)

    def git(*arguments: str) -> str:
        done = subprocess.run([*GIT, *arguments], check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    while True:
        for _ in range(5):
            Path(f"file-{rng.randrange(200)}").write_bytes(rng.randbytes(rng.randrange(1, 50_000)))
        git("add", "-A")
        git("commit", "-qm", "more")
        print(git("rev-list", "--count", "HEAD").strip(), flush=True)
        if rng.random() < 0.1:
            git("gc", "-q", "--prune=now")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
