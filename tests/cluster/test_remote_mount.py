"""A volume: names in one data directory, data on three chunk servers, mounted by URL."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import Cluster, cluster, fsck

from commands import attempt_kvfs, kill_daemon, kvfs, run
from kvfs.mount import service
from kvfs_usrbio import BlockStore


@contextmanager
def mounted(made: Cluster, directory: Path, token: Path, volume: str = "home") -> Generator[Path]:
    """The mount of a volume; neither it nor its daemon is there afterwards."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse here")
    point = directory.with_name(directory.name + "-mnt")
    try:
        kvfs("mount", made.url(volume), point, "--dir", directory, "--token", token, "--detach")
        yield point
    finally:
        attempt_kvfs("down", "--dir", directory)
        service.unmount(point)


@pytest.fixture
def token(three: Cluster) -> Path:
    return three.token("home:rw", "cache:rw")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files to copy: small, large, empty, sparse."""
    place = tmp_path_factory.mktemp("tree")
    for i in range(60):
        folder = place / f"d{i % 5}"
        folder.mkdir(exist_ok=True)
        (folder / f"f{i}").write_bytes(os.urandom(i * 1777))
    (place / "large").write_bytes(os.urandom(20 << 20))
    with open(place / "sparse", "wb") as f:
        f.seek(5 << 20)
        f.write(b"end")
    os.symlink("large", place / "link")
    return place


def same(a: Path, b: Path) -> bool:
    found = filecmp.dircmp(a, b, ignore=[])
    plain = not (found.left_only or found.right_only or found.funny_files)
    _, different, errors = filecmp.cmpfiles(a, b, found.common_files, shallow=False)
    return plain and not different and not errors and all(same(a / d, b / d) for d in found.common_dirs)


def test_files_are_there_after_a_new_mount_and_spread_over_the_servers(
    three: Cluster, token: Path, tree: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "names"
    with mounted(three, directory, token) as point:
        run("cp", "-a", f"{tree}/.", point)
        assert same(tree, point)
        status = json.loads(kvfs("status", "--dir", directory, "--json"))
        assert status["remote"] == three.url("home")
        assert len(status["rails"]) >= 3
        assert not (directory / "store.kvfs").exists()
    assert all(server.metric("kvfs_target_file_chunks") > 50 for server in three.servers)
    with mounted(three, directory, token) as point:
        assert same(tree, point)
        if shutil.which("rsync"):
            assert run("rsync", "-a", "--checksum", "--dry-run", "--itemize-changes", f"{tree}/", f"{point}/") == ""
        os.truncate(point / "large", 100_000)
        (point / "d0/f0").unlink()
        os.rename(point / "d1", point / "moved")
        assert (point / "large").read_bytes() == (tree / "large").read_bytes()[:100_000]
    report = fsck(directory)
    assert (report["exit_code"], report["orphans_compared"]) == (0, False)


def test_fio_reads_what_it_wrote(tmp_path: Path) -> None:
    if shutil.which("fio") is None:
        pytest.skip("no fio here")
    directory = tmp_path / "names"
    with cluster(2) as made, mounted(made, directory, made.token("home:rw")) as point:
        run(
            *(
                "fio",
                "--name=v",
                f"--filename={point}/fio",
                "--size=24M",
                "--rw=randwrite",
                "--bs=4k-256k",
                "--verify=xxhash",
            ),
            *("--do_verify=1", "--verify_fatal=1", "--ioengine=psync", "--end_fsync=1", "--randrepeat=1"),
            cwd=tmp_path,  # where it leaves a file of its state
            seconds=100,
        )


def test_another_directory_cannot_mount_the_same_volume(tmp_path: Path) -> None:
    with cluster(1) as made:
        token = made.token("home:rw")
        with mounted(made, tmp_path / "a", token) as point:
            (point / "file").write_text("kept")
        refused = attempt_kvfs("mount", made.url("home"), tmp_path / "m", "--dir", tmp_path / "b", "--token", token)
        assert refused.returncode == 1
        assert b"belongs to the metadata of another data directory" in refused.stderr
        with mounted(made, tmp_path / "a", token) as point:
            assert (point / "file").read_text() == "kept"
        local = attempt_kvfs("up", "--dir", tmp_path / "a", "--size", "64M")
        assert local.returncode == 1
        assert b"holds the names of volume acme/home" in local.stderr
        # The servers' stores are sound, and what is in them is nobody's orphan.
        assert made.servers[0].stop() == 0
        report = fsck(made.servers[0].device, "--data")
        assert (report["exit_code"], report["file_chunks"], report["blocks"]) == (0, 1, 1)
        assert report["orphans_compared"] is False


def test_synced_data_survives_a_kill_of_daemon_and_server(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    with cluster(1) as made:
        token = made.token("home:rw")
        with mounted(made, tmp_path / "a", token) as point:
            with open(point / "file", "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            kill_daemon(tmp_path / "a")
            made.servers[0].kill()
            made.servers[0].start()
        with mounted(made, tmp_path / "a", token) as point:
            assert (point / "file").read_bytes() == data


def test_a_mount_outlives_its_server_and_goes_on_when_that_is_back(tmp_path: Path) -> None:
    data = os.urandom(1_000_000)
    with cluster(1) as made, mounted(made, tmp_path / "a", made.token("home:rw")) as point:
        (point / "before").write_bytes(data)
        run("sync", "-f", point)
        made.servers[0].kill()
        assert (point / "before").stat().st_size == len(data)  # names are here
        time.sleep(0.5)
        made.servers[0].start()
        assert (point / "before").read_bytes() == data
        (point / "after").write_bytes(data)
        assert (point / "after").read_bytes() == data


def test_blocks_of_the_cluster_are_seen_below_the_mount_and_by_rings(tmp_path: Path) -> None:
    with cluster(1) as made:
        token = made.token("home:rw", "cache:rw")
        value = os.urandom(100_000)
        with mounted(made, tmp_path / "a", token) as point:
            with BlockStore.open(point, "acme/cache") as store:
                assert store.put([b"\x0a\x1b"], [value]) == [1]
            with BlockStore.open(made.url("cache"), token=token) as store:
                into = bytearray(len(value))
                assert store.get([b"\x0a\x1b"], [into]) == [len(value)]
                assert into == value
            assert (point / ".kvfs/blocks/acme/cache/0a/0a1b").read_bytes() == value
            with pytest.raises(PermissionError):
                (point / ".kvfs/blocks/acme/new").mkdir()
            with pytest.raises(FileNotFoundError):
                BlockStore.open(point, "acme/new")
        assert not service.is_mounted(point)


def test_urls_that_lead_nowhere_are_refused_with_a_sentence(three: Cluster, token: Path, tmp_path: Path) -> None:
    def refused(*options: str | Path, code: int = 1) -> str:
        done = attempt_kvfs("mount", *options)
        assert done.returncode == code
        assert b"Traceback" not in done.stderr
        return done.stderr.decode()

    where = (tmp_path / "m", "--dir", tmp_path / "x", "--token", token)
    assert "no namespace acme/nothing" in refused(three.url("nothing"), *where)
    assert "no volume" in refused(three.url("cache"), *where)
    assert "is not kvfs://" in refused("kvfs://127.0.0.1/acme/home", *where, code=2)
    assert "127.0.0.1:1" in refused("kvfs://127.0.0.1:1/acme/home", *where)
    missing = ("--token", tmp_path / "none")
    assert "cannot be read" in refused(three.url("home"), tmp_path / "m", "--dir", tmp_path / "x", *missing)
    assert "are for volumes" in refused(tmp_path / "x", tmp_path / "m", "--token", token, code=2)
