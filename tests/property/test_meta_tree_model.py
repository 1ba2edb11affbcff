"""The tree against a real directory: the same operations give the same errno and the same tree; readdir under change."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvfs.meta import fsck, schema
from kvfs.meta.errors import FsError
from kvfs.meta.schema import ROOT_INO, Inode
from kvfs.meta.sqlite import SqliteStore
from kvfs.meta.tree import RENAME_EXCHANGE, RENAME_NOREPLACE, Tree

LIBC = ctypes.CDLL(None, use_errno=True)
FAST_DIR = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
UID, GID = os.getuid(), os.getgid()

Path_ = list[bytes]
NAMES = st.sampled_from([b"a", b"b", b"\xff\x01"])
PATHS = st.lists(NAMES, min_size=1, max_size=4)
MODES = st.sampled_from([0o644, 0o755, 0o2775, 0o1777, 0o4711, 0])


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    if LIBC.renameat2(old_dir, old, new_dir, new, flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class TreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.umask = os.umask(0)
        self.directory = tempfile.TemporaryDirectory()
        self.real = tempfile.TemporaryDirectory(dir=FAST_DIR)
        os.chmod(self.real.name, 0o755)
        self.root = os.open(self.real.name, os.O_DIRECTORY)
        self.store = SqliteStore(Path(self.directory.name) / "meta.db")
        self.tree = Tree(self.store, root_uid=UID, root_gid=GID)
        self.open: list[tuple[int, int]] = []

    def teardown(self) -> None:
        os.umask(self.umask)
        for fd, _ in self.open:
            os.close(fd)
        os.close(self.root)
        self.store.close()
        self.real.cleanup()
        self.directory.cleanup()

    def same(self, real: Callable[[], object], ours: Callable[[], object]) -> bool:
        codes: list[int] = []
        for action in (real, ours):
            try:
                action()
                codes.append(0)
            except OSError as error:
                codes.append(error.errno or 0)
        assert codes[0] == codes[1], [errno.errorcode.get(c, c) for c in codes]
        return codes[0] == 0

    def at(self, path: Path_) -> tuple[int, bytes]:
        """Ours: the parent's inode number and the last name."""
        ino = ROOT_INO
        for name in path[:-1]:
            inode = self.tree.lookup(ino, name)
            if not stat.S_ISDIR(inode.mode):
                raise FsError(errno.ENOTDIR)
            ino = inode.ino
        return ino, path[-1]

    def find(self, path: Path_) -> Inode:
        return self.tree.lookup(*self.at(path))

    def real_at(self, path: Path_, do: Callable[[int, bytes], object]) -> object:
        fd = os.dup(self.root)
        try:
            for name in path[:-1]:
                below = os.open(name, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_RDONLY, dir_fd=fd)
                os.close(fd)
                fd = below
            return do(fd, path[-1])
        finally:
            os.close(fd)

    def real_open(self, fd: int, name: bytes) -> int:
        return os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)

    @rule(path=PATHS, mode=MODES)
    def create(self, path: Path_, mode: int) -> None:
        self.same(
            lambda: self.real_at(path, lambda fd, name: os.mknod(name, mode | stat.S_IFREG, dir_fd=fd)),
            lambda: self.tree.create(*self.at(path), mode, UID, GID),
        )

    @rule(path=PATHS, mode=MODES)
    def mkdir(self, path: Path_, mode: int) -> None:
        def real(fd: int, name: bytes) -> None:
            os.mkdir(name, mode & 0o1777, dir_fd=fd)

        self.same(lambda: self.real_at(path, real), lambda: self.tree.mkdir(*self.at(path), mode & 0o1777, UID, GID))

    @rule(path=PATHS)
    def mkfifo(self, path: Path_) -> None:
        self.same(
            lambda: self.real_at(path, lambda fd, name: os.mkfifo(name, 0o600, dir_fd=fd)),
            lambda: self.tree.mknod(*self.at(path), stat.S_IFIFO | 0o600, UID, GID),
        )

    @rule(path=PATHS, points_to=st.sampled_from([b"x", b"../a", b"t" * 300]))
    def symlink(self, path: Path_, points_to: bytes) -> None:
        self.same(
            lambda: self.real_at(path, lambda fd, name: os.symlink(points_to, name, dir_fd=fd)),
            lambda: self.tree.symlink(*self.at(path), points_to, UID, GID),
        )

    @rule(old=PATHS, new=PATHS)
    def link(self, old: Path_, new: Path_) -> None:
        def real(fd: int, name: bytes) -> None:
            self.real_at(
                new, lambda to, other: os.link(name, other, src_dir_fd=fd, dst_dir_fd=to, follow_symlinks=False)
            )

        # Which of several errors comes first is the kernel's business, not the file system's.
        try:
            inode, (parent, name) = self.find(old), self.at(new)
        except FsError:
            return
        self.same(lambda: self.real_at(old, real), lambda: self.tree.link(inode.ino, parent, name))

    @rule(path=PATHS)
    def unlink(self, path: Path_) -> None:
        self.same(
            lambda: self.real_at(path, lambda fd, name: os.unlink(name, dir_fd=fd)),
            lambda: self.tree.unlink(*self.at(path)),
        )

    @rule(path=PATHS)
    def open_and_unlink(self, path: Path_) -> None:
        try:
            parent, name = self.at(path)
            inode = self.tree.lookup(parent, name)
        except FsError:
            return
        if not stat.S_ISREG(inode.mode) or len(self.open) > 3:
            return
        fd = self.real_at(path, self.real_open)
        assert isinstance(fd, int)
        self.open.append((fd, inode.ino))
        self.real_at(path, lambda fd, name: os.unlink(name, dir_fd=fd))
        self.tree.unlink(parent, name)

    @rule()
    def close_all(self) -> None:
        for fd, ino in self.open:
            os.close(fd)
            if self.tree.getattr(ino).nlink == 0:
                self.tree.reclaim(ino)
        self.open = list[tuple[int, int]]()

    @rule(path=PATHS)
    def rmdir(self, path: Path_) -> None:
        self.same(
            lambda: self.real_at(path, lambda fd, name: os.rmdir(name, dir_fd=fd)),
            lambda: self.tree.rmdir(*self.at(path)),
        )

    @rule(old=PATHS, new=PATHS, flags=st.sampled_from([0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE]))
    def rename(self, old: Path_, new: Path_, flags: int) -> None:
        try:
            self.at(old)
            self.at(new)
        except FsError:
            return
        self.same(
            lambda: self.real_at(
                old, lambda fd, name: self.real_at(new, lambda to, other: renameat2(fd, name, to, other, flags))
            ),
            lambda: self.tree.rename(*self.at(old), *self.at(new), flags),
        )

    @rule(path=PATHS, mode=MODES)
    def chmod(self, path: Path_, mode: int) -> None:
        try:
            inode = self.find(path)
        except FsError:
            return
        if not stat.S_ISLNK(inode.mode):
            self.same(
                lambda: self.real_at(path, lambda fd, name: os.chmod(name, mode, dir_fd=fd)),
                lambda: self.tree.setattr(inode.ino, mode=mode),
            )

    @rule(path=PATHS, gid=st.integers(0, 2))
    def chgrp(self, path: Path_, gid: int) -> None:
        try:
            inode = self.find(path)
        except FsError:
            return
        if UID == 0 and not stat.S_ISLNK(inode.mode):
            self.same(
                lambda: self.real_at(path, lambda fd, name: os.chown(name, -1, gid, dir_fd=fd)),
                lambda: self.tree.setattr(inode.ino, gid=gid),
            )

    @rule(path=PATHS, size=st.sampled_from([0, 1, 5000, 1 << 33]))
    def truncate(self, path: Path_, size: int) -> None:
        try:
            inode = self.find(path)
        except FsError:
            return
        if stat.S_ISREG(inode.mode) and not inode.mode & 0o6000:

            def real(fd: int, name: bytes) -> None:
                file = self.real_open(fd, name)
                try:
                    os.ftruncate(file, size)
                finally:
                    os.close(file)

            if UID == 0 or inode.mode & 0o600 == 0o600:
                self.same(lambda: self.real_at(path, real), lambda: self.tree.setattr(inode.ino, size=size))

    @rule(path=PATHS, times=st.tuples(st.integers(0, 10**18), st.integers(0, 10**18)))
    def utimens(self, path: Path_, times: tuple[int, int]) -> None:
        try:
            inode = self.find(path)
        except FsError:
            return
        self.real_at(path, lambda fd, name: os.utime(name, ns=times, dir_fd=fd, follow_symlinks=False))
        self.tree.setattr(inode.ino, atime=times[0], mtime=times[1])
        found = self.tree.getattr(inode.ino)
        assert (found.atime, found.mtime) == times

    @invariant()
    def same_tree(self) -> None:
        pairs: dict[int, int] = {}

        def compare(ino: int, fd: int) -> None:
            names = {e.name: e for e in self.tree.readdir(ino)}
            assert sorted(names) == sorted(os.fsencode(n) for n in os.listdir(fd))
            for name, entry in names.items():
                inode = self.tree.getattr(entry.ino)
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
                assert (inode.mode, inode.nlink, inode.uid, inode.gid) == (
                    found.st_mode,
                    found.st_nlink,
                    found.st_uid,
                    found.st_gid,
                )
                assert pairs.setdefault(found.st_ino, inode.ino) == inode.ino
                if stat.S_ISDIR(inode.mode):
                    below = os.open(name, os.O_DIRECTORY, dir_fd=fd)
                    try:
                        compare(inode.ino, below)
                    finally:
                        os.close(below)
                else:
                    assert inode.size == found.st_size
                    if stat.S_ISLNK(inode.mode):
                        assert self.tree.readlink(inode.ino) == os.readlink(name, dir_fd=fd)

        compare(ROOT_INO, self.root)
        assert self.tree.getattr(ROOT_INO).nlink == os.fstat(self.root).st_nlink
        for fd, ino in self.open:
            assert self.tree.getattr(ino).nlink == os.fstat(fd).st_nlink
            assert self.tree.getattr(ino).size == os.fstat(fd).st_size
        assert fsck.check(self.store).findings == []


