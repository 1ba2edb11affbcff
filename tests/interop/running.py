"""A daemon of `kvfs up`."""

from __future__ import annotations

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
