"""Hosts that are network namespaces of this machine, joined by virtual cables: for tests and benches of several hosts.

A namespace lives as long as a process is in it. The one that holds it ends with its standard input, which is a pipe from this
process: nothing is left even when this process is killed. Cables go with either of their hosts.

Needs root, iproute2 and util-linux, `Host.filtered` nftables; Unavailable says what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import shutil
import subprocess
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

COMMAND_S: Final = 20.0
MAX_CABLES: Final = 250
CLONE_NEWNET: Final = 0x40000000
_NET: Final = ipaddress.IPv4Network("10.231.0.0/16")  # only in our namespaces: nobody else can have it there
_PROGRAMS: Final = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2"}
_libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """There can be no such hosts here; str() says why."""


def _said(error: bytes) -> str:
    lines = error.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason given"


def _program(name: str, package: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise Unavailable(f"{name} is not installed: apt-get install {package}")
    return found


def _set_namespace(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


class Host:
    """A namespace with a loopback device."""

    def __init__(self, name: str) -> None:
        self.name = name
        if os.geteuid() != 0:
            raise Unavailable("network namespaces need root")
        unshare = _program("unshare", _PROGRAMS["unshare"])
        # A session of its own: Ctrl-C of a terminal is not for it.
        self._holder = subprocess.Popen(
            [unshare, "--net", "sh", "-c", "echo here && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            assert self._holder.stdout is not None
            assert self._holder.stderr is not None
            if self._holder.stdout.readline() != b"here\n":
                raise Unavailable(f"no network namespace can be made: {_said(self._holder.stderr.read())}")
            self.run("ip", "link", "set", "lo", "up")
        except BaseException:
            self.end()
            raise

    @property
    def namespace(self) -> Path:
        return Path(f"/proc/{self._holder.pid}/ns/net")

    @property
    def holder(self) -> int:
        return self._holder.pid

    def command(self, *command: str) -> list[str]:
        """A command line that runs this one in the host; the process it starts becomes this one."""
        return [_program("nsenter", _PROGRAMS["nsenter"]), f"--net={self.namespace}", *command]

    def run(self, program: str, *options: str, text: str = "") -> str:
        """What a program printed in the host. Unavailable if it is not there or fails: the kernel lacks something."""
        line = self.command(_program(program, _PROGRAMS.get(program, program)), *options)
        done = subprocess.run(line, input=text.encode(), capture_output=True, timeout=COMMAND_S, check=False)
        if done.returncode != 0:
            raise Unavailable(f"{' '.join([program, *options])}: {_said(done.stderr)}")
        return done.stdout.decode()

    @contextlib.contextmanager
    def entered(self) -> Generator[None]:
        """Sockets that this thread makes meanwhile are the host's, and those of all threads and processes it starts."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(self.namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _set_namespace(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _set_namespace(before)
        finally:
            os.close(before)

    @contextlib.contextmanager
    def filtered(self, *rules: str, name: str = "kvfs") -> Generator[None]:
        """Nftables rules for all that arrives and all that leaves, such as "drop"."""
        lines = [f"table inet {name} {{"]
        for hook in ("input", "output"):
            lines += [f"chain {hook} {{", f"type filter hook {hook} priority 0", *rules, "}"]
        self.run("nft", "-f", "-", text="\n".join([*lines, "}", ""]))
        try:
            yield
        finally:
            self.run("nft", "delete", "table", "inet", name)

    def end(self) -> None:
        for pipe in (self._holder.stdin, self._holder.stdout, self._holder.stderr):
            if pipe is not None:
                pipe.close()
        try:
            self._holder.wait(COMMAND_S)
        except subprocess.TimeoutExpired:
            self._holder.kill()
            self._holder.wait()


@dataclass(frozen=True, slots=True)
class End:
    """Of a cable: a device of a host, with an address."""

    host: Host
    device: str
    address: str

    def link(self, state: str) -> None:
        """up or down."""
        self.host.run("ip", "link", "set", self.device, state)

    @contextlib.contextmanager
    def unplugged(self) -> Generator[None]:
        """The link is down, which both sides see: routes through it end."""
        self.link("down")
        try:
            yield
        finally:
            self.link("up")

    def shape(self, mbits: int) -> None:
        """No more than this leaves here, to a thousandth over 10 ms; what is more waits, for 50 ms at most."""
        burst = max(mbits * 1_000_000 // 8 // 100, 128 << 10)  # a packet of 64 KiB must fit
        limit = f"rate {mbits}mbit burst {burst} latency 50ms"
        self.host.run("tc", "qdisc", "replace", "dev", self.device, "root", "tbf", *limit.split())

    def carried(self) -> tuple[int, int]:
        """Bytes that came in and went out so far."""
        found = json.loads(self.host.run("ip", "-json", "-stats", "link", "show", "dev", self.device))
        stats = found[0]["stats64"]
        return int(stats["rx"]["bytes"]), int(stats["tx"]["bytes"])

    @contextlib.contextmanager
    def silent(self) -> Generator[None]:
        """All that comes in or goes out here is dropped, and neither side is told."""
        rules = f"iifname {self.device} drop", f"oifname {self.device} drop"
        # An input chain has no outgoing device, and an output chain no incoming one: that rule matches nothing there.
        with self.host.filtered(*rules, name=f"silent_{self.device}"):
            yield


@dataclass(frozen=True, slots=True)
class Cable:
    a: End
    b: End

    def shape(self, mbits: int) -> None:
        for end in (self.a, self.b):
            end.shape(mbits)


class Network:
    """Hosts and cables, made as they are needed."""

    def __init__(self) -> None:
        self._hosts = contextlib.ExitStack()
        self._cables = 0

    def host(self, name: str) -> Host:
        made = Host(name)
        self._hosts.callback(made.end)
        return made

    def cable(self, a: Host, b: Host) -> Cable:
        """A subnet of its own: a host is reached by a cable by its address there."""
        if self._cables == MAX_CABLES:
            raise ValueError(f"more than {MAX_CABLES} cables")
        self._cables += 1
        device = f"c{self._cables}"
        subnet = list(_NET.subnets(new_prefix=24))[self._cables]
        ends = End(a, device, str(subnet[1])), End(b, device, str(subnet[2]))
        peer = ("peer", "name", device, "netns", str(b.holder))
        a.run("ip", "link", "add", device, "type", "veth", *peer)
        for end in ends:
            end.host.run("ip", "address", "add", f"{end.address}/{subnet.prefixlen}", "dev", device)
            end.link("up")
        return Cable(*ends)

    def end(self) -> None:
        self._hosts.close()


@contextlib.contextmanager
def network() -> Generator[Network]:
    """Nothing of it is there afterwards."""
    made = Network()
    try:
        yield made
    finally:
        made.end()
