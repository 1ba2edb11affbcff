"""KV blocks as files below /.kvfs/blocks."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
from pathlib import Path

import pytest
from mount_process import Mounted, fails

pytestmark = pytest.mark.timeout(60)

KEY = "ab" + "cd" * 31


@pytest.fixture
def space(mounted: Mounted) -> Path:
    path = mounted.root / ".kvfs" / "blocks" / "acme" / "llama"
    path.mkdir(parents=True)
    return path


def test_writes_lists_reads_and_evicts(mounted: Mounted, space: Path) -> None:
    value = random.Random(3).randbytes(1_000_001)
    block = space / "ab" / KEY
    with fails(errno.ENOENT):
        block.stat()
    block.write_bytes(value)
    assert block.stat().st_size == len(value)
    assert stat.S_IMODE(block.stat().st_mode) == 0o444
    assert block.read_bytes() == value
    with block.open("rb") as file:
        file.seek(999_990)
        assert file.read(100) == value[999_990:]
    assert os.listdir(space) == ["ab"]
    assert os.listdir(space / "ab") == [KEY]
    assert os.listdir(space.parent) == ["llama"]
    assert os.listdir(mounted.root) == []
    block.unlink()
    with fails(errno.ENOENT):
        block.stat()
    assert os.listdir(space / "ab") == []


def test_is_published_only_by_closing(space: Path) -> None:
    block = space / "ab" / KEY
    with block.open("wb", buffering=0) as file:
        file.write(b"half")
        assert os.listdir(space) == []
        file.write(b" whole")
    assert block.read_bytes() == b"half whole"
    with fails(errno.EEXIST):
        block.write_bytes(b"other")
    assert block.read_bytes() == b"half whole"


def test_shell_tools(space: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"value" * 10_000)
    subprocess.run(["cp", source, space / "ab" / KEY], check=True, timeout=20)
    subprocess.run(["cmp", source, space / "ab" / KEY], check=True, timeout=20)
    subprocess.run(["sh", "-c", f"printf short > {space}/00/00ff"], check=True, timeout=20)
    assert (space / "00" / "00ff").read_bytes() == b"short"
    subprocess.run(["rm", "-f", space / "ab" / KEY], check=True, timeout=20)
    assert not (space / "ab" / KEY).exists()


def test_survives_a_restart(mounted: Mounted, space: Path) -> None:
    (space / "ab" / KEY).write_bytes(b"kept")
    assert mounted.stop() == 0
    mounted.start()
    assert (space / "ab" / KEY).read_bytes() == b"kept"


@pytest.mark.parametrize("name", ["xyz", "ab", "abc", "ABcd", "cdef", "ab" * 33])
def test_refuses_what_is_no_key(space: Path, name: str) -> None:
    if name == "ab":
        (space / "ab" / name).write_bytes(b"one byte is a key")
        return
    with fails(errno.EINVAL):
        (space / "ab" / name).write_bytes(b"x")
    with fails(errno.ENOENT):
        (space / "ab" / name).stat()


def test_is_only_for_blocks(mounted: Mounted, space: Path) -> None:
    with fails(errno.EPERM):
        (space / "file").write_bytes(b"x")
    with fails(errno.EPERM):
        (mounted.root / ".kvfs").rename(mounted.root / "elsewhere")
    with fails(errno.EPERM):
        os.symlink("x", space / "ab" / "cd")
    with fails(errno.EFBIG), (space / "ab" / KEY).open("wb", buffering=0) as file:
        file.truncate((16 << 20) + 1)
