"""LMCache 0.5.6 as released: its hf3fs:// connector on a kvfs mount, checked by its own lmcache.v1.basic_check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from environments import Environment, environment

HERE = Path(__file__).parent
KEYS = 8
OPERATIONS = {"EXISTS (non-exist)", "PUT", "EXISTS (exist)", "GET"}
ROW = re.compile(r"^\| (\S[^|]*?) +\|(?:[^|]*\|){3} +(\d+)/(\d+) \|", re.MULTILINE)

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="session")
def lmcache() -> Environment:
    return environment("lmcache")


def configured(directory: Path, config: Path) -> str:
    stored = directory / "mnt" / "lmcache"
    stored.mkdir()
    config.write_text(
        f"""
chunk_size: 256
local_cpu: true
max_local_cpu_size: 1
remote_url: "hf3fs://{stored}"
remote_serde: "naive"
extra_config:
  hf3fs_mount_point: "{directory / "mnt"}"
  hf3fs_iov_size: 104857600
  hf3fs_ior_entries: 128
  hf3fs_io_thread_num: 2
"""
    )
    return str(config)


@pytest.mark.parametrize("mode", ["test_remote", "test_storage_manager"])
def test_its_own_check(lmcache: Environment, directory: Path, tmp_path: Path, mode: str) -> None:
    """Its exit code is always 0: the table says what passed."""
    done = lmcache.run(
        "-m",
        "lmcache.v1.basic_check",
        "--mode",
        mode,
        "--num-keys",
        str(KEYS),
        "--obj-size",
        str(2 << 20),
        variables={"LMCACHE_CONFIG_FILE": configured(directory, tmp_path / "config.yaml")},
    )
    rows = {name: (int(passed), int(of)) for name, passed, of in ROW.findall(done.stdout)}
    assert rows == dict.fromkeys(OPERATIONS, (KEYS, KEYS)), done.stdout[-5000:]
    assert f"Validation (content correct): {KEYS}/{KEYS} passed" in done.stdout
    assert len(list((directory / "mnt" / "lmcache").glob("*.data"))) >= KEYS


def test_random_objects(lmcache: Environment, directory: Path) -> None:
    """Its client with random bytes, since the objects of its check are all alike; some larger than its shared memory."""
    done = lmcache.run(HERE / "lmcache_objects.py", directory / "mnt")
    assert done.stdout.endswith("24 objects\n"), done.stdout
