"""The connectors' stores on chunk servers, without a daemon: the URL names the namespace."""

from __future__ import annotations

import os

import pytest
from servers import Cluster

from kvfs_usrbio.connectors.finding import Finder, Lookups
from kvfs_usrbio.connectors.link import Link, opener
from kvfs_usrbio.connectors.lossy import Keys, LossyStore

KEYS = Keys({"test": "connectors"})


def test_a_lossy_store_on_chunk_servers(three: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFS_REMOTE_TOKEN", str(three.token("cache:rw")))
    store = LossyStore(three.url("cache"), otherwise="default/sglang")
    key, value = KEYS.of(os.urandom(8)), os.urandom(1 << 20)
    assert store.put([key], [value]) == [1]
    into = bytearray(len(value))
    assert store.get([key], [into]) == [len(value)]
    assert into == value
    assert store.match_prefix([key, KEYS.of(b"none")]) == 1
    assert store.evict([key]) == [0]
    store.close()


def test_a_link_on_chunk_servers(three: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFS_REMOTE_TOKEN", str(three.token("cache:rw")))
    connect = opener(three.url("cache"), None, "default/vllm")

    def lookups() -> Lookups:
        store = connect()
        return Lookups(store, store.queue())

    finder = Finder(Link(lookups))
    assert finder.link.wait(20) is not None
    while (found := finder.find("one", [b"none"])) is None:
        pass
    assert found == [-2]
    finder.link.close()
