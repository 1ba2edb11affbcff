"""Programs that people run, on the mount: their own checks pass, and `kvfs fsck --data` finds nothing afterwards."""

from __future__ import annotations

import compileall
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from mount_process import Mounted

from commands import kvfs, run

pytestmark = pytest.mark.timeout(120)

WRITER = Path(__file__).with_name("sqlite_writer.py")
STDLIB = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = shutil.ignore_patterns("site-packages", "__pycache__", "test", "tests", "config-*", "idlelib", "*.so", "*.a")


@pytest.fixture
def root(mounted: Mounted) -> Iterator[Path]:
    """The mount; afterwards the daemon is stopped and what it left is checked."""
    yield mounted.root
    assert mounted.stop() == 0, mounted.log.read_text()
    kvfs("fsck", mounted.data, "--data")


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


BUILD = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
# A wheel is a zip file; this backend makes one without any package from elsewhere.
BACKEND = """
import zipfile

def build_wheel(directory, config_settings=None, metadata_directory=None):
    name = "kvfs_sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(directory + "/" + name, "w") as wheel:
        for i in range(100):
            wheel.writestr(f"kvfs_sample/part{i}.py", f"VALUE = {i}\\n")
        wheel.writestr("kvfs_sample/__init__.py", "def main():\\n    from . import part99\\n    print(part99.VALUE)\\n")
        info = "kvfs_sample-1.0.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: kvfs-sample\\nVersion: 1.0\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nGenerator: backend\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "entry_points.txt", "[console_scripts]\\nkvfs-sample = kvfs_sample:main\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""


def test_venv_and_pip_install(root: Path, tmp_path: Path) -> None:
    """A new environment on the mount, a project that pip builds and installs there, its command, and its removal."""
    python = root / "env" / "bin" / "python"
    run(sys.executable, "-m", "venv", root / "env", seconds=100)
    project = root / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(BUILD)
    (project / "backend.py").write_text(BACKEND)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    home = {"HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    run(*pip, "install", "--no-index", project, environment=home, seconds=100)
    assert run(root / "env" / "bin" / "kvfs-sample") == "99\n"
    installed = run(python, "-c", "import kvfs_sample; print(kvfs_sample.__file__)").strip()
    assert Path(installed).is_relative_to(root)
    assert run(*pip, "check", environment=home) == "No broken requirements found.\n"
    run(*pip, "uninstall", "-y", "kvfs-sample", environment=home)
    assert not Path(installed).exists()


MAKEFILE = """
OBJECTS := $(patsubst %.c,%.o,$(wildcard *.c))
CFLAGS := -O1 -MMD
program: libparts.a main.o
\t$(CC) -o $@ main.o -L. -lparts
libparts.a: $(filter-out main.o,$(OBJECTS))
\t$(AR) rcs $@ $^
-include *.d
"""


@pytest.mark.skipif(shutil.which("make") is None or shutil.which("gcc") is None, reason="no make or no gcc")
def test_parallel_build(root: Path) -> None:
    """make builds everything, then nothing, then what a changed header needs: so do times on the mount."""
    parts = 30
    (root / "parts.h").write_text("".join(f"int part{i}(int);\n" for i in range(parts)))
    (root / "step.h").write_text("#define STEP 1\n")
    for i in range(parts):
        (root / f"part{i}.c").write_text(
            f'#include "parts.h"\n#include "step.h"\nint part{i}(int n) {{ return n + STEP; }}\n'
        )
    calls = "".join(f" n = part{i}(n);" for i in range(parts))
    (root / "main.c").write_text(
        f'#include <stdio.h>\n#include "parts.h"\nint main(void) {{ int n = 0;{calls} printf("%d\\n", n); return 0; }}\n'
    )
    (root / "Makefile").write_text(MAKEFILE)

    def make() -> list[str]:
        return re.findall(r"-c -o (\S+)\.o", run("make", "-j2", "CC=gcc", cwd=root, environment={"MAKEFLAGS": ""}))

    everything = sorted(["main", *(f"part{i}" for i in range(parts))])
    assert sorted(make()) == everything
    assert run(root / "program") == f"{parts}\n"
    assert make() == []
    (root / "step.h").write_text("#define STEP 2\n")
    assert sorted(make()) == sorted(set(everything) - {"main"})
    assert run(root / "program") == f"{2 * parts}\n"
    assert make() == []


def test_safetensors_are_mapped(root: Path) -> None:
    """A file in the safetensors format: its header, then arrays at odd offsets, read and changed through mappings."""
    rng = np.random.default_rng(1)
    tensors = {f"t{size}": rng.integers(0, 255, size, dtype=np.uint8) for size in (1, 4095, 100_003, 8_000_000)}
    header: dict[str, dict[str, Any]] = {}
    off = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "U8", "shape": list(tensor.shape), "data_offsets": [off, off + tensor.nbytes]}
        off += tensor.nbytes
    path = root / "model.safetensors"
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            tensor.tofile(file)

    length = int.from_bytes(np.memmap(path, np.uint8, "r", shape=(8,)).tobytes(), "little")
    found = json.loads(np.memmap(path, np.uint8, "r", offset=8, shape=(length,)).tobytes())

    def mapped(name: str, mode: Literal["r", "r+"] = "r") -> Any:
        begin, end = found[name]["data_offsets"]
        return np.memmap(path, np.uint8, mode, offset=8 + length + begin, shape=(end - begin,))

    for name, tensor in tensors.items():
        assert np.array_equal(mapped(name), tensor)
    changed = mapped("t8000000", "r+")
    changed[::5000] += 1
    changed.flush()
    tensors["t8000000"][::5000] += 1
    assert path.read_bytes()[8 + length :] == b"".join(tensor.tobytes() for tensor in tensors.values())


def test_safetensors_library_maps(root: Path) -> None:
    library: Any = pytest.importorskip("safetensors")
    numpy: Any = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(2)
    tensors = {f"t{i}": rng.standard_normal((50, 1000 * i + 1), dtype=np.float32) for i in range(8)}
    numpy.save_file(tensors, root / "model.safetensors", metadata={"format": "np"})
    with library.safe_open(root / "model.safetensors", framework="np") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert np.array_equal(file.get_tensor(name), tensor)
            assert np.array_equal(file.get_slice(name)[10:20], tensor[10:20])
