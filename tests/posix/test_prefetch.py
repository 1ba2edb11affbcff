"""What the node was given of a directory ahead of lookups is never older than the directory."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import time
from pathlib import Path

import pytest
from mount_process import Mounted

from kvfs.mount.prefetch import MISSES

pytestmark = pytest.mark.timeout(120)

FILES = 300
LEFT_S = 0.5
"""Long enough for the entries of so small a directory to be left."""


def _forget_names(mounted: Mounted) -> None:
    """The kernel drops the mount's names and attributes that nobody uses."""
    subprocess.run(["mount", "-i", "-o", "remount", str(mounted.root)], check=True, timeout=20)


def _walk(directory: Path, names: list[str]) -> None:
    for name in names:
        os.lstat(directory / name)


def _facts(path: Path) -> tuple[int, int, int, int, int]:
    found = os.lstat(path)
    return found.st_ino, found.st_mode, found.st_nlink, found.st_size, found.st_mtime_ns


def test_a_walk_sees_what_fstat_sees(mounted: Mounted) -> None:
    """Changes through names that the kernel knows, while the node holds older entries of them."""
    directory = mounted.root / "d"
    directory.mkdir()
    (mounted.root / "elsewhere").mkdir()
    rng = random.Random(7)
    for i in range(FILES):
        (directory / f"f{i}").write_bytes(bytes(i))
    for i in range(40):
        (directory / f"sub{i}").mkdir()
    for _ in range(6):
        names = sorted(os.listdir(directory))
        _forget_names(mounted)
        _walk(directory, rng.sample(names, 2 * MISSES))
        time.sleep(LEFT_S)  # the rest is with the node now
        _walk(directory, names)
        _forget_names(mounted)
        _walk(directory, rng.sample(names, len(names) // 2))  # and again, as far as they were not asked for
        time.sleep(LEFT_S)
        expected: dict[str, tuple[int, int, int, int, int]] = {}
        gone: set[str] = set()
        for name in rng.sample(names, 120):
            path = directory / name
            fd = os.open(path, os.O_RDONLY)
            kind = rng.choice(["chmod", "write", "truncate", "unlink", "rename", "replace", "link", "utime"])
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                kind = "enter" if rng.random() < 0.5 else "chmod"
            new = f"{name}-{rng.randrange(10**6)}"
            match kind:
                case "chmod":
                    path.chmod(rng.choice([0o700, 0o755, 0o750]))
                case "write":
                    with path.open("ab") as file:
                        file.write(b"x" * rng.randrange(1, 9000))
                case "truncate":
                    os.truncate(path, rng.randrange(5000))
                case "unlink":
                    path.unlink()
                    gone.add(name)
                case "rename":
                    path.rename(directory / new)
                    gone.add(name)
                    name = new
                case "replace":
                    other = mounted.root / "elsewhere" / new
                    other.write_bytes(b"new")
                    other.rename(path)
                    os.close(fd)
                    fd = os.open(path, os.O_RDONLY)
                case "link":
                    os.link(path, mounted.root / "elsewhere" / new)
                case "utime":
                    os.utime(path, ns=(1, rng.randrange(10**18)))
                case _:
                    (path / new).mkdir()
            if name not in gone:
                now = os.fstat(fd)
                expected[name] = (now.st_ino, now.st_mode, now.st_nlink, now.st_size, now.st_mtime_ns)
            os.close(fd)
        _forget_names(mounted)
        for name, facts in expected.items():
            assert _facts(directory / name) == facts, name
        for name in gone - expected.keys():
            assert not os.path.lexists(directory / name)


def test_names_of_a_large_listing_come_with_their_types(mounted: Mounted) -> None:
    directory = mounted.root / "d"
    directory.mkdir()
    kinds = {f"entry-{i:04}": i % 3 for i in range(2000)}
    for name, kind in kinds.items():
        if kind == 0:
            (directory / name).mkdir()
        elif kind == 1:
            (directory / name).symlink_to("nowhere")
        else:
            os.close(os.open(directory / name, os.O_CREAT | os.O_WRONLY))
    _forget_names(mounted)
    with os.scandir(directory) as entries:
        listed = {e.name: (e.is_dir(follow_symlinks=False), e.is_symlink(), e.inode()) for e in entries}
    assert listed.keys() == kinds.keys()
    for name, (is_dir, is_link, ino) in listed.items():
        assert (is_dir, is_link) == (kinds[name] == 0, kinds[name] == 1)
        assert ino == os.lstat(directory / name).st_ino
