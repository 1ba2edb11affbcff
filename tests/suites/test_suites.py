"""The suites that file systems are tested with, on a real `kvfs up`; each ends with a clean `kvfs fsck --data`.

`make test-posix` runs them. Suites that Debian packages are installed by it; of the others, the installed copy is named by
the environment: PJDFSTEST (directory with the built `pjdfstest` and its `tests`), FSX and FSSTRESS (programs of xfstests),
MDTEST (program of IOR, built with MPI), FILEBENCH (program, installed with its workloads).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import kill_daemon, kvfs, run

pytestmark = pytest.mark.timeout(900)

SUITE_S = 840


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
    said = run(program("prove"), "-r", "-j2", copy_of("PJDFSTEST") / "tests", cwd=root, seconds=SUITE_S)
    assert re.search(r"^Result: PASS$", said, re.MULTILINE), said[-3000:]
    files = re.search(r"^Files=(\d+), Tests=(\d+),", said, re.MULTILINE)
    assert files is not None
    assert int(files[2]) > 8000  # and not a copy without its tests


@pytest.mark.parametrize("options", [[], ["-Z", "-r", "512", "-w", "512"]], ids=["mmap", "direct"])
def test_fsx(root: Path, options: list[str]) -> None:
    assert "completed A-OK" in run(copy_of("FSX"), "-q", *options, "-N", "100000", root / "f", seconds=SUITE_S)


def test_fsstress(root: Path) -> None:
    run(copy_of("FSSTRESS"), "-d", root, "-p", "4", "-n", "2000", "-s", "7", seconds=SUITE_S)


def test_fio_verifies(root: Path) -> None:
    run(
        program("fio"), "--name=v", f"--directory={root}", "--size=24M", "--numjobs=4", "--rw=randrw", "--bsrange=512-128k",
        "--bs_unaligned=1", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--ioengine=psync", "--fsync=64",
        cwd=root, seconds=SUITE_S,
    )  # fmt: skip


def test_dbench(root: Path) -> None:
    said = run(program("dbench"), "-D", root, "-t", "20", "2", seconds=SUITE_S)
    assert re.search(r"^Throughput [1-9]", said, re.MULTILINE), said[-3000:]


def test_fs_mark(root: Path) -> None:
    run(  # in its directory: it overruns its buffer with long paths
        program("fs_mark"), "-d", ".", "-n", "1000", "-s", "16384", "-t", "2", "-D", "10", "-L", "2", "-S", "1",
        cwd=root, seconds=SUITE_S,
    )  # fmt: skip


def test_mdtest(root: Path) -> None:
    """Two ranks that create, stat, read and remove files in a tree, each its own and then each the other's."""
    mdtest = copy_of("MDTEST")
    ranks = [program("mpirun"), "--allow-run-as-root", "--oversubscribe", "-np", "2"]
    said = run(
        *ranks, mdtest, "-d", root / "md", "-n", "600", "-z", "2", "-b", "3", "-w", "4096", "-e", "4096", "-i", "2",
        "-N", "1",  # a rank stats and reads what its neighbour made
        seconds=SUITE_S,
    )  # fmt: skip
    for operation in ("Directory creation", "File creation", "File stat", "File read", "File removal", "Tree removal"):
        assert re.search(rf"^ +{operation} +[1-9]", said, re.MULTILINE), said[-3000:]
    assert "finished at" in said, said[-3000:]
    assert "WARNING" not in said, said[-3000:]
    assert "ERROR" not in said, said[-3000:]


def test_filebench_varmail(root: Path, tmp_path: Path) -> None:
    """Its own varmail workload (16 threads), for 20 s, on the mount."""
    filebench = copy_of("FILEBENCH")
    found = [
        path
        for path in (
            filebench.parent / "workloads/varmail.f",
            filebench.parent / "../share/filebench/workloads/varmail.f",
        )
        if path.exists()
    ]
    assert found, f"no workloads/varmail.f with {filebench}"
    workload = found[0].read_text()
    for line, other in ((r"^set \$dir=.*$", f"set $dir={root}"), (r"^run .*$", "run 20")):
        workload, count = re.subn(line, other, workload, flags=re.MULTILINE)
        assert count == 1, line
    (tmp_path / "varmail.f").write_text(workload)
    # Its processes share memory at one address, so that they hang with a randomized layout.
    said = run(program("setarch"), "-R", filebench, "-f", tmp_path / "varmail.f", seconds=300)
    summary = re.search(r"IO Summary: +([0-9]+) ops", said)
    assert summary is not None, said[-3000:]
    assert int(summary[1]) > 1000, said[-3000:]
    for operation in ("deletefile1", "createfile2", "appendfilerand2", "fsyncfile2", "readfile3", "fsyncfile3"):
        assert re.search(rf"^{operation} +[1-9]", said, re.MULTILINE), said[-3000:]


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
            kill_daemon(directory)
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
