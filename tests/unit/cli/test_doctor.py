"""kvfs doctor's checks, on this host and on made-up ones."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kvfs_tools import doctor


def test_fuse_device_absent_or_closed(tmp_path: Path) -> None:
    check = doctor.check_fuse(tmp_path)
    assert (check.status, "modprobe fuse" in check.remedy) == ("missing", True)
    (tmp_path / "dev/fuse").mkdir(parents=True)
    assert doctor.check_fuse(tmp_path).status == "missing"
    (tmp_path / "dev/fuse").rmdir()
    (tmp_path / "dev/fuse").touch()
    assert doctor.check_fuse(tmp_path).status == "ok"


def test_fusermount(tmp_path: Path) -> None:
    assert doctor.check_fusermount(str(tmp_path)).status == "missing"
    tool = tmp_path / "fusermount3"
    tool.touch(0o4755)
    tool.chmod(0o4755)
    assert doctor.check_fusermount(str(tmp_path)) == doctor.Check("fusermount3", "ok", str(tool))


def test_ring_is_really_set_up() -> None:
    open_before = set(os.listdir("/proc/self/fd"))
    check = doctor.check_io_uring(Path("/"))
    memory = doctor.check_registered_memory()
    assert set(os.listdir("/proc/self/fd")) == open_before
    disabled = Path("/proc/sys/kernel/io_uring_disabled")
    if disabled.exists() and disabled.read_text().strip() != "0":
        assert check.status == "missing"
        pytest.skip("io_uring is switched off on this host")
    assert check.status == "ok"
    assert "64 MiB registered" in memory.detail or memory.remedy


@pytest.mark.parametrize(
    ("code", "setting", "remedy"),
    [(errno.EPERM, "2", "io_uring_disabled=0"), (errno.EPERM, "0", "seccomp"), (errno.ENOSYS, "0", "CONFIG_IO_URING")],
)
def test_no_ring_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, setting: str, remedy: str
) -> None:
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/io_uring_disabled").write_text(setting + "\n")

    def refuse(number: int, *arguments: int) -> int:
        return -code

    monkeypatch.setattr(doctor, "_syscall", refuse)
    check = doctor.check_io_uring(tmp_path)
    assert check.status == "missing"
    assert remedy in check.remedy
    assert doctor.check_registered_memory().status == "absent"


def test_missing_operations_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(ring: int) -> set[int]:
        return {3, 22, 23}

    monkeypatch.setattr(doctor, "_supported_ops", probe)
    check = doctor.check_io_uring(Path("/"))
    if "no ring" in check.detail:
        pytest.skip("no io_uring on this host")
    assert check.status == "missing"
    assert "read_fixed, write_fixed" in check.detail


def test_memlock_limit_of_an_unprivileged_user() -> None:
    """The limit binds only without CAP_IPC_LOCK: try it as nobody, in a process of its own."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become nobody")
    script = (
        "import os, resource, sys; from kvfs_tools import doctor\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "check = doctor.check_registered_memory(); print(check.status, check.detail)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    if "not tried" in done.stdout:
        pytest.skip("no io_uring for unprivileged users on this host")
    assert done.stdout.startswith("absent 64 MiB cannot be registered")
    assert "limit 1 MiB" in done.stdout


def test_direct_io(tmp_path: Path) -> None:
    check = doctor.check_direct_io(tmp_path / "not/yet/there")
    assert check.detail.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert doctor.check_direct_io(Path("/proc/self")).status == "missing"


def test_hugepages(tmp_path: Path) -> None:
    assert doctor.check_hugepages(tmp_path).status == "absent"
    (tmp_path / "proc").mkdir()
    meminfo = "MemTotal: 1 kB\nHugePages_Total:      16\nHugePages_Free:        4\nHugepagesize:       2048 kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    assert doctor.check_hugepages(tmp_path) == doctor.Check("hugepages", "ok", "4 of 16 pages of 2048 KiB free")


def test_rdma(tmp_path: Path) -> None:
    assert doctor.check_rdma(tmp_path).status == "absent"
    port = tmp_path / "sys/class/infiniband/mlx5_0/ports/1"
    port.mkdir(parents=True)
    (port / "state").write_text("1: DOWN\n")
    (port / "link_layer").write_text("Ethernet\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    check = doctor.check_rdma(tmp_path)
    assert (check.status, check.detail) == ("absent", "mlx5_0/1 Ethernet 400 Gb/sec (4X NDR) DOWN")
    (port / "state").write_text("4: ACTIVE\n")
    assert doctor.check_rdma(tmp_path).status == "ok"


def test_gpu(tmp_path: Path) -> None:
    assert doctor.check_gpu(tmp_path).status == "absent"
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version: NVIDIA UNIX 570.1\nGCC version: 12\n")
    (tmp_path / "proc/modules").write_text("nvidia_peermem 16384 0 - Live 0x0\n")
    detail = "2 (nvidia0, nvidia1), NVIDIA UNIX 570.1, nvidia_peermem loaded"
    assert doctor.check_gpu(tmp_path) == doctor.Check("gpu", "ok", detail)


def test_shared_memory(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(tmp_path).status == "absent"


def test_modules_must_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_modules(["json", "pyfuse3"]).status == "ok"
    assert "no.such.module (No module" in doctor.check_modules(["json", "no.such.module"]).detail
    (tmp_path / "torn_module.so").write_bytes(b"not an ELF file")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    check = doctor.check_modules(["torn_module"])
    assert (check.status, "torn_module (" in check.detail) == ("missing", True)


def test_report_is_not_ok_while_something_is_missing(tmp_path: Path) -> None:
    report = doctor.examine(tmp_path, root=tmp_path)
    assert not report.ok
    assert next(check.name for check in report.checks if check.status == "missing") == "fuse"
    assert all(check.remedy for check in report.checks if check.status == "missing")
    assert len({check.name for check in report.checks}) == len(report.checks)


def test_limits_are_left_alone() -> None:
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    doctor.examine(Path("/tmp"))
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == before
