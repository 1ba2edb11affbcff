"""Changes that reach the store in groups, and names that the kernel remembers to be missing."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys

import pytest
from mount_process import Mounted, fails

pytestmark = pytest.mark.timeout(120)

LAG = 5
WORKER = """
import itertools, os, sys
for n in itertools.count(int(sys.argv[2])):
    fd = os.open(f"{sys.argv[1]}/{n:06}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.write(fd, b"%06d" % n * 1000)
    if n % 3 == 0:
        os.fsync(fd)
        print(n, flush=True)
    os.close(fd)
    if n >= 5:
        os.unlink(f"{sys.argv[1]}/{n - 5:06}")
"""


def test_a_kill_loses_only_the_last_changes(mounted: Mounted) -> None:
    """Each file is made, and the one made five before it removed: what is there says how far the daemon had got."""
    first = 0
    for round_ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", WORKER, str(mounted.root), str(first)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as worker:
            assert worker.stdout is not None
            lines = iter(worker.stdout)
            synced = [int(line) for line in itertools.islice(lines, 20 + 7 * round_)]
            mounted.kill()
            synced += [int(line) for line in lines]
        mounted.start()
        there = sorted(int(name) for name in os.listdir(mounted.root))
        assert there == list(range(there[0], there[-1] + 1))
        assert len(there) in (LAG, LAG + 1)
        assert there[-1] >= synced[-1]
        for n in set(there) & set(synced):  # a removal that the kill took back must not have taken the data
            assert (mounted.root / f"{n:06}").read_bytes() == b"%06d" % n * 1000
        first = there[-1] + 1
        if len(there) > LAG:
            (mounted.root / f"{there[0]:06}").unlink()


def test_an_orderly_stop_stores_the_last_changes(mounted: Mounted) -> None:
    for n in range(300):
        (mounted.root / str(n)).write_bytes(b"x" * n)
    for n in range(0, 300, 2):
        (mounted.root / str(n)).unlink()
    mounted.stop()
    mounted.start()
    assert {int(p.name): p.stat().st_size for p in mounted.root.iterdir()} == {n: n for n in range(1, 300, 2)}


def test_a_name_that_was_missing_appears(mounted: Mounted) -> None:
    root = mounted.root
    names = [root / "made", root / "linked", root / "moved", root / "directory", root / "symbolic"]
    for name in names:
        for _ in range(2):
            assert not name.exists()
    made, linked, moved, directory, symbolic = names
    made.write_bytes(b"1")
    os.link(made, linked)
    os.rename(linked, moved)
    assert moved.read_bytes() == b"1"
    assert not linked.exists()
    directory.mkdir()
    symbolic.symlink_to("made")
    assert symbolic.read_bytes() == b"1"
    assert not (directory / "x").exists()
    os.rename(made, directory / "x")
    assert (directory / "x").read_bytes() == b"1"
    with fails(errno.ENOENT):
        os.stat(made)


def test_a_directorys_attributes_follow_every_change(mounted: Mounted) -> None:
    d = mounted.root / "d"
    d.mkdir()
    seen = [os.stat(d)]

    def changed() -> os.stat_result:
        seen.append(os.stat(d))
        assert seen[-1].st_ctime_ns > seen[-2].st_ctime_ns
        return seen[-1]

    (d / "f").touch()
    assert changed().st_mtime_ns > seen[-2].st_mtime_ns
    (d / "sub").mkdir()
    assert changed().st_nlink == 3
    os.rename(d / "f", mounted.root / "f")
    assert changed().st_mtime_ns > seen[-2].st_mtime_ns
    os.chmod(d, 0o700)
    assert changed().st_mode & 0o777 == 0o700
    os.utime(d, ns=(1, 2))
    assert (changed().st_atime_ns, seen[-1].st_mtime_ns) == (1, 2)
    os.setxattr(d, "user.a", b"v")
    changed()
    (d / "sub").rmdir()
    assert changed().st_nlink == 2
    fd = os.open(d, os.O_RDONLY | os.O_DIRECTORY)
    d.rmdir()
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)
    with fails(errno.ENOENT):
        os.stat(d)
    d.mkdir()
    assert os.stat(d).st_nlink == 2


def test_new_files_have_no_attributes_until_they_are_set(mounted: Mounted) -> None:
    path = mounted.root / "f"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"x")
    with fails(errno.ENODATA):
        os.getxattr(path, "security.capability")
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    if os.geteuid() == 0:
        os.setxattr(path, "security.capability", capability)
        assert os.getxattr(path, "security.capability") == capability
        os.write(fd, b"y")  # takes the capability away
        with fails(errno.ENODATA):
            os.getxattr(path, "security.capability")
    os.setxattr(path, "user.a", b"v" * 1000)
    assert os.getxattr(path, "user.a") == b"v" * 1000
    assert os.listxattr(path) == ["user.a"]
    os.close(fd)
