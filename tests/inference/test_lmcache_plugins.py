"""LMCache 0.5.6 as released with kvfs's L2 adapter and remote connector, checked by its own basic_check and bench."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from environments import Environment, environment

HERE = Path(__file__).parent
KEYS = 8
ROW = re.compile(r"^\| (\S[^|]*?) +\|(?:[^|]*\|){3} +(\d+)/(\d+) \|", re.MULTILINE)

pytestmark = pytest.mark.timeout(900)


class RandomReport(msgspec.Struct):
    """What lmcache_random.py prints."""

    loaded: int
    missed: int
    wrong: int


@pytest.fixture(scope="session")
def lmcache() -> Environment:
    return environment("lmcache")


def adapter(directory: Path) -> str:
    return json.dumps(
        {
            "type": "native_plugin",
            "module_path": "kvfs_usrbio.connectors.lmcache_l2",
            "class_name": "KvfsL2",
            "adapter_params": {"kvfs": str(directory / "mnt")},
        }
    )


def passed(output: str) -> dict[str, tuple[int, int]]:
    return {name: (int(good), int(of)) for name, good, of in ROW.findall(output)}


def test_l2_by_its_own_check(lmcache: Environment, directory: Path) -> None:
    """Its exit code is always 0: the table says what passed."""
    options = ("--num-keys", str(KEYS), "--obj-size", str(2 << 20), "--kv-dtype", "bfloat16")
    done = lmcache.run(
        "-m", "lmcache.v1.basic_check", "--mode", "test_l2_adapter", "--l2-adapter", adapter(directory), *options
    )
    wanted = ("LOOKUP (absent)", "STORE", "LOOKUP (exist)", "LOAD")
    assert passed(done.stdout) == dict.fromkeys(wanted, (KEYS, KEYS)), done.stdout[-5000:]
    assert f"Validation (content): {KEYS}/{KEYS}" in done.stdout


def test_l2_by_its_own_bench(lmcache: Environment, directory: Path) -> None:
    command = lmcache.directory / "bin" / "lmcache"
    done = lmcache.run(command, "bench", "l2", "--l2-adapter", adapter(directory), "--no-skip-verify")
    assert re.search(r"\[Verify\] All \d+ keys data verified OK", done.stdout + done.stderr), done.stdout[-5000:]


@pytest.mark.parametrize("url", ["kvfs://{mount}", "plugin://kvfs"])
@pytest.mark.parametrize("mode", ["test_remote", "test_storage_manager"])
def test_remote_by_its_own_check(lmcache: Environment, directory: Path, tmp_path: Path, mode: str, url: str) -> None:
    mount = directory / "mnt"
    plugin = "remote_storage_plugin.kvfs"
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
chunk_size: 256
local_cpu: true
max_local_cpu_size: 1
remote_url: "{url.format(mount=mount)}"
remote_serde: "naive"
remote_storage_plugins: ["kvfs"]
extra_config:
  {plugin}.module_path: kvfs_usrbio.connectors.lmcache
  {plugin}.class_name: KvfsAdapter
  {plugin}.path: {mount}
"""
    )
    options = ("--num-keys", str(KEYS), "--obj-size", str(2 << 20))
    done = lmcache.run(
        "-m", "lmcache.v1.basic_check", "--mode", mode, *options, variables={"LMCACHE_CONFIG_FILE": str(config)}
    )
    wanted = ("EXISTS (non-exist)", "PUT", "EXISTS (exist)", "GET")
    assert passed(done.stdout) == dict.fromkeys(wanted, (KEYS, KEYS)), done.stdout[-5000:]
    assert f"Validation (content correct): {KEYS}/{KEYS} passed" in done.stdout


def test_random_requests(lmcache: Environment, directory: Path) -> None:
    """Through LMCache's own adapter over the plug-in, in shared memory as its server's: no object that is loaded ever
    differs from what computing it gives."""
    done = lmcache.run(HERE / "lmcache_random.py", adapter(directory))
    report = msgspec.json.decode(done.stdout.splitlines()[-1], type=RandomReport)
    assert report.wrong == 0
    assert report.loaded > 100
    assert report.missed > 10
