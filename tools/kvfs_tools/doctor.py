"""Finds out what this host offers to kvfs, and says what to do about what is missing.

Owns the checks behind `kvfs doctor`. Nothing is assumed from a version number where the thing itself can be tried:
rings are set up, buffers registered, files opened with O_DIRECT. Leaves nothing behind.
"""

import ctypes
import errno
import mmap
import os
import resource
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Literal

import msgspec

Status = Literal["ok", "absent", "missing"]
"""ok: there; absent: kvfs runs without it; missing: `kvfs up` cannot work until it is there."""

SYS_IO_URING_SETUP = 425
SYS_IO_URING_REGISTER = 427
IORING_SETUP_DEFER_TASKRUN = (1 << 13) | (1 << 12)  # it requires SINGLE_ISSUER
IORING_REGISTER_BUFFERS = 0
IORING_REGISTER_PROBE = 8
IO_URING_PARAMS_BYTES = 120
IO_URING_FEATURES_AT = 20
PROBE_OPS = 64
# The operations the store's reactor issues (enum io_uring_op of the kernel's header).
NEEDED_OPS = {"fsync": 3, "read_fixed": 4, "write_fixed": 5, "read": 22, "write": 23}
REGISTER_BYTES = 64 << 20
DIRECT_BYTES = 4096
MIN_KERNEL = (5, 15)


class Check(msgspec.Struct, frozen=True):
    """One finding: what was looked at, how it stands, what was seen, and what to do if it is not there."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


class Report(msgspec.Struct, frozen=True):
    """All findings; `ok` is whether `kvfs up` can work here."""

    ok: bool
    checks: list[Check]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _syscall(number: int, *arguments: int) -> int:
    """The system call's result, or -errno."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    result = int(call(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments)))
    return -ctypes.get_errno() if result < 0 else result


@contextmanager
def _ring(flags: int = 0) -> Generator[tuple[int, int]]:
    """A small io_uring instance: (its descriptor or -errno, the kernel's feature bits)."""
    params = ctypes.create_string_buffer(IO_URING_PARAMS_BYTES)
    struct.pack_into("<I", params, 8, flags)
    ring = _syscall(SYS_IO_URING_SETUP, 8, ctypes.addressof(params))
    try:
        yield ring, int(struct.unpack_from("<I", params, IO_URING_FEATURES_AT)[0])
    finally:
        if ring >= 0:
            os.close(ring)


def _supported_ops(ring: int) -> set[int]:
    """Numbers of the operations that the kernel says it supports; empty if it cannot say."""
    probe = ctypes.create_string_buffer(16 + 8 * PROBE_OPS)
    if _syscall(SYS_IO_URING_REGISTER, ring, IORING_REGISTER_PROBE, ctypes.addressof(probe), PROBE_OPS) < 0:
        return set()
    count = min(int(probe.raw[1]), PROBE_OPS)
    entries = (struct.unpack_from("<BBH", probe, 16 + 8 * index) for index in range(count))
    return {int(op) for op, _, flags in entries if flags & 1}


def check_kernel() -> Check:
    """The running kernel's version."""
    release = os.uname().release
    numbers = release.split("-")[0].split("+")[0].split(".")
    version = tuple(int(number) for number in numbers[:2] if number.isdigit())
    wanted = ".".join(str(number) for number in MIN_KERNEL)
    if len(version) == 2 and version >= MIN_KERNEL:
        return Check("kernel", "ok", release)
    return Check("kernel", "missing", f"{release} is older than {wanted}", f"Boot a kernel of {wanted} or newer.")


def check_fuse(root: Path) -> Check:
    """Whether /dev/fuse can be opened: the mount stands or falls with it."""
    device = root / "dev/fuse"
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        remedy = "Run `modprobe fuse`; in a container add `--device /dev/fuse --cap-add SYS_ADMIN`."
        return Check("fuse", "missing", f"{device} does not exist", remedy)
    except OSError as error:
        remedy = "Give this user read and write access to /dev/fuse; in a container add `--cap-add SYS_ADMIN`."
        return Check("fuse", "missing", f"{device}: {os.strerror(error.errno or 0)}", remedy)
    return Check("fuse", "ok", f"{device} opens")


