"""fastsafetensor-3fs-reader 0.3.3 as released: a program compiled elsewhere against 3FS's own library runs with ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from environments import Environment, environment

HERE = Path(__file__).parent

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def reader() -> Environment:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the registry has fastsafetensor-3fs-reader 0.3.3 for CPython 3.11 only")
    return environment("fastsafetensors")


@pytest.mark.parametrize("backend", ["cpp", "python"])
def test_what_it_reads_is_what_safetensors_wrote(reader: Environment, directory: Path, backend: str) -> None:
    """Without LD_LIBRARY_PATH: importing hf3fs_py_usrbio brings the library in."""
    done = reader.run(HERE / "fastsafetensors_read.py", directory / "mnt", backend)
    assert done.stdout == f"{backend}: 4 files, 20 tensors equal\n"
