"""The cluster map: its bytes there and back, what is refused, and how slots are spread."""

import ipaddress
import struct
from collections import Counter

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs.cluster.map import (
    MAX_ENDPOINTS,
    Class,
    ClusterMap,
    Endpoint,
    MapError,
    Namespace,
    Target,
    Transport,
    spread,
)

U32 = st.integers(0, 2**32 - 1)
NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,62}", fullmatch=True)
NETWORKS = st.sampled_from([Transport.TCP, Transport.RDMA])
SOCKETS = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,15}", fullmatch=True)
ENDPOINTS = st.builds(Endpoint, NETWORKS, st.ip_addresses(), st.integers(1, 65535), U32).filter(
    lambda e: not getattr(e.address, "scope_id", None)
) | st.builds(Endpoint, st.just(Transport.SHM), SOCKETS, st.just(0))


def target(ident: int, more: list[Endpoint]) -> Target:
    tcp = Endpoint(Transport.TCP, ipaddress.ip_address("10.0.0.1"), ident % 60000 + 1)
    return Target(ident, ident, (tcp, *more))


def targets(ids: list[int]) -> st.SearchStrategy[tuple[Target, ...]]:
    more = st.lists(ENDPOINTS, max_size=MAX_ENDPOINTS - 1, unique=True)
    return st.tuples(*(st.builds(target, st.just(i), more) for i in ids))


MAPS = st.builds(
    ClusterMap.make,
    st.integers(1, 2**32 - 1),
    st.sampled_from([1, 2, 16, 64]),
    st.lists(U32, min_size=1, max_size=5, unique=True).flatmap(targets),
    st.lists(
        st.builds(Namespace, st.integers(1, 2**32 - 2), NAMES, NAMES, st.sampled_from(Class)),
        max_size=5,
        unique_by=(lambda n: n.id, lambda n: (n.tenant, n.name)),
    ),
)
SMALL = ClusterMap.make(
    3,
    16,
    [Target(1, 0, (Endpoint.parse("tcp://10.0.0.1:7117"), Endpoint.parse("rdma://[fd00::1]:7118?speed=100000")))],
    [Namespace(16, "acme", "llama", Class.CACHE)],
)


@given(MAPS)
def test_what_was_encoded_is_decoded(cluster: ClusterMap) -> None:
    raw = cluster.encode()
    assert len(raw) == cluster.size
    assert ClusterMap.decode(raw) == cluster


@given(st.binary(max_size=3000))
def test_bytes_that_are_no_map_are_refused_with_a_sentence(raw: bytes) -> None:
    with pytest.raises(MapError):
        ClusterMap.decode(raw)


@given(MAPS, st.data())
@settings(max_examples=200)
def test_hostile_bytes_under_a_right_checksum_give_a_map_or_an_error(cluster: ClusterMap, data: st.DataObject) -> None:
    raw = bytearray(cluster.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw[24:32] = bytes(8)
    raw[24:32] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(raw)))
    try:
        found = ClusterMap.decode(bytes(raw))
    except MapError:
        return
    assert ClusterMap.decode(found.encode()) == found


@given(st.data())
def test_one_changed_bit_is_noticed(data: st.DataObject) -> None:
    raw = bytearray(SMALL.encode())
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MapError):
        ClusterMap.decode(bytes(raw))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_each_target_has_its_share_and_a_new_one_takes_little_more_than_its_own(count: int) -> None:
    ids = list(range(1, count + 2))
    before, after = spread(4096, ids[:-1]), spread(4096, ids)
    shares = Counter(before)
    assert max(shares.values()) - min(shares.values()) <= count
    moved = sum(b != a for b, a in zip(before, after, strict=True))
    assert after.count(count) <= moved <= after.count(count) * 1.35