def check_fusermount(path: str | None = None) -> Check:
    """fusermount3, with which an unprivileged user mounts and anyone unmounts."""
    found = shutil.which("fusermount3", path=path)
    if found is None:
        return Check("fusermount3", "missing", "not on PATH", "Install it: `apt-get install fuse3`.")
    if os.geteuid() != 0 and not os.stat(found).st_mode & 0o4000:
        return Check("fusermount3", "missing", f"{found} is not set-uid root", f"Run `chmod u+s {found}` as root.")
    return Check("fusermount3", "ok", found)


def check_io_uring(root: Path) -> Check:
    """Sets up a ring and asks the kernel for the operations the store needs."""
    with _ring() as (ring, features):
        if ring < 0:
            setting = _read(root / "proc/sys/kernel/io_uring_disabled")
            remedy = "Let io_uring_setup, io_uring_enter and io_uring_register through the container's seccomp profile."
            if setting not in (None, "0"):
                remedy = f"io_uring is switched off ({setting}): run `sysctl kernel.io_uring_disabled=0` as root."
            elif ring == -errno.ENOSYS:
                remedy = "Boot a kernel built with CONFIG_IO_URING."
            return Check("io_uring", "missing", f"no ring: {os.strerror(-ring)}", remedy)
        supported = _supported_ops(ring)
    lacking = [name for name, op in NEEDED_OPS.items() if op not in supported]
    if lacking:
        remedy = "Boot a newer kernel."
        return Check("io_uring", "missing", f"the kernel lacks {', '.join(lacking)}", remedy)
    with _ring(IORING_SETUP_DEFER_TASKRUN) as (ring, _):
        deferred = "deferred task work" if ring >= 0 else "no deferred task work (kernel before 6.1)"
    return Check("io_uring", "ok", f"ring set up, {len(supported)} operations, features 0x{features:x}, {deferred}")


