"""The configuration of a chunk server, the cluster file, and their one-sentence errors."""

import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.cluster import config, file
from kvfs.cluster.map import Class
from kvfs.cluster.server import target_ids
from kvfs.config import ConfigError

CHUNK = 'cluster = "/c.toml"\n'
DEVICE = '[[device]]\npath = "/d0"\n'


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_default_configuration_is_one_and_says_the_defaults(tmp_path: Path) -> None:
    found = config.load(write(tmp_path / "c", config.DEFAULT))
    plain = config.load(
        write(tmp_path / "p", f'cluster = "/etc/kvfs/cluster.toml"\n[[device]]\npath = "{found.device[0].path}"\n')
    )
    assert found == plain


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "object missing required field cluster"),
        (CHUNK, "missing required field device"),
        (CHUNK + "device = []", "0 devices"),
        (CHUNK + "lisen = []\n" + DEVICE, "lisen: unknown setting; did you mean 'listen'?"),
        (CHUNK + DEVICE + "sise = 1\n", "device[0].sise: unknown setting; did you mean 'size'?"),
        (CHUNK + DEVICE + 'size = "1M"\n', "less than the 64 MiB"),
        (CHUNK + DEVICE + DEVICE, "two have the same path"),
        (CHUNK + "cpus = [0, 1]\n" + DEVICE, "2 CPUs for 1 devices"),
        (CHUNK + "cpus = [-1]\n" + DEVICE, "cpus[0]"),
        (CHUNK + 'listen = ["tcp://host:1"]\n' + DEVICE, "numeric address"),
        (CHUNK + 'listen = ["rdma://127.0.0.1:1"]\n' + DEVICE, "no tcp:// address"),
        (CHUNK + "listen = []\n" + DEVICE, "0 addresses"),
        (CHUNK + 'listen = ["tcp://0.0.0.0:7117"]\n' + DEVICE, "without auth_key everybody may do everything"),
        (CHUNK + 'listen = ["tcp://[::]:7117"]\n' + DEVICE, "without auth_key everybody may do everything"),
        (CHUNK + 'admin = "localhost:1"\n' + DEVICE, "admin: 'localhost:1' is not ADDRESS:PORT"),
    ],
)
def test_wrong_configurations_are_explained(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(write(tmp_path / "c", text))
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_others_than_this_host_are_served_with_a_key_or_when_told_so(tmp_path: Path) -> None:
    open_to_all = CHUNK + 'listen = ["tcp://0.0.0.0:7117"]\n'
    assert config.load(write(tmp_path / "a", open_to_all + "insecure = true\n" + DEVICE)).insecure
    assert config.load(write(tmp_path / "b", open_to_all + 'auth_key = "/k.pub"\n' + DEVICE)).auth_key == Path("/k.pub")


def test_a_cluster_file_grows_by_targets_and_namespaces(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    made = file.ClusterFile()
    file.store(path, made, new=True)
    assert file.load(path) == made
    with pytest.raises(ConfigError, match="there are no targets"):
        file.load_map(path)
    with pytest.raises(ConfigError, match="is there already"):
        file.store(path, made, new=True)
    made = made.with_target(["tcp://10.0.0.1:7117"]).with_target(["tcp://10.0.0.1:7117"], number=1)
    made = made.with_namespace("acme", "llama", Class.CACHE).with_namespace("acme", "home", Class.VOLUME)
    file.store(path, made)
    assert file.load(path) == made
    cluster = file.load_map(path)
    assert cluster.version == 5
    assert [t.id for t in cluster.targets] == [1, 2]
    assert [n.id for n in cluster.namespaces] == [16, 17]
    assert made.kept == ["acme/home"]
    assert list(tmp_path.iterdir()) == [path]


TARGET = '[[target]]\nid = 1\nendpoints = ["tcp://10.0.0.1:7117"]\n'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[clusters]\n", "clusters: unknown setting; did you mean 'cluster'?"),
        ("[cluster]\nslot = 1\n", "cluster.slot: unknown setting; did you mean 'slots'?"),
        ("[[target]]\nid = 1\n", "missing required field endpoints"),
        (TARGET + "[cluster]\nslots = 3\n", "power of two"),
        (TARGET + "[cluster]\nversion = 0\n", "version 0"),
        (TARGET + TARGET, "target 1 is there twice"),
        (TARGET + '[[namespace]]\nid = 16\ntenant = "a"\nname = "b"\nclass = "cash"\n', "invalid enum value 'cash'"),
        (
            TARGET + '[[namespace]]\nid = 16\ntenant = "a"\nname = "b"\ncls = "cache"\n',
            "cls: unknown setting; did you mean 'class'?",
        ),
        (TARGET + '[[namespace]]\nid = 0\ntenant = "a"\nname = "b"\nclass = "cache"\n', "id 0"),
    ],
)
def test_wrong_cluster_files_are_explained(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        file.load(write(tmp_path / "cluster.toml", text))
    assert why in str(caught.value)


@given(st.lists(st.text(max_size=20), max_size=3), st.text(max_size=20), st.text(max_size=20))
def test_whatever_text_is_in_a_cluster_file_it_is_read_as_written(endpoints: list[str], tenant: str, name: str) -> None:
    made = file.ClusterFile(
        target=[file.TargetEntry(1, endpoints)], namespace=[file.NamespaceEntry(16, tenant, name, Class.CACHE)]
    )
    assert msgspec.convert(tomllib.loads(file.dump(made)), file.ClusterFile) == made


def test_metrics_call_targets_by_the_ids_of_the_map(tmp_path: Path) -> None:
    cluster = file.ClusterFile()
    for host in (1, 2):
        for number in (0, 1):
            cluster = cluster.with_target([f"tcp://10.0.0.{host}:7117"], number=number)
    devices = DEVICE + '[[device]]\npath = "/d1"\n'
    second = write(tmp_path / "c", CHUNK + 'auth_key = "/k"\nlisten = ["tcp://10.0.0.2:7117"]\n' + devices)
    assert target_ids(config.load(second), cluster.map()) == ["3", "4"]
    every = write(tmp_path / "e", CHUNK + 'auth_key = "/k"\nlisten = ["tcp://0.0.0.0:7117"]\n' + devices)
    assert target_ids(config.load(every), cluster.map()) == ["number-0", "number-1"]