def test_slots_do_not_depend_on_the_order_in_which_targets_are_listed() -> None:
    ids = [7, 3, 12]
    straight = [ids[i] for i in spread(1024, ids)]
    turned = [ids[::-1][i] for i in spread(1024, ids[::-1])]
    assert sum(a != b for a, b in zip(straight, turned, strict=True)) <= 16


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tcp://host:7117", "not a numeric address"),
        ("tcp://10.0.0.1", "is not tcp://"),
        ("tcp://10.0.0.1:0", "is not tcp://"),
        ("tcp://10.0.0.1:70000", "is not tcp://"),
        ("udp://10.0.0.1:7117", "is not tcp://"),
        ("tcp://10.0.0.1:7117/x", "is not tcp://"),
        ("tcp://[fe80::1%25eth0]:7117", "scope"),
        ("tcp://10.0.0.1:7117?speed=fast", "only ?speed=MBITS"),
        ("tcp://10.0.0.1:7117?color=1", "only ?speed=MBITS"),
        ("shm://", "is not shm://"),
        ("shm:/run/kvfs/a", "is not shm://"),
        ("shm://a/b", "is not shm://"),
        ("shm://..", "is not shm://"),
        ("shm://seventeen-letters", "is not shm://"),
        ("shm://a?speed=1", "is not shm://"),
    ],
)
def test_wrong_endpoints_are_named(text: str, why: str) -> None:
    with pytest.raises(MapError) as caught:
        Endpoint.parse(text)
    assert why in str(caught.value)


@pytest.mark.parametrize("text", ["tcp://10.0.0.1:7117", "rdma://[fd00::1]:7118?speed=100000", "shm://Host-7.kvfs_0"])
def test_endpoints_are_written_as_they_are_read(text: str) -> None:
    assert str(Endpoint.parse(text)) == text


def test_what_cannot_be_a_cluster_is_refused() -> None:
    tcp, rdma = Endpoint.parse("tcp://10.0.0.1:7117"), Endpoint.parse("rdma://10.0.0.1:7118")

    def refused(
        why: str, *targets: Target, slots: int = 16, names: tuple[Namespace, ...] = (), version: int = 1
    ) -> None:
        with pytest.raises(MapError) as caught:
            ClusterMap.make(version, slots, targets, names)
        assert why in str(caught.value)

    refused("1 to 1024")
    refused("power of two", Target(1, 0, (tcp,)), slots=3)
    refused("version 0", Target(1, 0, (tcp,)), version=0)
    refused("target 1 is there twice", Target(1, 0, (tcp,)), Target(1, 1, (tcp,)))
    refused("two targets are number 0", Target(1, 0, (tcp,)), Target(2, 0, (tcp,)))
    refused("no tcp:// endpoint", Target(1, 0, (rdma,)))
    shm = Endpoint.parse("shm://host-a")
    refused("no tcp:// endpoint", Target(1, 0, (shm,)))
    refused("two targets are number 0", Target(1, 0, (tcp, shm)), Target(2, 0, (Endpoint.parse("tcp://[::1]:1"), shm)))
    refused("is not shm://", Target(1, 0, (tcp, Endpoint(Transport.SHM, "a/b", 0))))
    refused("without a port", Target(1, 0, (tcp, Endpoint(Transport.SHM, "a", 1))))
    refused("endpoint shm:// at", Target(1, 0, (tcp, Endpoint(Transport.SHM, tcp.address, 0))))
    refused("endpoint tcp:// at", Target(1, 0, (tcp, Endpoint(Transport.TCP, "a", 1))))
    refused("0 endpoints", Target(1, 0, ()))
    one = Target(1, 0, (tcp,))
    refused("id 16", one, names=(Namespace(16, "a", "b", Class.CACHE), Namespace(16, "a", "c", Class.CACHE)))
    refused(
        "a/b is there twice", one, names=(Namespace(16, "a", "b", Class.CACHE), Namespace(17, "a", "b", Class.CACHE))
    )
    refused("no tenant or namespace name", one, names=(Namespace(16, "..", "b", Class.CACHE),))
    refused("at most 63", one, names=(Namespace(16, "a" * 64, "b", Class.CACHE),))
    many = tuple(Namespace(i + 1, "a", f"n{i}", Class.CACHE) for i in range(4096))
    refused("at most 1048576", *(Target(i, i, (tcp,)) for i in range(1000)), names=many)
