"""Runs a command as root in a small virtual machine that has four soft-RoCE devices.

The machine is QEMU with an unmodified Debian kernel. Its root is the host's root directory over virtiofs, with an overlay
in its memory on top: the command sees every file of the host at the same path, and nothing that it writes is left.

In it are rxe0 (10.90.0.1, on eth0) to rxe3 (10.90.0.4, on eth3). The other ends of the NICs, port0 to port3, are on a bridge
in network namespace `fabric`. `ip -n fabric link set port0 down` pulls a cable.

    python3 tests/rdma_vm/vm.py [--timeout SECONDS] [--prepare] -- COMMAND [ARGUMENT...]
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / "build" / "rdma-vm"
GUEST = Path(__file__).resolve().with_name("guest.sh")
# virtiofs and virtio are built into Debian's kernels of this series, so no initial RAM disk is needed.
KERNEL_PACKAGE = "linux-image-6.12-amd64"
VIRTIOFSD = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd")
TOOLS = ("qemu-system-x86_64", "apt-get", "apt-cache", "dpkg-deb", "depmod", "zstd", "ip", "rdma", "setpriv", "tar")
MODULES = (
    "arch",
    "crypto",
    "drivers/infiniband",
    "drivers/net/veth*",
    "fs/configfs",
    "fs/fuse",
    "fs/overlayfs",
    "lib",
    "net",
)
GUEST_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin",
    "HOME": "/root",
    "KVFS_RDMA_VM": "1",
}


class Unavailable(Exception):
    """There can be no machine here; the text says why."""


class Broken(Exception):
    """The machine did not boot, or ended without the command's status."""


@dataclass(frozen=True, slots=True)
class Kernel:
    directory: Path  # with vmlinux and lib/modules

    @property
    def image(self) -> Path:
        return self.directory / "vmlinux"


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int  # the command's; 124: it ran past the timeout
    output: str  # standard output and standard error
    console: str  # what the kernel said
    seconds: float  # boot included


def tool_path() -> str:
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"


def find_virtiofsd() -> str:
    for path in VIRTIOFSD:
        if os.access(path, os.X_OK):
            return path
    raise Unavailable("virtiofsd is missing (in package qemu-system-common or virtiofsd)")


def check_host() -> None:
    if os.geteuid() != 0:
        raise Unavailable("only root can share the host's root directory with a virtual machine")
    if os.uname().machine != "x86_64":
        raise Unavailable(f"the virtual machine's kernel is for x86_64, not {os.uname().machine}")
    missing = [tool for tool in TOOLS if shutil.which(tool, path=tool_path()) is None]
    if missing:
        raise Unavailable(f"missing: {', '.join(missing)}")
    find_virtiofsd()


def call(command: Sequence[str], cwd: Path | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=300,
        env={**os.environ, "PATH": tool_path(), "LC_ALL": "C"},
    )
    if done.returncode != 0:
        raise Unavailable(f"{shlex.join(command)}: {done.stdout[-500:].strip()}")
    return done.stdout


