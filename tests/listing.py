"""A large directory that is listed while other processes change it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

CHILD_S = 30

CHANGER = """
import itertools, os
print("ready", flush=True)
for i in itertools.count():
    name = "change-%d" % (i % 700)
    try:
        os.unlink(name)
    except FileNotFoundError:
        os.mknod(name)
"""

RENAMER = """
import itertools, os
for i in range(300):
    os.mknod("move-%d-0" % i)
print("ready", flush=True)
for i in itertools.count():
    os.rename("move-%d-%d" % (i % 300, i // 300), "move-%d-%d" % (i % 300, i // 300 + 1))
"""


def listed_under_change(directory: Path, entries: int, rounds: int) -> None:
    """A new directory: whatever others do there, each listing has every entry that stays exactly once."""
    directory.mkdir()
    kept = [f"kept-{i:06}" for i in range(entries)]
    for name in kept:
        os.mknod(directory / name, stat.S_IFREG | 0o644)
    changers = [
        subprocess.Popen([sys.executable, "-c", code], cwd=directory, stdout=subprocess.PIPE)
        for code in (CHANGER, RENAMER)
    ]
    try:
        for changer in changers:
            assert changer.stdout is not None
            assert changer.stdout.readline() == b"ready\n"
        for round_ in range(rounds):
            if round_ % 2:
                with os.scandir(directory) as listing:  # asks for the kind of each, as find and rm do
                    found = [entry.name for entry in listing if entry.is_file(follow_symlinks=False)]
            else:
                found = os.listdir(directory)
            assert sorted(name for name in found if name.startswith("kept-")) == kept
            assert all(name.startswith(("kept-", "change-", "move-")) for name in found)
        assert [changer.poll() for changer in changers] == [None, None]
    finally:
        for changer in changers:
            changer.kill()
            changer.communicate(timeout=CHILD_S)


def removed_while_listed(directory: Path) -> int:
    """Removes every entry as one listing names it, and then the directory; how many there were."""
    count = 0
    with os.scandir(directory) as listing:
        for entry in listing:
            os.unlink(entry.path)  # a second time it fails
            count += 1
    directory.rmdir()  # fails if the listing left one out
    return count
