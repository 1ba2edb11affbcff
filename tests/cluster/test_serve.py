"""`kvfs serve chunk` as a process: what it says, what it refuses, how it ends."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

from servers import Cluster, cluster, fsck

from commands import attempt_kvfs, kvfs
from waiting import wait_for


def test_it_starts_tells_how_it_is_and_ends_in_order(one: Cluster) -> None:
    server = one.servers[0]
    assert server.page("/healthz") == (200, "ok\n")
    assert server.page("/readyz") == (200, "ready\n")
    assert server.page("/nothing")[0] == 404
    assert server.metric("kvfs_map_version") == 6
    assert server.metric("kvfs_target_capacity_bytes") > 64 << 20
    assert 'kvfs_target_chunks{target="1"} 0.0' in server.page("/metrics")[1]
    assert server.metric("kvfs_server_sessions") == 0
    assert server.stop() == 0
    assert server.page("/readyz")[0] == 0
    assert "Traceback" not in server.said()
    report = fsck(server.device, "--data")
    assert (report["exit_code"], report["closed_properly"]) == (0, True)
    server.start()
    assert server.page("/readyz") == (200, "ready\n")


def test_a_changed_cluster_file_is_taken_at_sighup_and_a_broken_one_is_not(one: Cluster) -> None:
    server = one.servers[0]
    kvfs("cluster", "add-namespace", one.file, "acme/more")
    server.signal(signal.SIGHUP)
    wait_for(lambda: server.metric("kvfs_map_version") == 7, 20)
    good = one.file.read_text()
    one.file.write_text("[cluster\n")
    server.signal(signal.SIGHUP)
    wait_for(lambda: "cluster file not taken" in server.said(), 20)
    assert "not valid TOML" in server.said()
    assert server.page("/readyz") == (200, "ready\n")
    one.file.write_text(good)


def test_a_killed_server_starts_again_and_a_second_one_is_refused(one: Cluster) -> None:
    server = one.servers[0]
    second = attempt_kvfs("serve", "chunk", "--config", server.config)
    assert second.returncode == 1
    assert str(server.device).encode() in second.stderr
    assert b"Traceback" not in second.stderr
    server.kill()
    server.start()
    assert server.page("/healthz") == (200, "ok\n")


def test_check_and_refusals_say_what_is_wrong(one: Cluster) -> None:
    server = one.servers[0]
    assert "1 devices" in kvfs("serve", "chunk", "--config", server.config, "--check")
    text = server.config.read_text()
    for wrong, said in (
        (
            text.replace("127.0.0.1:" + str(server.port), "0.0.0.0:1").replace("auth_key", "# "),
            b"everybody may do everything",
        ),
        (text.replace(f"{one.key}.pub", "/nowhere"), b"/nowhere cannot be read"),
        (text.replace(f"{one.key}.pub", str(one.key)), b"it is a signing key"),
        (text.replace(str(one.file), "/nowhere"), b"/nowhere: cannot be read"),
    ):
        path = one.directory / "wrong.toml"
        path.write_text(wrong)
        done = attempt_kvfs("serve", "chunk", "--config", path, "--check")
        assert done.returncode == 1
        assert said in done.stderr
    assert attempt_kvfs("serve", "chunk").returncode == 2
    assert "[[device]]" in kvfs("serve", "chunk", "--print-default-config")


def test_the_admin_port_stands_what_strangers_send(one: Cluster) -> None:
    server = one.servers[0]
    idle = [socket.create_connection(("127.0.0.1", server.admin)) for _ in range(8)]
    try:
        for sent in (
            b"\0" * 100,
            b"GET /metrics\r\n\r\n",
            b"GET / HTTP/1.1\r\nX: " + b"a" * 40000 + b"\r\n\r\n",
        ):
            with socket.create_connection(("127.0.0.1", server.admin), timeout=20) as s:
                s.sendall(sent)
                assert s.recv(4096).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 ", b"HTTP/1.1 505 "))
        with socket.create_connection(("127.0.0.1", server.admin), timeout=20) as s:
            s.sendall(b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            assert s.recv(4096).startswith(b"HTTP/1.1 405 ")
        assert server.page("/healthz") == (200, "ok\n")
    finally:
        for s in idle:
            s.close()


def test_adding_a_target_where_data_must_stay_is_refused(one: Cluster) -> None:
    done = attempt_kvfs("cluster", "add-target", one.file, "tcp://127.0.0.1:1")
    assert done.returncode == 1
    assert b"acme/kept, acme/home" in done.stderr
    kvfs("cluster", "add-target", one.file, "tcp://127.0.0.1:1", "--lose-data")


def test_devices_are_pinned_to_the_cpus_that_are_named() -> None:
    with cluster(1, more="cpus = [0]\n") as made:
        process = made.servers[0].process
        assert process is not None
        masks: set[str] = set()
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            status = (task / "status").read_text()
            masks.add(next(line.split()[1] for line in status.splitlines() if line.startswith("Cpus_allowed_list")))
        assert "0" in masks