def check_registered_memory() -> Check:
    """Registers 64 MiB with a ring, as the daemon does with clients' memory; RLIMIT_MEMLOCK may forbid it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 20} MiB"
    with _ring() as (ring, _):
        if ring < 0:
            return Check("memlock", "absent", f"limit {limit}; not tried without a ring")
        with mmap.mmap(-1, REGISTER_BYTES) as memory:
            exported = ctypes.c_char.from_buffer(memory)
            iovec = struct.pack("<QQ", ctypes.addressof(exported), REGISTER_BYTES)
            argument = ctypes.create_string_buffer(iovec, len(iovec))
            result = _syscall(SYS_IO_URING_REGISTER, ring, IORING_REGISTER_BUFFERS, ctypes.addressof(argument), 1)
            del exported
    if result < 0:
        detail = f"64 MiB cannot be registered ({os.strerror(-result)}; limit {limit}): I/O is slower"
        remedy = "Raise the limit: `ulimit -l unlimited`, LimitMEMLOCK=infinity in the unit, or `--ulimit memlock=-1`."
        return Check("memlock", "absent", detail, remedy)
    return Check("memlock", "ok", f"64 MiB registered with a ring; limit {limit}")


def check_direct_io(directory: Path) -> Check:
    """Writes one block with O_DIRECT to an unnamed file in the data directory (or its nearest existing parent)."""
    place = directory.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    try:
        with tempfile.TemporaryFile(dir=place) as file, mmap.mmap(-1, DIRECT_BYTES) as block:
            handle = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
            try:
                os.pwrite(handle, block, 0)
            finally:
                os.close(handle)
    except OSError as error:
        remedy = "Put the data directory on a local file system (ext4, xfs, btrfs) that this user can write to."
        return Check("data directory", "missing", f"{place}: no direct I/O: {os.strerror(error.errno or 0)}", remedy)
    return Check("data directory", "ok", f"{place}: direct I/O works, {free / (1 << 30):.1f} GiB free")


def check_shared_memory(root: Path) -> Check:
    """/dev/shm, in which engines share named memory with the daemon."""
    place = root / "dev/shm"
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        remedy = "Mount it: `mount -t tmpfs tmpfs /dev/shm`. Memory passed as a memfd works without."
        return Check("shared memory", "absent", f"{place}: {os.strerror(error.errno or 0)}", remedy)
    if free < 1 << 30:
        remedy = "Engines share buffers there: `mount -o remount,size=8G /dev/shm`, or `--shm-size 8g` for a container."
        return Check("shared memory", "absent", f"only {free >> 20} MiB free in {place}", remedy)
    return Check("shared memory", "ok", f"{free / (1 << 30):.1f} GiB free in {place}")


def check_hugepages(root: Path) -> Check:
    """Reserved huge pages; big buffers map and register faster with them."""
    fields = {
        line.split(":")[0]: line.split()[1]
        for line in (_read(root / "proc/meminfo") or "").splitlines()
        if line.startswith(("HugePages_", "Hugepagesize"))
    }
    total, free = int(fields.get("HugePages_Total", 0)), int(fields.get("HugePages_Free", 0))
    if total == 0:
        remedy = "Optional: `sysctl vm.nr_hugepages=1024` as root reserves 2 GiB in pages of 2 MiB."
        return Check("hugepages", "absent", "none reserved", remedy)
    return Check("hugepages", "ok", f"{free} of {total} pages of {fields.get('Hugepagesize', '?')} KiB free")


def check_rdma(root: Path) -> Check:
    """RDMA devices and the state of their ports."""
    ports: list[str] = []
    active = 0
    for state_file in sorted((root / "sys/class/infiniband").glob("*/ports/*/state")):
        port = state_file.parent
        state = (_read(state_file) or "?").split(":")[-1].strip()
        layer = _read(port / "link_layer") or "?"
        rate = _read(port / "rate") or "rate unknown"
        active += state == "ACTIVE"
        ports.append(f"{port.parent.parent.name}/{port.name} {layer} {rate} {state}")
    if not ports:
        return Check("rdma", "absent", "no device", "Optional: TCP and shared memory are used without one.")
    if not active:
        return Check("rdma", "absent", "; ".join(ports), "No port is ACTIVE: check the cable, `rdma link`, the switch.")
    return Check("rdma", "ok", "; ".join(ports))


def check_gpu(root: Path) -> Check:
    """NVIDIA GPUs and whether a NIC could reach their memory."""
    devices = sorted(path.name for path in (root / "dev").glob("nvidia[0-9]*"))
    if not devices:
        return Check("gpu", "absent", "no /dev/nvidia*", "Optional: blocks then live in host memory.")
    version = (_read(root / "proc/driver/nvidia/version") or "").splitlines()
    driver = version[0].removeprefix("NVRM version:").strip() if version else "driver version unknown"
    modules = {line.split()[0] for line in (_read(root / "proc/modules") or "").splitlines() if line}
    peer = "nvidia_peermem loaded" if "nvidia_peermem" in modules else "nvidia_peermem not loaded"
    return Check("gpu", "ok", f"{len(devices)} ({', '.join(devices)}), {driver}, {peer}")


def check_modules(names: Sequence[str] = ("kvfs._node", "kvfs_usrbio._native", "pyfuse3")) -> Check:
    """Whether the native extension modules are in this installation and load."""
    broken: list[str] = []
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            broken.append(f"{name} ({error})")
    if broken:
        remedy = "Install again from the source directory: `pip install .` (or `make setup`)."
        return Check("native modules", "missing", f"cannot be loaded: {', '.join(broken)}", remedy)
    return Check("native modules", "ok", f"load with Python {sys.version.split()[0]}")


def examine(directory: Path, root: Path = Path("/")) -> Report:
    """Runs every check. `root` stands in for / where checks read /dev, /proc and /sys."""
    steps: list[Callable[[], Check]] = [
        check_kernel,
        lambda: check_fuse(root),
        check_fusermount,
        lambda: check_io_uring(root),
        check_registered_memory,
        lambda: check_direct_io(directory),
        lambda: check_shared_memory(root),
        lambda: check_hugepages(root),
        lambda: check_rdma(root),
        lambda: check_gpu(root),
        check_modules,
    ]
    checks = [step() for step in steps]
    return Report(ok=all(check.status != "missing" for check in checks), checks=checks)
