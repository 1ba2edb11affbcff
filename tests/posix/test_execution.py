"""Programs that run from the mount."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mount_process import Mounted, fails

from commands import run

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def program(mounted: Mounted) -> Path:
    path = mounted.root / "program"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", path)
    return path


def test_a_file_open_for_writing_does_not_run(program: Path) -> None:
    for flags in (os.O_WRONLY, os.O_RDWR | os.O_APPEND):
        fd = os.open(program, flags)
        with fails(errno.ETXTBSY):
            subprocess.run([program, "0"], check=True)
        os.close(fd)
        run(program, "0")


def test_a_program_that_runs_is_not_written(program: Path) -> None:
    before = program.read_bytes()
    with subprocess.Popen([program, "60"]) as running:
        try:
            calls: list[Callable[[], object]] = [
                lambda: os.open(program, os.O_WRONLY),
                lambda: os.open(program, os.O_RDWR | os.O_TRUNC),
                lambda: os.truncate(program, 10),
            ]
            for call in calls:
                with fails(errno.ETXTBSY):
                    call()
            assert program.read_bytes() == before
            # How package managers do it: another file in its place, and the old one runs on.
            (program.parent / "new").write_bytes(before)
            (program.parent / "new").chmod(0o755)
            (program.parent / "new").rename(program)
            run(program, "0")
            assert running.poll() is None
        finally:
            running.kill()
    program.write_bytes(b"now it can be written")


def test_scripts_run(mounted: Mounted) -> None:
    script = mounted.root / "script"
    script.write_text(f"#!{sys.executable} -S\nimport sys\nprint(*sys.argv[1:])\n")
    with fails(errno.EACCES):
        subprocess.run([script], check=True)
    script.chmod(0o755)
    assert run(script, "a", "b c") == "a b c\n"
