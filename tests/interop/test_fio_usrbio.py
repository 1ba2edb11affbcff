"""3FS's fio engine, built by its owner against the installed header and library, on a real mount: FIO_USRBIO=/path/engine.so
names it. fio checks what it reads itself, so it must notice a byte that was changed behind its back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from running import Up

from commands import attempt, kvfs, run

ENGINE = os.environ.get("FIO_USRBIO", "")
DEPTH = 32
# The engine takes its batches whole: with any other values it verifies nothing, silently.
BATCHES = tuple(
    f"--{name}={DEPTH}"
    for name in ("iodepth", "iodepth_batch_submit", "iodepth_batch_complete_min", "iodepth_batch_complete_max")
)
CHANGED_AT = 1_234_567
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not ENGINE, reason="FIO_USRBIO=/path/engine.so names no fio engine built from 3FS's source"),
    pytest.mark.skipif(shutil.which("fio") is None, reason="no fio here"),
]


def command(up: Up, *options: str) -> list[str]:
    engine = (f"--ioengine=external:{ENGINE}", f"--mountpoint={up.mount}", f"--directory={up.mount}", "--thread=1")
    return ["fio", "--name=job", "--output-format=json", "--group_reporting", *engine, *BATCHES, *options]


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(Path(kvfs("usrbio", "--print-prefix").strip()) / "lib"))


@pytest.mark.parametrize(
    "options",
    [
        ("--rw=write", "--bs=1M", "--size=64M"),
        ("--rw=randwrite", "--bs=4k", "--size=16M"),
        ("--rw=randwrite", "--bs=64k", "--size=64M", "--nrfiles=8"),
        ("--rw=write", "--bs=128k", "--size=16M", "--numjobs=3"),
    ],
    ids=["write", "randwrite", "files", "jobs"],
)
def test_what_is_written_is_verified(up: Up, tmp_path: Path, options: tuple[str, ...]) -> None:
    out = json.loads(run(*command(up, *options, "--verify=crc32c", "--do_verify=1"), cwd=tmp_path, seconds=120))
    (job,) = out["jobs"]
    assert job["error"] == 0
    assert job["read"]["io_bytes"] == job["write"]["io_bytes"] > 0


@pytest.mark.parametrize("kind", ["read", "randread", "rw", "randrw"])
def test_reading_and_mixing(up: Up, tmp_path: Path, kind: str) -> None:
    options = (f"--rw={kind}", "--bs=16k", "--size=64M", "--nrfiles=4")
    (job,) = json.loads(run(*command(up, *options), cwd=tmp_path, seconds=120))["jobs"]
    assert job["error"] == 0
    assert job["read"]["io_bytes"] + job["write"]["io_bytes"] == 64 << 20


def test_a_changed_byte_is_noticed(up: Up, tmp_path: Path) -> None:
    options = ("--rw=randwrite", "--bs=64k", "--size=16M", "--filename=file", "--verify=crc32c")
    run(*command(up, *options), cwd=tmp_path)
    run(*command(up, *options, "--verify_only"), cwd=tmp_path)
    with (up.mount / "file").open("r+b") as file:
        file.seek(CHANGED_AT)
        (byte,) = file.read(1)
        file.seek(CHANGED_AT)
        file.write(bytes([byte ^ 1]))
    found = attempt(*command(up, *options, "--verify_only"), cwd=tmp_path)
    assert found.returncode == 1
    assert f"offset {CHANGED_AT // 65536 * 65536}".encode() in found.stderr + found.stdout
