"""Semantics of the tree, one by one."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfs.meta import fsck, namespaces, schema
from kvfs.meta.errors import FsError
from kvfs.meta.kv import FormatError
from kvfs.meta.schema import ROOT_INO, Namespace, NamespaceClass, Trim
from kvfs.meta.sqlite import SqliteStore
from kvfs.meta.tree import RENAME_EXCHANGE, RENAME_NOREPLACE, XATTR_CREATE, XATTR_REPLACE, Cred, Tree


class Clock:
    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> int:
        self.now += 1
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(tmp_path / "meta.db") as store:
        yield store


@pytest.fixture
def tree(store: SqliteStore) -> Iterator[Tree]:
    tree = Tree(store, clock=Clock())
    yield tree
    assert fsck.check(store).findings == []


def fails(code: int, action: Callable[[], object]) -> None:
    with pytest.raises(FsError) as caught:
        action()
    assert caught.value.errno == code, caught.value


def test_create_lookup_persist(tree: Tree, store: SqliteStore, tmp_path: Path) -> None:
    made = tree.create(ROOT_INO, b"\xff\xfe", 0o640, 7, 8)
    assert (made.mode, made.nlink, made.uid, made.gid, made.size) == (stat.S_IFREG | 0o640, 1, 7, 8, 0)
    with SqliteStore(tmp_path / "meta.db") as other:
        again = Tree(other, create=False)
        assert again.lookup(ROOT_INO, b"\xff\xfe") == made
        assert again.super == tree.super
        assert again.create(ROOT_INO, b"x", 0o600, 0, 0).ino > made.ino
    fails(errno.EEXIST, lambda: tree.create(ROOT_INO, b"\xff\xfe", 0o640, 7, 8))
    fails(errno.ENOENT, lambda: tree.lookup(ROOT_INO, b"no"))
    fails(errno.ENOTDIR, lambda: tree.lookup(made.ino, b"no"))
    fails(errno.ENOTDIR, lambda: tree.create(made.ino, b"no", 0, 0, 0))
    fails(errno.ENOENT, lambda: tree.getattr(10**9))


def test_absent_tree_and_other_schema(store: SqliteStore) -> None:
    with pytest.raises(FormatError, match="no file system"):
        Tree(store, create=False)
    Tree(store)
    with store.transact() as txn:
        found = schema.decode_super(txn.get(schema.SUPER_KEY) or b"")
        other = schema.Super(2, found.uuid, found.name_key, found.created_ns)
        txn.put(schema.SUPER_KEY, schema.encode(other))
        txn.commit()
    with pytest.raises(FormatError, match="schema version 2; this kvfs reads version 1"):
        Tree(store)
    with pytest.raises(FormatError):
        fsck.check(store)


def test_names(tree: Tree) -> None:
    for name, code in (
        (b"", errno.ENOENT),
        (b"n" * 256, errno.ENAMETOOLONG),
        (b"a/b", errno.EINVAL),
        (b"\0", errno.EINVAL),
    ):
        fails(code, lambda name=name: tree.create(ROOT_INO, name, 0, 0, 0))
        fails(code, lambda name=name: tree.unlink(ROOT_INO, name))
    fails(errno.EEXIST, lambda: tree.mkdir(ROOT_INO, b".", 0, 0, 0))
    fails(errno.EINVAL, lambda: tree.rmdir(ROOT_INO, b"."))
    fails(errno.ENOTEMPTY, lambda: tree.rmdir(ROOT_INO, b".."))
    fails(errno.EBUSY, lambda: tree.rename(ROOT_INO, b".", ROOT_INO, b"x"))
    directory = tree.mkdir(ROOT_INO, b"n" * 255, 0o755, 0, 0)
    assert tree.lookup(directory.ino, b"..").ino == ROOT_INO
    assert tree.lookup(directory.ino, b".").ino == directory.ino
    assert tree.path(directory.ino) == b"/" + b"n" * 255


def test_times(tree: Tree) -> None:
    directory = tree.mkdir(ROOT_INO, b"d", 0o755, 0, 0)
    assert directory.atime == directory.mtime == directory.ctime
    made = tree.create(directory.ino, b"f", 0o644, 0, 0)
    after = tree.getattr(directory.ino)
    assert after.mtime == after.ctime == made.ctime > directory.mtime
    assert after.atime == directory.atime
    linked = tree.link(made.ino, directory.ino, b"g")
    assert linked.ctime > made.ctime
    assert linked.mtime == made.mtime
    chmod = tree.setattr(made.ino, mode=0o600)
    assert chmod.ctime > linked.ctime
    assert chmod.mtime == made.mtime
    grown = tree.setattr(made.ino, size=10)
    assert grown.mtime == grown.ctime > chmod.ctime
    wrote = tree.wrote(made.ino, 5)
    assert wrote.mtime == wrote.ctime > grown.ctime
    assert wrote.size == 10
    utimens = tree.setattr(made.ino, atime=-5, mtime=1)
    assert (utimens.atime, utimens.mtime) == (-5, 1)
    assert utimens.ctime > wrote.ctime
    moved = tree.rename(directory.ino, b"f", ROOT_INO, b"f").moved
    assert moved.ctime > utimens.ctime
    assert tree.getattr(directory.ino).mtime == tree.getattr(ROOT_INO).mtime == moved.ctime
    removed = tree.unlink(ROOT_INO, b"f")
    assert removed.ctime > moved.ctime
    assert tree.getattr(made.ino).nlink == 1


def test_setgid_directory(tree: Tree) -> None:
    parent = tree.mkdir(ROOT_INO, b"d", 0o2775, 0, 50).ino
    assert tree.create(parent, b"f", 0o644, 7, 8).gid == 50
    below = tree.mkdir(parent, b"e", 0o755, 7, 8)
    assert (below.gid, below.mode & 0o7777) == (50, 0o2755)
    assert tree.symlink(parent, b"s", b"t", 7, 8).gid == 50


def test_sticky_directory(tree: Tree) -> None:
    parent = tree.mkdir(ROOT_INO, b"tmp", 0o1777, 1, 1).ino
    tree.create(parent, b"f", 0o644, 7, 7)
    tree.create(parent, b"g", 0o644, 8, 8)
    stranger = Cred(8, 8)
    fails(errno.EPERM, lambda: tree.unlink(parent, b"f", cred=stranger))
    fails(errno.EPERM, lambda: tree.rename(parent, b"f", ROOT_INO, b"f", cred=stranger))
    fails(errno.EPERM, lambda: tree.rename(parent, b"g", parent, b"f", cred=stranger))
    tree.mkdir(parent, b"e", 0o755, 7, 7)
    fails(errno.EPERM, lambda: tree.rmdir(parent, b"e", cred=stranger))
    tree.rmdir(parent, b"e", cred=Cred(1, 1))
    tree.unlink(parent, b"f", cred=Cred(7, 7))
    tree.unlink(parent, b"g", cred=Cred(0, 0))


def test_chown_clears_set_id(tree: Tree) -> None:
    ino = tree.create(ROOT_INO, b"f", 0o6755, 0, 0).ino
    assert tree.setattr(ino, uid=5).mode & 0o7777 == 0o755
    tree.setattr(ino, mode=0o2644)
    assert tree.setattr(ino, gid=5).mode & 0o7777 == 0o2644  # mandatory locking mark, not set-id
    assert tree.setattr(ino, uid=6, mode=0o4700).mode & 0o7777 == 0o4700


def test_kinds(tree: Tree) -> None:
    device = tree.mknod(ROOT_INO, b"c", stat.S_IFCHR | 0o600, 0, 0, rdev=0x103)
    assert (device.rdev, stat.S_IFMT(device.mode)) == (0x103, stat.S_IFCHR)
    assert tree.mknod(ROOT_INO, b"p", stat.S_IFIFO | 0o600, 0, 0, rdev=9).rdev == 0
    assert stat.S_ISREG(tree.mknod(ROOT_INO, b"r", 0o600, 0, 0).mode)
    fails(errno.EINVAL, lambda: tree.mknod(ROOT_INO, b"x", 0o150000, 0, 0))
    link = tree.symlink(ROOT_INO, b"s", b"t" * 4095, 0, 0)
    assert tree.readlink(link.ino) == b"t" * 4095
    assert link.size == 4095
    assert link.mode == stat.S_IFLNK | 0o777
    fails(errno.ENAMETOOLONG, lambda: tree.symlink(ROOT_INO, b"x", b"t" * 4096, 0, 0))
    fails(errno.ENOENT, lambda: tree.symlink(ROOT_INO, b"x", b"", 0, 0))
    fails(errno.EINVAL, lambda: tree.readlink(device.ino))
    assert tree.unlink(ROOT_INO, b"p").nlink == 0
    assert tree.orphans() == []


def test_directory_links(tree: Tree) -> None:
    one = tree.mkdir(ROOT_INO, b"one", 0o755, 0, 0).ino
    two = tree.mkdir(ROOT_INO, b"two", 0o755, 0, 0).ino
    assert tree.getattr(ROOT_INO).nlink == 4
    tree.mkdir(one, b"d", 0o755, 0, 0)
    assert tree.getattr(one).nlink == 3
    tree.rename(one, b"d", two, b"d")
    assert (tree.getattr(one).nlink, tree.getattr(two).nlink) == (2, 3)
    fails(errno.ENOTEMPTY, lambda: tree.rmdir(ROOT_INO, b"two"))
    fails(errno.EPERM, lambda: tree.link(one, ROOT_INO, b"x"))
    fails(errno.EISDIR, lambda: tree.unlink(ROOT_INO, b"one"))
    assert tree.rmdir(two, b"d").nlink == 0
    tree.rmdir(ROOT_INO, b"two")
    assert tree.getattr(ROOT_INO).nlink == 3
    tree.create(ROOT_INO, b"f", 0o644, 0, 0)
    fails(errno.ENOTDIR, lambda: tree.rmdir(ROOT_INO, b"f"))


def test_removed_directory_that_is_open(tree: Tree) -> None:
    ino = tree.mkdir(ROOT_INO, b"d", 0o755, 0, 0).ino
    tree.rmdir(ROOT_INO, b"d", keep=lambda i: i == ino)
    assert tree.getattr(ino).nlink == 0
    assert tree.readdir(ino) == []
    fails(errno.ENOENT, lambda: tree.create(ino, b"f", 0o644, 0, 0))
    tree.create(ROOT_INO, b"f", 0o644, 0, 0)
    fails(errno.ENOENT, lambda: tree.rename(ROOT_INO, b"f", ino, b"f"))
    fails(errno.ENOENT, lambda: tree.link(tree.lookup(ROOT_INO, b"f").ino, ino, b"f"))
    tree.reclaim(ino)
    fails(errno.ENOENT, lambda: tree.getattr(ino))


def test_orphans(tree: Tree) -> None:
    ino = tree.create(ROOT_INO, b"f", 0o644, 0, 0).ino
    tree.wrote(ino, 100)
    tree.setxattr(ino, b"user.a", b"1")
    tree.link(ino, ROOT_INO, b"g")
    assert tree.unlink(ROOT_INO, b"f").nlink == 1
    assert tree.orphans() == []
    tree.reclaim(ino)
    assert tree.getattr(ino).nlink == 1
    assert tree.unlink(ROOT_INO, b"g").nlink == 0
    assert [(i, o.session) for i, o in tree.orphans()] == [(ino, tree.session)]
    assert tree.getattr(ino).size == 100
    tree.wrote(ino, 200)  # still open somewhere
    assert tree.getxattr(ino, b"user.a") == b"1"
    fails(errno.ENOENT, lambda: tree.link(ino, ROOT_INO, b"again"))
    assert tree.usage() == schema.Usage(2, 200)
    tree.reclaim(ino)
    tree.reclaim(ino)
    assert tree.orphans() == []
    assert tree.usage() == schema.Usage(1, 0)
    fails(errno.ENOENT, lambda: tree.getattr(ino))


def test_sizes_and_trims(tree: Tree) -> None:
    ino = tree.create(ROOT_INO, b"f", 0o644, 0, 0).ino
    tree.wrote(ino, 1000)
    assert tree.trims() == []
    tree.setattr(ino, size=600)
    tree.setattr(ino, size=100)
    assert tree.trims() == [(ino, Trim(100, 1000))]
    tree.trimmed(ino)
    assert tree.trims() == []
    tree.setattr(ino, size=50)
    tree.unlink(ROOT_INO, b"f")
    tree.reclaim(ino)
    assert tree.trims() == []
    fails(errno.EISDIR, lambda: tree.setattr(ROOT_INO, size=0))
    fails(errno.EINVAL, lambda: tree.wrote(ROOT_INO, 0))
    fifo = tree.mknod(ROOT_INO, b"p", stat.S_IFIFO, 0, 0).ino
    fails(errno.EINVAL, lambda: tree.setattr(fifo, size=0))
    big = tree.create(ROOT_INO, b"big", 0o644, 0, 0).ino
    assert tree.setattr(big, size=schema.MAX_SIZE).size == schema.MAX_SIZE
    fails(errno.EFBIG, lambda: tree.setattr(big, size=schema.MAX_SIZE + 1))
    fails(errno.EINVAL, lambda: tree.setattr(big, size=-1))


def test_rename_replaces(tree: Tree) -> None:
    one = tree.create(ROOT_INO, b"1", 0o644, 0, 0).ino
    two = tree.create(ROOT_INO, b"2", 0o644, 0, 0).ino
    done = tree.rename(ROOT_INO, b"1", ROOT_INO, b"2")
    assert (done.moved.ino, done.other and (done.other.ino, done.other.nlink)) == (one, (two, 0))
    assert [i for i, _ in tree.orphans()] == [two]
    fails(errno.ENOENT, lambda: tree.lookup(ROOT_INO, b"1"))
    tree.link(one, ROOT_INO, b"3")
    tree.rename(ROOT_INO, b"2", ROOT_INO, b"3")  # two names of one file: nothing happens
    assert tree.lookup(ROOT_INO, b"2").ino == tree.lookup(ROOT_INO, b"3").ino == one
    empty = tree.mkdir(ROOT_INO, b"e", 0o755, 0, 0).ino
    full = tree.mkdir(ROOT_INO, b"f", 0o755, 0, 0).ino
    tree.create(full, b"x", 0o644, 0, 0)
    fails(errno.ENOTDIR, lambda: tree.rename(ROOT_INO, b"e", ROOT_INO, b"2"))
    fails(errno.EISDIR, lambda: tree.rename(ROOT_INO, b"2", ROOT_INO, b"e"))
    fails(errno.ENOTEMPTY, lambda: tree.rename(ROOT_INO, b"e", ROOT_INO, b"f"))
    tree.rename(ROOT_INO, b"f", ROOT_INO, b"e")
    assert tree.lookup(ROOT_INO, b"e").ino == full
    fails(errno.ENOENT, lambda: tree.getattr(empty))
    assert tree.getattr(ROOT_INO).nlink == 3
    fails(errno.ENOENT, lambda: tree.rename(ROOT_INO, b"none", ROOT_INO, b"e"))


def test_rename_below_itself(tree: Tree) -> None:
    a = tree.mkdir(ROOT_INO, b"a", 0o755, 0, 0).ino
    b = tree.mkdir(a, b"b", 0o755, 0, 0).ino
    c = tree.mkdir(b, b"c", 0o755, 0, 0).ino
    fails(errno.EINVAL, lambda: tree.rename(ROOT_INO, b"a", c, b"x"))
    fails(errno.EINVAL, lambda: tree.rename(ROOT_INO, b"a", a, b"x"))
    fails(errno.EINVAL, lambda: tree.rename(ROOT_INO, b"a", b, b"c", RENAME_EXCHANGE))
    fails(errno.EINVAL, lambda: tree.rename(b, b"c", ROOT_INO, b"a", RENAME_EXCHANGE))
    fails(errno.ENOTEMPTY, lambda: tree.rename(b, b"c", ROOT_INO, b"a"))
    tree.rename(b, b"c", ROOT_INO, b"c")
    assert tree.getattr(c).parent == ROOT_INO


def test_rename_flags(tree: Tree) -> None:
    d = tree.mkdir(ROOT_INO, b"d", 0o755, 0, 0).ino
    e = tree.mkdir(d, b"e", 0o755, 0, 0).ino
    f = tree.create(ROOT_INO, b"f", 0o644, 0, 0).ino
    fails(errno.EEXIST, lambda: tree.rename(ROOT_INO, b"f", d, b"e", RENAME_NOREPLACE))
    fails(errno.ENOENT, lambda: tree.rename(ROOT_INO, b"f", d, b"none", RENAME_EXCHANGE))
    for flags in (3, 4, -1):
        fails(errno.EINVAL, lambda flags=flags: tree.rename(ROOT_INO, b"f", d, b"x", flags))
    tree.rename(ROOT_INO, b"f", d, b"e", RENAME_EXCHANGE)
    assert (tree.lookup(ROOT_INO, b"f").ino, tree.lookup(d, b"e").ino) == (e, f)
    assert tree.getattr(e).parent == ROOT_INO
    assert (tree.getattr(ROOT_INO).nlink, tree.getattr(d).nlink) == (4, 2)
    tree.rename(d, b"e", ROOT_INO, b"new", RENAME_NOREPLACE)
    assert tree.lookup(ROOT_INO, b"new").ino == f


def test_xattrs(tree: Tree) -> None:
    ino = tree.create(ROOT_INO, b"f", 0o644, 0, 0).ino
    before = tree.getattr(ino).ctime
    tree.setxattr(ino, b"user.b", b"")
    tree.setxattr(ino, b"user.a", b"\0" * schema.MAX_XATTR_VALUE, XATTR_CREATE)
    assert tree.getattr(ino).ctime > before
    assert tree.listxattr(ino) == [b"user.a", b"user.b"]
    fails(errno.EEXIST, lambda: tree.setxattr(ino, b"user.a", b"", XATTR_CREATE))
    fails(errno.ENODATA, lambda: tree.setxattr(ino, b"user.c", b"", XATTR_REPLACE))
    tree.setxattr(ino, b"user.a", b"x", XATTR_REPLACE)
    assert tree.getxattr(ino, b"user.a") == b"x"
    fails(errno.E2BIG, lambda: tree.setxattr(ino, b"user.a", b"\0" * (schema.MAX_XATTR_VALUE + 1)))
    fails(errno.ERANGE, lambda: tree.setxattr(ino, b"user." + b"n" * 251, b""))
    fails(errno.EOPNOTSUPP, lambda: tree.setxattr(ino, b"system.posix_acl_access", b""))
    fails(errno.EINVAL, lambda: tree.setxattr(ino, b"user.a", b"", 3))
    fails(errno.ENODATA, lambda: tree.getxattr(ino, b"user.c"))
    fails(errno.ENODATA, lambda: tree.removexattr(ino, b"user.c"))
    fails(errno.ENOENT, lambda: tree.listxattr(10**9))
    tree.removexattr(ino, b"user.a")
    assert tree.listxattr(ino) == [b"user.b"]
    room = (schema.MAX_XATTR_LIST - len(b"user.b") - 1) // 256
    for n in range(room):
        tree.setxattr(ino, b"user.%0250d" % n, b"")
    fails(errno.ENOSPC, lambda: tree.setxattr(ino, b"user.%0250d" % room, b""))
    assert sum(len(n) + 1 for n in tree.listxattr(ino)) <= schema.MAX_XATTR_LIST


def test_readdir(tree: Tree) -> None:
    names = {b"%d" % n for n in range(700)}
    for name in names:
        tree.create(ROOT_INO, name, 0o644, 0, 0)
    seen: list[bytes] = []
    cookie = 0
    while page := tree.readdir_plus(ROOT_INO, cookie, 64):
        assert all(entry.ino == inode.ino and entry.cookie > 2 for entry, inode in page)
        seen += [entry.name for entry, _ in page]
        cookie = page[-1][0].cookie
    assert len(seen) == 700
    assert set(seen) == names
    assert cookie < 1 << 63
    fails(errno.ENOTDIR, lambda: tree.readdir(tree.lookup(ROOT_INO, b"1").ino))


def test_hash_collisions_are_bounded(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def same(_: bytes, name: bytes) -> bytes:
            return b"\xff" * schema.HASH_BYTES

        patch.setattr(schema, "name_hash", same)
        for n in range(125):
            tree.create(ROOT_INO, b"%d" % n, 0o644, 0, 0)
        fails(errno.ENOSPC, lambda: tree.create(ROOT_INO, b"more", 0o644, 0, 0))
        tree.unlink(ROOT_INO, b"7")
        tree.create(ROOT_INO, b"more", 0o644, 0, 0)
        assert len(tree.readdir(ROOT_INO, 0, 1000)) == 125
        for n in range(125):
            if n != 7:
                tree.unlink(ROOT_INO, b"%d" % n)
        tree.unlink(ROOT_INO, b"more")


def test_two_trees_on_one_store(tree: Tree, tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "meta.db") as store:
        other = Tree(store)
        made = {t.create(ROOT_INO, b"%d" % n, 0o644, 0, 0).ino for n in range(50) for t in (tree,)}
        made |= {other.create(ROOT_INO, b"o%d" % n, 0o644, 0, 0).ino for n in range(50)}
        assert len(made) == 100
        fails(errno.EEXIST, lambda: tree.create(ROOT_INO, b"o1", 0o644, 0, 0))
        assert other.usage() == tree.usage() == schema.Usage(101, 0)


def test_damaged_record_is_eio(tree: Tree, store: SqliteStore) -> None:
    ino = tree.create(ROOT_INO, b"f", 0o644, 0, 0).ino
    with store.transact() as txn:
        old = txn.get(schema.inode_key(ino)) or b""
        txn.put(schema.inode_key(ino), b"\xc1")
        txn.commit()
    fails(errno.EIO, lambda: tree.getattr(ino))
    fails(errno.EIO, lambda: tree.unlink(ROOT_INO, b"f"))
    with store.transact() as txn:
        txn.delete(schema.inode_key(ino))
        txn.commit()
    fails(errno.EIO, lambda: tree.lookup(ROOT_INO, b"f"))
    with store.transact() as txn:
        txn.put(schema.inode_key(ino), old)
        txn.commit()


def test_namespaces(store: SqliteStore) -> None:
    first = namespaces.create(store, "t", "kv")
    assert (first.id, first.cls) == (namespaces.FIRST_ID, NamespaceClass.CACHE)
    assert namespaces.create(store, "t", "kv") == first
    second = namespaces.create(store, "t2", "kv", NamespaceClass.DURABLE)
    assert second.id == first.id + 1
    for again in (
        lambda: namespaces.create(store, "t", "kv", exist_ok=False),
        lambda: namespaces.create(store, "t", "kv", NamespaceClass.DURABLE),
    ):
        fails(errno.EEXIST, again)
    assert namespaces.get(store, "t2", "kv") == second
    assert namespaces.get(store, "t", "other") is None
    assert [(n.tenant, n.name, n.namespace) for n in namespaces.list_all(store)] == [
        ("t", "kv", first),
        ("t2", "kv", second),
    ]
    assert len(namespaces.list_all(store, "t")) == 1
    namespaces.remove(store, "t2", "kv")
    fails(errno.ENOENT, lambda: namespaces.remove(store, "t2", "kv"))
    third: Namespace = namespaces.create(store, "t2", "kv")
    assert third.id == second.id + 1
    for bad in ("", ".x", "-x", "a/b", "ä", "n" * 65, "a\n"):
        fails(errno.EINVAL, lambda bad=bad: namespaces.create(store, bad, "kv"))
        fails(errno.EINVAL, lambda bad=bad: namespaces.create(store, "t", bad))


WORKER = """
import sys
from kvfs.meta.errors import FsError
from kvfs.meta.sqlite import SqliteStore
from kvfs.meta.tree import Tree
tree = Tree(SqliteStore(sys.argv[1]), create=False)
won = 0
for n in range(150):
    try:
        tree.create(1, b"f%d" % n, 0o644, 0, 0)
        won += 1
    except FsError as error:
        assert error.errno == 17, error
