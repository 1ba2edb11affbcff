"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_kvfs_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests see no KVFS_* setting of whoever runs them, and never that person's data directory."""
    for name in [name for name in os.environ if name.startswith("KVFS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg-data"))
