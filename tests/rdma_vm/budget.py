"""The virtual machine for a session's tests, for as long as it may run for all of them together."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import pytest
import vm

GUEST_S: Final = float(os.environ.get("RDMA_VM_SECONDS") or 480)
"""Of the machine, boots included, for a whole session. When they are over, what has not run fails."""
LEAST_S: Final = 10  # it takes longer to boot


def cpu_seconds() -> float:
    """Of the machines that have been."""
    spent = os.times()
    return spent.children_user + spent.children_system


@dataclass(frozen=True)
class Done:
    """What a command in the machine has come to."""

    output: str
    problem: str  # "": it ended with 0

    def text(self) -> str:
        """What it printed; the test fails if it did not end with 0."""
        if self.problem:
            pytest.fail(f"{self.problem}\n{self.output}")
        return self.output


@dataclass
class Guest:
    left: float = GUEST_S
    runs: list[str] = field(default_factory=list[str])

    def run(self, what: str, commands: Mapping[str, Sequence[str]], *, memory: str = "2G") -> dict[str, Done]:
        """One boot for all of them, one after another."""
        if self.left < LEAST_S:
            pytest.fail(self.over())
        lines: list[str] = []
        for name, command in commands.items():
            lines += [f"echo '=== {name}'", shlex.join(command), f'echo "=== {name} ended with $?"']
        begin, used = time.monotonic(), cpu_seconds()
        try:
            outcome = vm.run(["bash", "-c", "\n".join(lines)], timeout=self.left, memory=memory)
        finally:
            took = time.monotonic() - begin
            self.left -= took
            self.runs.append(f"{what} {took:.0f} s ({cpu_seconds() - used:.0f} s of CPU)")
        done: dict[str, Done] = {}
        for name in commands:
            _, _, rest = outcome.output.partition(f"=== {name}\n")
            output, _, status = rest.partition(f"=== {name} ended with ")
            status = status.partition("\n")[0]
            problem = ""
            if status != "0":
                ending = f"ended with {status}" if status else f"has not ended; {self.over()}"
                problem = f"{name} {ending}; console: {outcome.console}"
            done[name] = Done(output, problem)
        return done

    def over(self) -> str:
        used = f"{GUEST_S - self.left:.0f} s of the {GUEST_S:.0f} s for all tests together (RDMA_VM_SECONDS)"
        return f"the machine has run for {used}: {', '.join(self.runs)}"