@pytest.mark.skipif(UID != 0, reason="modes without any permission need root to walk through")
@pytest.mark.timeout(300)
def test_tree_like_a_real_directory() -> None:
    run_state_machine_as_test(  # pyright: ignore[reportUnknownMemberType]
        TreeMachine,
        settings=settings(
            max_examples=int(os.environ.get("KVFS_EXAMPLES", "50")),
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        ),
    )


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    kept=st.sets(st.integers(0, 400), max_size=60),
    steps=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.tuples(st.booleans(), st.integers(500, 520)), max_size=6)), min_size=1
    ),
    buckets=st.sampled_from([1, 3, 1000]),
)
def test_readdir_under_change(
    kept: set[int], steps: list[tuple[int, list[tuple[bool, int]]]], buckets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that stay are returned exactly once, with few hash values too, whatever happens to the others."""

    def few(_: bytes, name: bytes) -> bytes:
        return (int(name) * 7919 % buckets).to_bytes(schema.HASH_BYTES, "big")

    with monkeypatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(schema, "name_hash", few)
        with SqliteStore(Path(directory) / "meta.db") as store:
            tree = Tree(store)
            for n in kept:
                tree.create(ROOT_INO, b"%d" % n, 0o644, 0, 0)
            seen: list[int] = []
            cookie = 0
            turn = 0
            while True:
                limit, changes = steps[turn % len(steps)]
                turn += 1
                page = tree.readdir(ROOT_INO, cookie, limit)
                if not page:
                    break
                assert len(page) <= limit
                seen += [int(e.name) for e in page]
                cookie = page[-1].cookie
                for add, n in changes if turn < 200 else []:
                    try:
                        if add:
                            tree.create(ROOT_INO, b"%d" % n, 0o644, 0, 0)
                        else:
                            tree.reclaim(tree.unlink(ROOT_INO, b"%d" % n).ino)
                    except FsError:
                        pass
            assert sorted(n for n in seen if n < 500) == sorted(kept)
            assert len({e.cookie for e in tree.readdir(ROOT_INO, 0, 4096)}) == len(tree.readdir(ROOT_INO, 0, 4096))
