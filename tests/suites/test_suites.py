"""The suites that file systems are tested with, on a real `kvfs up`; each ends with a clean `kvfs fsck --data`.

`make test-posix` runs them. Suites that Debian packages are installed by it; of the others, the installed copy is named by
the environment: PJDFSTEST (directory with the built `pjdfstest` and its `tests`), FSX and FSSTRESS (programs of xfstests).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)

SIZE = "2G"


def kvfs(command: str, *options: str | Path) -> str:
    return run(sys.executable, "-m", "kvfs", command, *options)


def run(*command: str | Path, cwd: Path | None = None, seconds: float = 840) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
        check=False,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, (command, done.returncode, done.stdout[-6000:])
    return done.stdout


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A data directory with a daemon, mounted at its `mnt`."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("the suites need root and /dev/fuse")
    data = tmp_path / "kv"
    kvfs("up", "--dir", data, "--size", SIZE, "--detach")
    try:
        yield data
    finally:
        subprocess.run([sys.executable, "-m", "kvfs", "down", "--dir", data], capture_output=True, check=False)
        subprocess.run(["fusermount3", "-uz", data / "mnt"], capture_output=True, check=False)


@pytest.fixture
def root(directory: Path) -> Iterator[Path]:
    """A directory on the mount; after the test the daemon is stopped and its data checked."""
    work = directory / "mnt" / "w"
    work.mkdir()
    yield work
    kvfs("down", "--dir", directory)
    assert kvfs("fsck", directory, "--data").endswith("clean\n")


def copy_of(variable: str) -> Path:
    """The installed copy that the environment names."""
    named = os.environ.get(variable)
    if not named:
        pytest.skip(f"{variable} names no installed copy")
    path = Path(named).absolute()
    assert path.exists(), f"{variable}={named} does not exist"
    return path


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_pjdfstest(root: Path) -> None:
    said = run(program("prove"), "-r", "-j2", copy_of("PJDFSTEST") / "tests", cwd=root)
    assert re.search(r"^Result: PASS$", said, re.MULTILINE), said[-3000:]
    files = re.search(r"^Files=(\d+), Tests=(\d+),", said, re.MULTILINE)
    assert files is not None
    assert int(files[2]) > 8000  # and not a copy without its tests


@pytest.mark.parametrize("options", [[], ["-Z", "-r", "512", "-w", "512"]], ids=["mmap", "direct"])
def test_fsx(root: Path, options: list[str]) -> None:
    assert "completed A-OK" in run(copy_of("FSX"), "-q", *options, "-N", "100000", root / "f")


def test_fsstress(root: Path) -> None:
    run(copy_of("FSSTRESS"), "-d", root, "-p", "4", "-n", "2000", "-s", "7")


def test_fio_verifies(root: Path) -> None:
    run(
        program("fio"), "--name=v", f"--directory={root}", "--size=24M", "--numjobs=4", "--rw=randrw", "--bsrange=512-128k",
        "--bs_unaligned=1", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--ioengine=psync", "--fsync=64",
        cwd=root,
    )  # fmt: skip


def test_dbench(root: Path) -> None:
    said = run(program("dbench"), "-D", root, "-t", "20", "2")
    assert re.search(r"^Throughput [1-9]", said, re.MULTILINE), said[-3000:]


def test_fs_mark(root: Path) -> None:
    run(  # in its directory: it overruns its buffer with long paths
        program("fs_mark"), "-d", ".", "-n", "1000", "-s", "16384", "-t", "2", "-D", "10", "-L", "2", "-S", "1",
        cwd=root,
    )  # fmt: skip


STRESSORS = "access,chdir,chmod,chown,copy-file,dentry,dir,dirdeep,dirmany,dup,fcntl,file-ioctl,filename,flock,fpunch,\
fstat,getdent,hdd,iomix,link,lockf,lockofd,mmapmany,open,rename,seek,symlink,sync-file,touch,unlink,utime,verity,xattr"


def test_stress_ng(root: Path) -> None:
    stress = program("stress-ng")
    known = run(stress, "--stressors").split()
    chosen = [name for name in STRESSORS.split(",") if name in known]
    assert len(chosen) > 20
    failed: list[str] = []
    for name in chosen:
        done = subprocess.run(
            [stress, f"--{name}", "2", "--timeout", "3s", "--verify", "--temp-path", root],
            capture_output=True,
            timeout=60,
            check=False,
            text=True,
            errors="replace",
        )
        if done.returncode not in (0, 3, 4):  # 3, 4: stress-ng itself cannot run this one here
            failed.append(f"{name}: {done.returncode}: {done.stdout[-300:]}{done.stderr[-700:]}")
    assert not failed, "\n".join(failed)


def test_daemon_killed_under_load(directory: Path) -> None:
    """A kill leaves nothing worse than data without an owner; the next start replaces the mount and has what was synced."""
    dbench = program("dbench")
    work = directory / "mnt" / "w"
    work.mkdir()
    kept: dict[str, bytes] = {}
    rng = random.Random(3)
    for round_ in range(5):
        with subprocess.Popen([dbench, "-D", work, "-t", "60", "2"], stdout=subprocess.DEVNULL) as load:
            end = time.monotonic() + rng.uniform(1, 4)
            while time.monotonic() < end:
                name, data = f"kept-{len(kept)}", rng.randbytes(rng.randrange(1, 200_000))
                with (work / name).open("wb") as file:
                    file.write(data)
                    os.fsync(file.fileno())
                top = os.open(work, os.O_RDONLY)
                os.fsync(top)
                os.close(top)
                kept[name] = data
            os.kill(json.loads(kvfs("status", "--dir", directory, "--json"))["pid"], signal.SIGKILL)
            assert load.wait(60) != 0, round_
        found = subprocess.run(
            [sys.executable, "-m", "kvfs", "fsck", directory, "--data", "--json"], capture_output=True, check=False
        )
        # What was written but not yet known to the metadata; the start drops it.
        unowned = {"data of a file that does not exist", "data beyond the end of its file"}
        assert {problem["text"] for problem in json.loads(found.stdout)["problems"]} <= unowned, found.stdout
        kvfs("up", "--dir", directory, "--detach")
        for name, data in kept.items():
            assert (work / name).read_bytes() == data, (round_, name)
    kvfs("down", "--dir", directory)
    assert kvfs("fsck", directory, "--data").endswith("clean\n")
