"""Many clients of one server, and one client of many: all go on, and those that ask alike get alike.

What is compared was done in the same seconds by processes that share one CPU, so neither the machine's speed nor its other work
matters much: the kernel gives each of them the same."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
import xxhash
from servers import Cluster, cluster

from kvfs.cluster import file
from kvfs_usrbio import BlockStore

RUN_S = 3.0
RUNS = 4
FACTOR = 2.0  # between the most and the least of what clients or servers that are alike have done
KB64 = 64 << 10
MB1 = 1 << 20

# One thread for each of its lists of keys, all between the same two moments. Says how many gets each list had, and of which
# the last thread was the longest without any.
CLIENT = """
import json, os, sys, threading, time
from kvfs_usrbio import BlockStore

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
asked = json.loads(sys.argv[1])
store = BlockStore.open(asked["url"], token=asked["token"], timeout=asked["timeout"])
lists = [[bytes.fromhex(key) for key in keys] for keys in asked["lists"]]
size = asked["size"]
buffers = [store.alloc(len(keys) * size) for keys in lists]
done = [0] * len(lists)
errors = [0] * len(lists)
longest = [0.0] * len(lists)

def once(i):
    results = store.get_into(lists[i], buffers[i], size)
    assert all(r == size or r < 0 for r in results)
    return sum(r == size for r in results), sum(r < 0 for r in results)

def run(i, begin, end):
    time.sleep(max(0, begin - time.monotonic()))
    last = begin
    while True:
        good, bad = once(i)
        now = time.monotonic()
        if now >= end:
            break
        done[i] += good
        errors[i] += bad
        if good:
            longest[i] = max(longest[i], now - last)
            last = now
    longest[i] = max(longest[i], end - last)

for i in range(len(lists)):
    assert once(i) == (len(lists[i]), 0)
print("ready", flush=True)
begin, end = map(float, sys.stdin.readline().split())
threads = [threading.Thread(target=run, args=(i, begin, end)) for i in range(len(lists))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps({"done": done, "errors": errors, "longest": longest}), flush=True)
"""


@dataclass
class Client:
    """Asks for each list of keys again and again, beside the others."""

    lists: list[list[bytes]]
    size: int
    done: list[int] = field(default_factory=list[int])  # gets, of each list
    errors: list[int] = field(default_factory=list[int])
    longest: list[float] = field(default_factory=list[float])  # seconds without any

    def shares(self) -> list[int]:
        return self.done

    def add(self, done: list[int], errors: list[int], longest: list[float]) -> None:
        none = [0] * len(self.lists)
        self.done = [a + b for a, b in zip(self.done or none, done, strict=True)]
        self.errors = [a + b for a, b in zip(self.errors or none, errors, strict=True)]
        self.longest = [max(a, b) for a, b in zip(self.longest or none, longest, strict=True)]


@contextmanager
def started(made: Cluster, clients: Sequence[Client], timeout: float) -> Generator[list[subprocess.Popen[bytes]]]:
    token = made.token("cache:rw")
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for client in clients:
                asked = {
                    "url": made.url("cache"),
                    "token": str(token),
                    "timeout": timeout,
                    "size": client.size,
                    "lists": [[key.hex() for key in keys] for keys in client.lists],
                }
                command = [sys.executable, "-c", CLIENT, json.dumps(asked)]
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                processes.append(stack.enter_context(process))
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
            yield processes
        finally:
            for process in processes:
                process.kill()


def run(
    made: Cluster,
    clients: Sequence[Client],
    *,
    seconds: float = RUN_S,
    timeout: float = 30.0,
    stopped: int | None = None,
) -> None:
    """All clients at once. The server of number `stopped` hangs meanwhile."""
    with started(made, clients, timeout) as processes:
        begin = time.monotonic() + 0.2
        if stopped is not None:
            made.servers[stopped].signal(signal.SIGSTOP)
        try:
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(b"%f %f\n" % (begin, begin + seconds))
                process.stdin.flush()
            for client, process in zip(clients, processes, strict=True):
                assert process.stdout is not None
                said = json.loads(process.stdout.readline())
                client.add(said["done"], said["errors"], said["longest"])
        finally:
            if stopped is not None:
                made.servers[stopped].signal(signal.SIGCONT)


def fill(made: Cluster, keys: list[bytes], size: int) -> list[bytes]:
    with BlockStore.open(made.url("cache"), token=made.token("cache:rw")) as store:
        for at in range(0, len(keys), 16):
            part = keys[at : at + 16]
            assert store.put(part, [os.urandom(size) for _ in part]) == [1] * len(part)
    return keys


def at_each(made: Cluster, count: int) -> list[list[bytes]]:
    """New keys, `count` of each server's."""
    known = file.load_map(made.file)
    found = known.find("acme", "cache")
    assert found is not None
    out: list[list[bytes]] = [[] for _ in made.servers]
    while any(len(keys) < count for keys in out):
        key = os.urandom(32)
        chunk = struct.pack("<BBHI32s", 1, len(key), 0, found.id, key)
        slot = xxhash.xxh3_64_intdigest(chunk) & (len(known.slots) - 1)
        target = known.targets[known.slots[slot]]
        mine = out[next(i for i, s in enumerate(made.servers) if str(target.endpoints[0]) == s.url)]
        if len(mine) < count:
            mine.append(key)
    return out


