"""Programs that people run, on the mount: their own checks pass, and `kvfs fsck --data` finds nothing afterwards."""

from __future__ import annotations

import compileall
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mount_process import Mounted

pytestmark = pytest.mark.timeout(120)

WRITER = Path(__file__).with_name("sqlite_writer.py")
STDLIB = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = shutil.ignore_patterns("site-packages", "__pycache__", "test", "tests", "config-*", "idlelib", "*.so", "*.a")


@pytest.fixture
def root(mounted: Mounted) -> Iterator[Path]:
    """The mount; afterwards the daemon is stopped and what it left is checked."""
    yield mounted.root
    assert mounted.stop() == 0, mounted.log.read_text()
    run(sys.executable, "-m", "kvfs", "fsck", mounted.data, "--data")


def run(*command: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=100,
        check=False,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, (command, done.returncode, done.stdout[-3000:])
    return done.stdout


def digests(top: Path) -> dict[str, str]:
    """SHA-256 of every file below, the target of every symbolic link."""
    found: dict[str, str] = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        if path.is_symlink():
            found[name] = "-> " + os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "dir"
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files of many sizes and kinds outside the mount."""
    top = tmp_path / "tree"
    rng = random.Random(5)
    for i in range(150):
        path = top / f"d{i % 7}" / f"sub {i % 3}" / f"file-{i} ä"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.choice([0, 1, 300, 4096, 65_536, 65_537, 400_000])))
        path.chmod(rng.choice([0o600, 0o644, 0o755]))
        os.utime(path, ns=(10**18 + i, 10**18 + 7 * i))
    with (top / "sparse").open("wb") as file:
        file.seek(5_000_000)
        file.write(b"end")
    os.symlink("d1/nowhere", top / "broken link")
    os.link(top / "sparse", top / "d1" / "hard link")
    return top


def test_standard_library_compiles(root: Path) -> None:
    copy = root / "Lib"
    shutil.copytree(STDLIB, copy, ignore=LEFT_OUT)
    assert compileall.compile_dir(copy, quiet=1)
    sources = list(copy.rglob("*.py"))
    assert len(sources) > 300
    assert all(path.read_bytes() == (STDLIB / path.relative_to(copy)).read_bytes() for path in sources)
    compiled = list(copy.rglob("*.pyc"))
    assert len(compiled) == len(sources)
    # The copy itself is what this interpreter runs from, compiled files and all.
    code = "import json, email.message, asyncio; print(json.__cached__)"
    out = run(sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(copy)!r}); {code}")
    assert out.startswith(str(copy))


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_git(root: Path, tree: Path, tmp_path: Path) -> None:
    work = root / "repo"
    shutil.copytree(tree, work, symlinks=True)
    who = {
        "HOME": str(tmp_path),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@example.com",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@example.com",
    }

    def git(*arguments: str) -> str:
        return run("git", *arguments, cwd=work, environment=who)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    for i in range(5):
        (work / f"new-{i}").write_text(str(i) * 10_000)
        git("add", "-A")
        git("commit", "-qm", f"more {i}")
    assert git("status", "--porcelain") == ""
    git("fsck", "--full", "--strict")
    git("gc", "-q", "--prune=now")
    git("fsck", "--full", "--strict")
    assert git("status", "--porcelain") == ""
    run("git", "clone", "-q", work, root / "clone", environment=who)
    there, here = digests(root / "clone"), digests(work)
    assert {k: v for k, v in there.items() if not k.startswith(".git")} == {
        k: v for k, v in here.items() if not k.startswith(".git")
    }


def written(process: subprocess.Popen[str], least: int) -> int:
    """Waits for that many more commits; the last number."""
    assert process.stdout is not None
    last = 0
    for _ in range(least):
        last = int(process.stdout.readline())
    return last


def rest(process: subprocess.Popen[str], last: int) -> int:
    """What was still acknowledged before the end."""
    assert process.stdout is not None
    for line in process.stdout.read().splitlines(keepends=True):
        if line.endswith("\n"):
            last = int(line)
    process.stdout.close()
    process.wait(20)
    return last


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
@pytest.mark.parametrize("victim", ["writer", "daemon"])
def test_sqlite_loses_nothing_acknowledged(mounted: Mounted, root: Path, mode: str, victim: str) -> None:
    path = root / "db"
    last = 0
    for round_ in range(3):
        writer = subprocess.Popen(
            [sys.executable, WRITER, path, mode], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            last = written(writer, 25 + 10 * round_)
            if victim == "daemon":
                mounted.kill()
            else:
                writer.send_signal(signal.SIGKILL)
            last = rest(writer, last)
        finally:
            writer.kill()
            writer.wait(20)
        if victim == "daemon":
            mounted.start()
        db = sqlite3.connect(path)
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        count, top = db.execute("SELECT count(*), max(id) FROM t WHERE id=copy").fetchone()
        db.close()
        assert count == top >= last  # one more may have been committed and not yet printed


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")
def test_tar_round_trip(root: Path, tree: Path) -> None:
    run("tar", "-cf", root / "tree.tar", "-C", tree, "--sort=name", ".")
    (root / "out").mkdir()
    run("tar", "-xpf", root / "tree.tar", "-C", root / "out")
    assert digests(root / "out") == digests(tree)
    run("tar", "-df", root / "tree.tar", "-C", root / "out")
    assert (root / "out" / "sparse").stat().st_nlink == 2
    run("tar", "-cf", root / "again.tar", "-C", root / "out", "--sort=name", "--mtime=@0", ".")
    run("tar", "-cf", root / "first.tar", "-C", tree, "--sort=name", "--mtime=@0", ".")
    assert (root / "again.tar").read_bytes() == (root / "first.tar").read_bytes()


@pytest.mark.skipif(shutil.which("rsync") is None, reason="no rsync")
def test_rsync_finds_nothing_to_do_the_second_time(root: Path, tree: Path, tmp_path: Path) -> None:
    run("rsync", "-aHX", f"{tree}/", root / "copy")
    assert run("rsync", "-aHXi", "--checksum", f"{tree}/", root / "copy") == ""
    assert run("rsync", "-aHXi", f"{tree}/", root / "copy") == ""
    run("rsync", "-aHX", f"{root}/copy/", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(tree)
    changed = tree / "d1" / "sub 1" / "file-1 ä"
    changed.write_bytes(b"changed")
    assert "file-1" in run("rsync", "-aHXi8", f"{tree}/", root / "copy")
    assert run("rsync", "-aHXi", "--checksum", "--delete", f"{tree}/", root / "copy") == ""


def test_tensors_are_mapped(root: Path) -> None:
    """As in safetensors files: a header, then arrays at odd offsets, read and changed through a mapping."""
    rng = np.random.default_rng(1)
    tensors = [rng.integers(0, 255, size, dtype=np.uint8) for size in (1, 4095, 100_003, 8_000_000)]
    path = root / "model.safetensors"
    offsets: list[int] = []
    with path.open("wb") as file:
        file.write(b"h" * 123)
        for tensor in tensors:
            offsets.append(file.tell())
            tensor.tofile(file)
    for tensor, off in zip(tensors, offsets, strict=True):
        mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=off, shape=tensor.shape)
        assert np.array_equal(mapped, tensor)
    last = np.memmap(path, dtype=np.uint8, mode="r+", offset=offsets[-1], shape=tensors[-1].shape)
    last[::5000] += 1
    last.flush()
    tensors[-1][::5000] += 1
    whole = path.read_bytes()
    assert whole[offsets[-1] :] == tensors[-1].tobytes()
    assert whole[offsets[2] : offsets[3]] == tensors[2].tobytes()
