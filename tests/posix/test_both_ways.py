"""The mount as the node serves it, and as pyfuse3 does alone: the same bytes either way; and what is special to the node."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import PYFUSE3_ALONE
from mount_process import Mounted, fails, mounting
from test_ring_coherence import RingClient

pytestmark = pytest.mark.timeout(60)

CAP_NET_ADMIN = 12
BLOCK = ".kvfs/blocks/acme/llama/ab/" + "ab" * 32


@pytest.fixture(params=["node", "pyfuse3"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mounted]:
    with mounting(tmp_path, {PYFUSE3_ALONE: "1" if request.param == "pyfuse3" else ""}) as mounted:
        yield mounted


def test_the_daemon_serves_in_the_way_it_is_told(served: Mounted, request: pytest.FixtureRequest) -> None:
    assert served.process is not None
    descriptors = Path(f"/proc/{served.process.pid}/fd")
    fuse = [fd for fd in descriptors.iterdir() if os.readlink(fd) == "/dev/fuse"]
    native = "node" in request.node.name
    assert len(fuse) == (3 if native else 1)  # one to serve, one to invalidate, one to answer directly


def test_writes_truncations_and_appends_match_a_model(served: Mounted) -> None:
    rng = random.Random(5)
    path = served.root / "f"
    model = bytearray()
    with path.open("w+b", buffering=0) as file, path.open("ab", buffering=0) as log:
        for step in range(120):
            off, size = rng.randrange(400_000), rng.choice([1, 4096, 70_001])
            match rng.randrange(4):
                case 0:
                    data = rng.randbytes(size)
                    assert os.pwrite(file.fileno(), data, off) == size
                    model = model.ljust(off, b"\0")
                    model[off : off + size] = data
                case 1:
                    data = rng.randbytes(size)
                    assert log.write(data) == size
                    model += data
                case 2 if step % 3 == 0:
                    os.ftruncate(file.fileno(), off)
                    model = model[:off].ljust(off, b"\0")
                case _:
                    assert os.pread(file.fileno(), size, off) == model[off : off + size], step
            assert os.fstat(file.fileno()).st_size == len(model), step
    assert path.read_bytes() == model
    assert served.stop() == 0
    served.start()
    assert path.read_bytes() == model


def test_direct_reads_and_writes(served: Mounted) -> None:
    path = served.root / "f"
    with mmap.mmap(-1, 1 << 20) as page:
        page[:] = random.Random(1).randbytes(len(page))
        want = page[:]
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        try:
            assert os.pwritev(fd, [page], 4096) == len(page)
            page[:] = bytes(len(page))
            assert os.preadv(fd, [page], 4096) == len(page)
            assert page[:] == want
            assert os.preadv(fd, [page], len(page)) == 4096
        finally:
            os.close(fd)
    assert path.read_bytes() == bytes(4096) + want


def test_mapped_pages(served: Mounted) -> None:
    path = served.root / "f"
    path.write_bytes(bytes(300_000))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[100_000:100_004] = b"abcd"
        memory.flush()
        assert os.pread(file.fileno(), 6, 99_999) == b"\0abcd\0"
        assert os.pwrite(file.fileno(), b"efgh", 200_000) == 4
        assert memory[200_000:200_004] == b"efgh"
        memory[299_999:300_000] = b"z"
    assert path.read_bytes()[-2:] == b"\0z"


def test_ring_and_mount_see_each_others_writes(served: Mounted) -> None:
    path = served.root / "f"
    ring = RingClient(served.data / "sock")
    try:
        with path.open("w+b", buffering=0) as file, path.open("rb") as reader:
            handle = ring.register(file.fileno())
            model = bytearray(400_000)
            os.ftruncate(file.fileno(), len(model))
            with mmap.mmap(reader.fileno(), 0, prot=mmap.PROT_READ) as memory:
                for i in range(60):
                    data, off = bytes([i + 1]) * 5000, i * 6000
                    if i % 2:
                        ring.write(handle, off, data)
                    else:
                        assert os.pwrite(file.fileno(), data, off) == len(data)
                    model[off : off + len(data)] = data
                    assert os.pread(file.fileno(), 7000, off) == model[off : off + 7000]
                    assert ring.read(handle, off, 7000) == model[off : off + 7000]
                    assert memory[off : off + 7000] == model[off : off + 7000]
    finally:
        ring.close()


def test_a_capability_is_seen_at_once(served: Mounted) -> None:
    """Writes ask for it; the node answers for files known to have none."""
    path = served.root / "f"
    with path.open("wb", buffering=0) as file:
        for _ in range(3):
            file.write(b"x")
        with pytest.raises(OSError, match="No data"):
            os.getxattr(path, "security.capability")
        value = bytes.fromhex("0000000200000000000000000000000000000000")
        try:
            os.setxattr(path, "security.capability", value)
        except PermissionError:
            pytest.skip("only root may set capabilities")
        assert os.getxattr(path, "security.capability") == value
        file.write(b"x")  # takes it
        with pytest.raises(OSError, match="No data"):
            os.getxattr(path, "security.capability")


def test_a_stop_keeps_every_write_that_was_answered(served: Mounted) -> None:
    """The node answers writes until the mount is gone, and their sizes are stored all the same."""
    paths = [served.root / f"f{i}" for i in range(3)]
    done = [0] * len(paths)
    begun = threading.Barrier(len(paths) + 1)

    def write(i: int) -> None:
        with contextlib.suppress(OSError), paths[i].open("wb", buffering=0) as file:
            while True:
                done[i] += file.write(b"w" * 1000)
                if done[i] == 1000:
                    begun.wait()

    writers = [threading.Thread(target=write, args=(i,)) for i in range(len(paths))]
    for writer in writers:
        writer.start()
    begun.wait()
    time.sleep(0.3)
    assert served.stop() == 0
    for writer in writers:
        writer.join()
    served.start()
    for i, path in enumerate(paths):
        content = path.read_bytes()
        assert len(content) >= done[i]
        assert content == b"w" * len(content)


def test_a_user_whose_sockets_have_little_room(tmp_path: Path) -> None:
    """Without CAP_NET_ADMIN net.core.wmem_max binds: the kernel is asked for smaller requests."""
    wrapper = ("setpriv", "--bounding-set=-net_admin") if os.geteuid() == 0 else ()
    if wrapper and shutil.which(wrapper[0]) is None:
        pytest.skip("no setpriv here")
    with mounting(tmp_path, wrapper=wrapper) as mounted:
        assert mounted.process is not None
        status = Path(f"/proc/{mounted.process.pid}/status").read_text()
        assert int(status.split("CapEff:")[1].split()[0], 16) >> CAP_NET_ADMIN & 1 == 0
        data = random.Random(2).randbytes(1 << 20)
        path = mounted.root / "f"
        with path.open("w+b", buffering=0) as file:
            assert file.write(data) == len(data)
            assert os.pread(file.fileno(), len(data), 0) == data
        block = mounted.root / BLOCK
        block.parent.parent.mkdir(parents=True)
        block.write_bytes(data)
        assert block.read_bytes() == data
        os.setxattr(path, "user.long", data[:60000])
        assert os.getxattr(path, "user.long") == data[:60000]


def test_a_kill_ends_the_mount_with_the_process(served: Mounted) -> None:
    """Nothing of the node's outlives it and keeps requests waiting."""
    for _ in range(5):
        fd = os.open(served.root / "f", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"x")
        served.kill()
        with fails(errno.ENOTCONN):
            os.write(fd, b"y")
        with fails(errno.ENOTCONN):
            os.close(fd)
        served.start()


def test_locks_are_the_kernels(served: Mounted) -> None:
    path = served.root / "f"
    with path.open("wb") as one, path.open("wb") as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError) as raised:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert raised.value.errno == errno.EAGAIN