@contextmanager
def servers(count: int) -> Generator[Cluster]:
    with cluster(count, more=f"cpus = [{min(os.sched_getaffinity(0))}]\n") as made:
        yield made


def alike(what: Sequence[float]) -> bool:
    return 0 < max(what) <= FACTOR * min(what)


def run_until_alike(made: Cluster, clients: Sequence[Client], *shares: Callable[[], Sequence[float]]) -> None:
    """Of what clients and servers have done in all. A machine with other work does not give each process the same at once; who is
    served less than others stays behind however long it takes."""
    for _ in range(RUNS):
        run(made, clients)
        if all(alike(share()) for share in shares):
            return
    pytest.fail(f"not alike: {[share() for share in shares]}")


@pytest.mark.parametrize(("batch", "size"), [(16, KB64), (64, 4096), (4, MB1)])
def test_alike_clients_of_one_server_get_alike(one: Cluster, batch: int, size: int) -> None:
    clients = [Client([fill(one, [os.urandom(32) for _ in range(batch)], size)], size) for _ in range(6)]
    before = one.servers[0].metric("kvfs_server_bytes_out_total")
    run_until_alike(one, clients, lambda: [client.done[0] for client in clients])
    assert one.servers[0].metric("kvfs_server_bytes_out_total") - before >= sum(c.done[0] for c in clients) * size
    assert not any(sum(client.errors) for client in clients)


def test_small_requests_are_not_kept_waiting_by_clients_that_ask_for_much(one: Cluster) -> None:
    greedy = [Client([fill(one, [os.urandom(32) for _ in range(24)], MB1)], MB1) for _ in range(3)]
    small = [Client([fill(one, [os.urandom(32)], 4096)], 4096) for _ in range(3)]
    run_until_alike(one, [*greedy, *small], lambda: [client.done[0] for client in greedy])
    rounds = max(client.done[0] / 24 for client in greedy)
    assert min(client.done[0] for client in small) > rounds, "one get takes no longer than 24 MiB of another client"


def test_one_client_gets_alike_from_all_servers() -> None:
    with servers(4) as made:
        for size in (KB64, MB1):
            client = Client([fill(made, keys, size) for keys in at_each(made, 12)], size)
            run_until_alike(made, [client], client.shares)
            assert not sum(client.errors)


def test_many_clients_of_many_servers_get_alike() -> None:
    with servers(3) as made:
        lists = [fill(made, keys, KB64) for keys in at_each(made, 8)]
        clients = [Client(lists, KB64) for _ in range(4)]
        before = [server.metric("kvfs_server_bytes_out_total") for server in made.servers]
        run_until_alike(
            made,
            clients,
            lambda: [sum(client.done) for client in clients],
            lambda: [s.metric("kvfs_server_bytes_out_total") - b for s, b in zip(made.servers, before, strict=True)],
        )
        assert all(min(client.done) > 0 for client in clients)


def test_a_server_that_hangs_does_not_hold_up_what_others_have() -> None:
    timeout = 8.0
    with servers(3) as made:
        lists = [fill(made, keys, MB1 // 2) for keys in at_each(made, 40)]
        client = Client([*lists, lists[0]], MB1 // 2)  # more than the client's window is asked of the one that hangs
        run(made, [client], seconds=timeout, timeout=timeout, stopped=0)
        assert client.done[0] == client.done[3] == 0
        assert alike(client.done[1:3]), client.done
        assert max(client.longest[1:3]) < timeout / 2, "what the others have does not wait until it is given up"
