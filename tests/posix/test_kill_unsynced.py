"""kill -9 of the daemon under a program that syncs nothing: bytes may be lost, but no file is longer than its data."""

from __future__ import annotations

import os
import random
from pathlib import Path

import plain_writer
import pytest
from mount_process import Mounted

pytestmark = pytest.mark.timeout(150)

ROUNDS = 6


def first_difference(path: Path, number: int) -> str | None:
    data = path.read_bytes()
    assert path.stat().st_size == len(data)
    wanted = plain_writer.content(number, len(data))
    if data == wanted:
        return None
    at = next(i for i, (a, b) in enumerate(zip(data, wanted, strict=True)) if a != b)
    return f"{path.name}: {len(data)} bytes, wrong from {at} on: {data[at : at + 8].hex()}"


def test_no_size_without_its_bytes(mounted: Mounted) -> None:
    rng = random.Random(11)
    kept = 0
    for round_number in range(ROUNDS):
        directory = mounted.root / f"d{round_number}"
        directory.mkdir()
        assert mounted.kill_under(plain_writer.__file__, directory, rng.uniform(0.1, 2.5))[0] == 0
        mounted.start()
        wrong = [
            first_difference(
                directory / name, plain_writer.LOG_SEED if name == "log" else int(name.removeprefix("file-"))
            )
            for name in sorted(os.listdir(directory))
        ]
        assert [w for w in wrong if w] == []
        kept += sum(entry.stat().st_size for entry in os.scandir(directory))
        for entry in list(os.scandir(directory)):
            os.unlink(entry.path)
    assert kept > 0
