"""`kvfs cluster` and `kvfs token` as a person uses them."""

import json
from pathlib import Path

from commands import attempt_kvfs, kvfs


def test_from_nothing_to_a_token(tmp_path: Path) -> None:
    cluster, key, token = tmp_path / "cluster.toml", tmp_path / "k", tmp_path / "t"
    kvfs("cluster", "init", cluster, "--slots", "64")
    kvfs("cluster", "add-target", cluster, "tcp://10.0.0.1:7117", "rdma://10.0.0.1:7118")
    kvfs("cluster", "add-namespace", cluster, "acme/home", "--class", "volume")
    refused = attempt_kvfs("cluster", "add-target", cluster, "tcp://10.0.0.2:7117")
    assert refused.returncode == 1
    assert b"acme/home" in refused.stderr
    shown = json.loads(kvfs("cluster", "show", cluster, "--json"))
    assert (shown["version"], shown["slots"], shown["targets"][0]["slots"]) == (3, 64, 64)
    assert shown["namespaces"] == [{"id": 16, "tenant": "acme", "name": "home", "class": "volume"}]
    kvfs("token", "keygen", key)
    issue = ("token", "issue", "--key", key, "--cluster", cluster, "--tenant", "acme")
    kvfs(*issue, "--namespace", "home:ro", "--expires", "2h", "-o", token)
    said = json.loads(kvfs("token", "show", token, "--key", f"{key}.pub", "--cluster", cluster, "--json"))
    assert said["verified"] is True
    assert said["grants"] == [{"namespace": 16, "name": "home", "rights": "ro", "files": True, "cache": False}]
    missing = attempt_kvfs(*issue, "--namespace", "nothing", "-o", tmp_path / "u")
    assert missing.returncode == 1
    assert b"no namespace acme/nothing" in missing.stderr
