"""The C example, compiled with the installed headers and flags, against a real node."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest
from running import Up

from commands import attempt, attempt_kvfs, kvfs, run
from kvfs_usrbio import MISS, BlockStore

EXAMPLE = Path(__file__).with_name("example.c")
pytestmark = pytest.mark.timeout(120)


def compiler() -> str:
    found = shutil.which(os.environ.get("CC", "cc"))
    if found is None:
        pytest.skip("no C compiler here")
    return found


def build(flags: list[str], out: Path) -> None:
    run(compiler(), "-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", EXAMPLE, *flags, "-o", out)


def test_the_example_is_as_short_as_an_example_should_be() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 120


def test_example_with_print_flags(up: Up, tmp_path: Path) -> None:
    build(shlex.split(kvfs("usrbio", "--print-flags")), tmp_path / "example")
    assert run(tmp_path / "example", up.socket) == "63 blocks\n"
    with BlockStore.open(up.mount, "example") as store:  # found through the mount's .kvfs/info
        keys = [b"block %d" % i for i in range(64)]
        assert store.exists(keys) == [MISS] + [4096] * 63
        dest = bytearray(4096)
        assert store.get([b"block 7"], [dest]) == [4096]
        assert dest == bytes([7]) * 4096
    again = attempt(tmp_path / "example", "/nowhere")
    assert (again.returncode, again.stderr) == (1, b"example: /nowhere: No such file or directory\n")


def test_pkg_config(tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("no pkg-config here")
    where = kvfs("usrbio", "--print-pkgconfig").strip()
    flags = run("pkg-config", "--cflags", "--libs", "kvfs", environment={"PKG_CONFIG_PATH": where})
    build(shlex.split(flags), tmp_path / "example")
    ran = attempt(tmp_path / "example")
    assert (ran.returncode, ran.stderr) == (2, b"usage: example SOCKET\n")


def test_wrong_usage() -> None:
    assert attempt_kvfs("usrbio").returncode == 2
    assert attempt_kvfs("usrbio", "--print-flags", "--print-pkgconfig").returncode == 2