def download(into: Path) -> Path:
    depends = call(["apt-cache", "depends", KERNEL_PACKAGE])
    found = re.search(r"Depends: (linux-image-6\.12\.\S+-amd64)", depends)
    if found is None:
        raise Unavailable(f"no package of a kernel stands behind {KERNEL_PACKAGE}")
    call(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", found[1]], cwd=into)
    return next(into.glob("*.deb"))


def uncompressed(bzimage: bytes) -> bytes:
    """The ELF image inside: it boots without the unpacking code, which some emulated processors cannot run."""
    at = bzimage.find(b"\x28\xb5\x2f\xfd")
    while at >= 0:
        # The compressed part does not end where the file does, which zstd complains of after having unpacked it.
        image = subprocess.run(["zstd", "-dcq"], input=bzimage[at:], capture_output=True, timeout=120).stdout
        if image[:4] == b"\x7fELF":
            return image
        at = bzimage.find(b"\x28\xb5\x2f\xfd", at + 1)
    raise Unavailable("the kernel's image is not compressed with zstd")


def unpack(package: Path, into: Path) -> None:
    wanted = [f"./lib/modules/*/kernel/{name}" for name in MODULES]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as tar:
        subprocess.run(
            ["tar", "-x", "-C", str(into), "--wildcards", "./boot/vmlinuz-*", "./lib/modules/*/modules.*", *wanted],
            stdin=tar.stdout,
            check=True,
            timeout=300,
        )
    release = next((into / "lib" / "modules").iterdir()).name
    (into / "vmlinux").write_bytes(uncompressed((into / "boot" / f"vmlinuz-{release}").read_bytes()))
    call(["depmod", "-b", str(into), release])


def prepare() -> Kernel:
    """The kernel, downloaded at first use."""
    check_host()
    CACHE.mkdir(parents=True, exist_ok=True)
    ready = CACHE / "kernel"
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.is_dir():
            with tempfile.TemporaryDirectory(dir=CACHE, prefix="new-") as temporary:
                new = Path(temporary) / "kernel"
                new.mkdir()
                package = download(Path(temporary))
                unpack(package, new)
                new.rename(ready)
    return Kernel(ready)


def hardware_virtualisation() -> bool:
    """Only real support counts: a /dev/kvm that is itself emulated boots no ordinary kernel."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return (
        flags is not None and bool({"vmx", "svm"} & set(flags[1].split())) and os.access("/dev/kvm", os.R_OK | os.W_OK)
    )


def qemu_command(kernel: Kernel, run: Path, memory: str) -> list[str]:
    append = (
        "console=ttyS0 root=rootfs rootfstype=virtiofs ro panic=-1 oops=panic quiet loglevel=4 nokaslr mitigations=off "
        f"nowatchdog net.ifnames=0 random.trust_cpu=on init={GUEST} -- root {kernel.directory} {run}"
    )
    machine = ["-accel", "kvm", "-cpu", "host"]
    if not hardware_virtualisation():
        machine = ["-accel", "tcg,thread=multi", "-cpu", "max,la57=off,erms=off,fsrm=off"]
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35"]
    command += [*machine, "-smp", "2", "-m", memory, "-kernel", str(kernel.image), "-append", append]
    command += ["-object", f"memory-backend-memfd,id=memory,size={memory},share=on", "-numa", "node,memdev=memory"]
    command += [
        "-chardev",
        f"socket,id=root,path={run}/root.sock",
        "-device",
        "vhost-user-fs-pci,chardev=root,tag=rootfs",
    ]
    command += ["-serial", f"file:{run}/console", "-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
    for name in ("output", "status"):
        command += [
            "-chardev",
            f"file,id={name},path={run}/{name}",
            "-device",
            f"virtserialport,chardev={name},name={name}",
        ]
    return command


@contextlib.contextmanager
def process(command: Sequence[str], log: Path) -> Generator[subprocess.Popen[bytes]]:
    """A program that ends with the block, and with us whatever ends us."""
    with log.open("wb") as sink:
        child = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            env={**os.environ, "PATH": tool_path()},
        )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def run(
    command: Sequence[str], *, timeout: float = 300, memory: str = "2G", environment: dict[str, str] | None = None
) -> Outcome:
    """Boots, runs the command in the current directory, switches off."""
    kernel = prepare()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="run-") as temporary, contextlib.ExitStack() as stack:
        here = Path(temporary)
        lines = [
            f"export {name}={shlex.quote(value)}"
            for name, value in {**GUEST_ENVIRONMENT, **(environment or {})}.items()
        ]
        lines += [f"cd {shlex.quote(os.getcwd())}", f"exec {shlex.join(command)}", ""]
        (here / "command").write_text("\n".join(lines))
        virtiofsd = find_virtiofsd()
        share = ["-o", "source=/", "-o", "sandbox=chroot", "-o", "cache=always", "-o", "xattr"]
        if not virtiofsd.startswith("/usr/lib/qemu/"):  # the one in Rust has options of its own
            share = ["--shared-dir=/", "--sandbox=chroot", "--cache=always", "--xattr"]
        stack.enter_context(process([virtiofsd, f"--socket-path={here}/root.sock", *share], here / "virtiofsd.log"))
        while not (here / "root.sock").exists():
            if time.monotonic() > started + 20:
                raise Broken(f"virtiofsd does not start: {text(here / 'virtiofsd.log')}")
            time.sleep(0.01)
        machine = stack.enter_context(process(qemu_command(kernel, here, memory), here / "qemu.log"))
        try:
            machine.wait(timeout)
            status = text(here / "status").strip()
        except subprocess.TimeoutExpired:
            status = "124"
        console = text(here / "console")
        output = text(here / "output")
        if not status.isdigit():
            raise Broken(
                f"no status\nconsole: {console[-3000:]}\nqemu: {text(here / 'qemu.log')}\noutput: {output[-3000:]}"
            )
        return Outcome(int(status), output, console, time.monotonic() - started)


def terminated(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=300, help="seconds, boot included")
    parser.add_argument("--prepare", action="store_true", help="only download the kernel")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, terminated)
    try:
        if options.prepare:
            print(prepare().directory)
            return 0
        command: list[str] = options.command[1:] if options.command[:1] == ["--"] else options.command
        if not command:
            parser.error("no command")
        outcome = run(command, timeout=options.timeout)
    except (Unavailable, Broken) as why:
        print(f"{type(why).__name__}: {why}", file=sys.stderr)
        return 125
    print(outcome.output, end="")
    if outcome.console.strip():
        print(f"console:\n{outcome.console}", file=sys.stderr)
    print(f"status {outcome.status} after {outcome.seconds:.1f} s", file=sys.stderr)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
