"""vLLM 0.32's own client for 3FS on a kvfs mount. Its connector, which needs CUDA, is not run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import vllm_hf3fs

from environments import Environment

pytestmark = pytest.mark.timeout(300)


class Report(msgspec.Struct):
    """What vllm_hf3fs.py prints."""

    results: int
    wrong: int
    refused: bool


def test_two_clients_of_one_file(vllm: Environment, directory: Path) -> None:
    """Each reads what the other has written over the ring, and the mount shows the same."""
    done = vllm.run(Path(vllm_hf3fs.__file__), directory / "mnt" / "pages.bin")
    report = msgspec.json.decode(done.stdout.splitlines()[-1], type=Report)
    assert report == Report(results=2 * vllm_hf3fs.ROUNDS * vllm_hf3fs.ENTRIES, wrong=0, refused=True)