print(won)
"""


@pytest.mark.timeout(60)
def test_processes_racing_for_names(tree: Tree, tmp_path: Path) -> None:
    """Every name is won exactly once, and the fixture's fsck finds the counts right."""
    package = Path(namespaces.__file__).parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "meta.db")],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(package)},
        )
        for _ in range(3)
    ]
    won = [int(worker.communicate(timeout=50)[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert sum(won) == 150
    assert tree.usage().files == 151


def test_find_tells_a_missing_name_from_a_missing_directory(tree: Tree) -> None:
    made = tree.mkdir(ROOT_INO, b"d", 0o755, 0, 0).ino
    assert tree.find(made, b"f") is None
    tree.create(made, b"f", 0o644, 0, 0)
    assert tree.find(made, b"f") == tree.lookup(made, b"f")
    tree.unlink(made, b"f")
    tree.rmdir(ROOT_INO, b"d")
    for look in (tree.find, tree.lookup):
        with pytest.raises(FsError) as raised:
            look(made, b"f")
        assert raised.value.errno == errno.ENOENT


def test_many_orphans_are_reclaimed_at_once(tree: Tree) -> None:
    before = tree.usage()
    inos = [tree.create(ROOT_INO, b"%d" % n, 0o644, 0, 0).ino for n in range(20)]
    for n in range(20):
        tree.unlink(ROOT_INO, b"%d" % n)
    tree.reclaim(inos[3])
    tree.reclaim_many(inos)
    assert tree.orphans() == []
    assert tree.usage() == before
    assert fsck.check(tree.store).findings == []
