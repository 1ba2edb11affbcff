"""Where the suites' programs are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def copy_of(variable: str) -> Path:
    """The installed copy that the environment names."""
    named = os.environ.get(variable)
    if not named:
        pytest.skip(f"{variable} names no installed copy")
    path = Path(named).absolute()
    assert path.exists(), f"{variable}={named} does not exist"
    return path


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found
