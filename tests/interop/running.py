"""A daemon of `kvfs up`, and the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Up:
    directory: Path

    @property
    def mount(self) -> Path:
        return self.directory / "mnt"

    @property
    def socket(self) -> Path:
        return self.directory / "kvfs.sock"


def kvfs(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvfs", *args], capture_output=True, text=True, timeout=60, check=False
    )
