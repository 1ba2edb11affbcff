"""3FS's C interface as its callers use it: hf3fs.c, compiled with the installed header and library, on a real mount."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from running import Up

from commands import attempt, kvfs, run, wait_gone

SOURCE = Path(__file__).with_name("hf3fs.c")
SHARED = Path("/dev/shm")
SEEDS = (1, 2, 3, 4)
LEFT_SINCE_S = 3600
pytestmark = pytest.mark.timeout(180)


def need(tool: str) -> str:
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"no {tool} here")
    return found


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf3fs") / "hf3fs"
    flags = shlex.split(kvfs("usrbio", "--print-flags"))
    run(need("cc"), "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", SOURCE, *flags, "-lpthread", "-o", out)
    return out


def left_behind() -> set[Path]:
    """Named memory that nobody has open."""
    found: set[Path] = set()
    for path in SHARED.glob("kvfs-iov-*"):
        with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as shared:
            fcntl.flock(shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.add(path)
    return found


@pytest.fixture
def no_memory_left() -> Iterator[None]:
    before = left_behind()
    yield
    assert left_behind() <= before


def test_where_a_path_lies(up: Up, program: Path, tmp_path: Path) -> None:
    (up.mount / "d").mkdir()
    (up.mount / "d" / "f").write_bytes(b"x")
    (tmp_path / "link").symlink_to(up.mount / "d")
    for path in (up.mount, up.mount / "d", up.mount / "d" / "f", up.mount / "not-there", tmp_path / "link" / "f"):
        assert run(program, "where", path) == f"{up.mount}\n"
    for path in (up.directory, tmp_path, Path("/usr/bin/env"), Path("/no/such/path")):
        assert run(program, "where", path) == "none\n"


@pytest.mark.usefixtures("no_memory_left")
@pytest.mark.parametrize("sequence", ["ring-per-call", "rings-per-thread", "two-processes", "leave"])
def test_sequences_of_callers(up: Up, program: Path, sequence: str) -> None:
    run(program, sequence, up.mount, seconds=120)


@pytest.mark.usefixtures("no_memory_left")
@pytest.mark.parametrize("seed", SEEDS)
def test_ring_and_mount_agree(up: Up, program: Path, seed: int) -> None:
    run(program, "mixed", up.mount, str(seed), "800", seconds=150)


@pytest.mark.usefixtures("no_memory_left")
def test_a_killed_daemon_is_an_error_and_no_hang(up: Up, program: Path) -> None:
    pid = int(json.loads(kvfs("status", "--dir", up.directory, "--json"))["pid"])
    run(program, "killed", up.mount, str(pid), seconds=60)
    wait_gone(pid)


def test_hard_links(up: Up, program: Path, tmp_path: Path) -> None:
    (up.mount / "f").write_bytes(b"content")
    (tmp_path / "f").write_bytes(b"")
    run(program, "hardlink", up.mount / "f", up.mount / "g")
    assert (up.mount / "g").samefile(up.mount / "f")
    for target, name, wanted in (
        (up.mount / "f", up.mount / "g", errno.EEXIST),
        (up.mount / "h", up.mount / "i", errno.ENOENT),
        (up.mount / "f", up.mount / "d" / "g", errno.ENOENT),
        (tmp_path / "f", up.mount / "i", errno.EXDEV),
        (up.mount / "f", tmp_path / "i", errno.EXDEV),
    ):
        assert attempt(program, "hardlink", target, name).returncode == wanted


def test_memory_that_a_killed_process_left_goes(up: Up, program: Path) -> None:
    """What nobody has open and is old; the next process's first iov removes it."""
    names = [SHARED / f"kvfs-iov-{os.getpid():032x}", SHARED / f"kvfs-iov-{os.getpid() + (1 << 64):032x}"]
    left, used = names
    try:
        for path in names:
            path.touch(0o600)
            old = path.stat().st_mtime - LEFT_SINCE_S
            os.utime(path, (old, old))
        with used.open("rb") as somebody:
            fcntl.flock(somebody, fcntl.LOCK_SH)
            run(program, "two-processes", up.mount)
            assert not left.exists()
            assert used.exists()
    finally:
        for path in names:
            path.unlink(missing_ok=True)


def test_pkg_config(tmp_path: Path) -> None:
    where = kvfs("usrbio", "--print-pkgconfig").strip()
    flags = run(need("pkg-config"), "--cflags", "--libs", "hf3fs_usrbio", environment={"PKG_CONFIG_PATH": where})
    run(need("cc"), SOURCE, *shlex.split(flags), "-lpthread", "-o", tmp_path / "hf3fs")
    assert run(tmp_path / "hf3fs", "where", "/usr") == "none\n"


def test_cmake_package(tmp_path: Path) -> None:
    prefix = kvfs("usrbio", "--print-prefix").strip()
    shutil.copy(SOURCE, tmp_path)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(engine C)\nfind_package(Threads REQUIRED)\n"
        "find_package(hf3fs_usrbio 0.1 REQUIRED)\nadd_executable(hf3fs hf3fs.c)\n"
        "target_link_libraries(hf3fs hf3fs_usrbio::hf3fs_api_shared Threads::Threads)\n"
    )
    run(need("cmake"), "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path / "build")
    assert run(tmp_path / "build" / "hf3fs", "where", "/usr") == "none\n"


def test_the_library_shows_3fs_names_only() -> None:
    library = Path(kvfs("usrbio", "--print-prefix").strip()) / "lib" / "libhf3fs_api_shared.so"
    symbols = run(need("nm"), "-D", "--defined-only", "--format=just-symbols", library).split()
    assert len(symbols) == 29
    assert all(name.startswith("hf3fs_") for name in symbols)
    assert "[libhf3fs_api_shared.so]" in run(need("readelf"), "-d", library)
