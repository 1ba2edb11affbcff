"""RDMA devices as /sys/class/infiniband has them, and which of them would be used."""

import json
from pathlib import Path

import pytest

from commands import kvfs
from kvfs.cluster.rails import by_sysfs, examine

MAPPED = "0000:0000:0000:0000:0000:ffff:0a4d:0001"
LINK_LOCAL = "fe80:0000:0000:0000:5054:00ff:fe12:3456"


def device(
    root: Path, name: str, gids: list[tuple[str, str]], *, state: str = "4: ACTIVE", layer: str = "Ethernet"
) -> None:
    port = root / name / "ports/1"
    for folder in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
        (port / folder).mkdir(parents=True)
    (port / "state").write_text(state + "\n")
    (port / "rate").write_text("100 Gb/sec (4X EDR)\n")
    (port / "link_layer").write_text(layer + "\n")
    for i, (gid, kind) in enumerate(gids):
        (port / f"gids/{i}").write_text(gid + "\n")
        (port / f"gid_attrs/types/{i}").write_text(kind + "\n")
        (port / f"gid_attrs/ndevs/{i}").write_text("eth7\n")


def test_active_ports_are_used_by_their_best_gid(tmp_path: Path) -> None:
    every = [
        (LINK_LOCAL, "IB/RoCE v1"),
        (LINK_LOCAL, "RoCE v2"),
        (MAPPED, "IB/RoCE v1"),
        (MAPPED, "RoCE v2"),
        ("0" * 4 + ":0000" * 7, "RoCE v2"),
    ]
    device(tmp_path, "mlx5_0", every)
    device(tmp_path, "mlx5_1", every, state="1: DOWN")
    device(tmp_path, "rxe0", [])
    device(tmp_path, "ib0", [("fe80:0000:0000:0000:0002:c903:0000:1234", "IB/RoCE v1")], layer="InfiniBand")
    report = examine(packages=tmp_path / "none", sysfs=tmp_path)
    assert report.source == "sysfs"
    assert "python3-pyverbs" in report.note
    found = {p.device: p for p in report.ports}
    assert (found["mlx5_0"].used, found["mlx5_0"].gid, found["mlx5_0"].speed) == (True, 3, 100_000)
    assert [g.index for g in found["mlx5_0"].gids] == [0, 1, 2, 3]
    assert found["mlx5_0"].gids[3].netdev == "eth7"
    assert (found["mlx5_1"].used, found["mlx5_1"].why_not) == (False, "the port is down")
    assert "no GID" in found["rxe0"].why_not
    assert (found["ib0"].used, found["ib0"].gid, found["ib0"].gids[0].type) == (True, 0, "ib")


def test_patterns_choose_devices(tmp_path: Path) -> None:
    for name in ("mlx5_0", "mlx5_1", "rxe0"):
        device(tmp_path, name, [(MAPPED, "RoCE v2")])
    report = examine("mlx5_*, rxe9", packages=tmp_path / "none", sysfs=tmp_path)
    assert [p.device for p in report.ports if p.used] == ["mlx5_0", "mlx5_1"]
    assert report.ports[2].why_not == "no pattern of mlx5_*,rxe9 names it"


def test_where_there_are_no_devices_it_says_so_and_is_content() -> None:
    if Path("/sys/class/infiniband").exists():
        pytest.skip("this host has RDMA devices")
    assert by_sysfs() == []
    assert "no RDMA devices here" in kvfs("rails")
    assert json.loads(kvfs("rails", "--json"))["ports"] == []
