"""The suites that file systems are tested with, on a real `kvfs up`; each ends with a clean `kvfs fsck --data`.

`make test-posix` runs them. Suites that Debian packages are installed by it; of the others, the installed copy is named by
the environment: PJDFSTEST (directory with the built `pjdfstest` and its `tests`), FSX and FSSTRESS (programs of xfstests),
MDTEST (program of IOR, built with MPI), FILEBENCH (program, installed with its workloads).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from suite_programs import copy_of, program

from commands import attempt, run
from listing import listed_under_change, removed_while_listed

pytestmark = pytest.mark.timeout(900)

SUITE_S = 840


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


# Of the class of file system stressors: what is not about our files, and what walks through every mount there is.
ELSEWHERE = {"bind-mount", "binderfs", "eventfd", "fanotify", "getdent", "ioprio", "procfs"}
MORE_STRESSORS = [
    "aio", "aiol", "fpunch", "hdd", "iomix", "mmapmany", "msync", "readahead", "revio", "seek", "sendfile", "sync-file",
]  # fmt: skip
# These end well and do no operation. The first four want what docs/posix.md lists as not supported.
WITHOUT_OPERATIONS = {
    "fallocate": "fallocate is EOPNOTSUPP",
    "iomix": "begins with fallocate",
    "sync-file": "begins each round with fallocate",
    "fiemap": "FS_IOC_FIEMAP is EOPNOTSUPP",
    "inode-flags": "Debian's counts no operation, on ext4 neither",
    "verity": "no fs-verity, on ext4 neither here",
}


def stress_for(seconds: int, stressor: list[str], root: Path, tmp_path: Path) -> tuple[int, int | None, str]:
    """Exit code, operations of this stressor in the metrics (None: it is not in them), and what was said."""
    metrics = tmp_path / f"{seconds}{stressor[0]}.yaml"
    done = attempt(
        program("stress-ng"), *stressor, "--timeout", f"{seconds}s", "--verify", "--temp-path", root,
        "--metrics", "--yaml", metrics,
        seconds=seconds + 120,
    )  # fmt: skip
    counts = re.findall(
        rf"- stressor: {stressor[0][2:]}\s+bogo-ops: (\d+)", metrics.read_text() if metrics.exists() else ""
    )
    return done.returncode, int(counts[0]) if counts else None, (done.stdout + done.stderr).decode()[-1000:]


def test_stress_ng(root: Path, tmp_path: Path) -> None:
    in_class = attempt(program("stress-ng"), "--class", "filesystem?")
    listed = re.search(r"stressors: (.*)", (in_class.stdout + in_class.stderr).decode())
    assert listed is not None, in_class
    failed: list[str] = []
    chosen = [name for name in listed[1].split() if name not in ELSEWHERE]
    assert len(chosen) > 30
    for name in dict.fromkeys(chosen + MORE_STRESSORS):
        code, operations, said = stress_for(3, [f"--{name}", "2"], root, tmp_path)
        if code == 0 and operations == 0 and name not in WITHOUT_OPERATIONS:
            # The first operation of some is long: 25,000 changes of attributes, a file of 64 MiB in small pieces.
            code, operations, said = stress_for(150, [f"--{name}", "1", f"--{name}-ops", "1"], root, tmp_path)
        if code != 0 or operations is None or (operations > 0) == (name in WITHOUT_OPERATIONS):
            failed.append(f"{name}: exit code {code}, {operations} operations: {said}")
    assert not failed, "\n".join(failed)


@pytest.mark.timeout(1800)
def test_directory_of_200000_entries(root: Path) -> None:
    entries = 200_000
    listed_under_change(root / "d", entries, rounds=6)
    assert removed_while_listed(root / "d") > entries
