"""Each invariant broken on purpose: found by its name, mended, and everything sound left as it was."""

from __future__ import annotations

import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfs.meta import fsck, kv, namespaces, schema
from kvfs.meta.fsck import LOST_FOUND, Kind
from kvfs.meta.kv import Txn
from kvfs.meta.schema import ROOT_INO, Orphan, Trim, Usage
from kvfs.meta.sqlite import SqliteStore
from kvfs.meta.tree import Tree

Break = Callable[["Scene", Txn], None]


class Scene:
    """/a/b/c, /a/f (also /g), /s -> x, an orphan, a pending truncation, an attribute, two namespaces."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        tree = self.tree = Tree(store)
        self.a = tree.mkdir(ROOT_INO, b"a", 0o755, 0, 0).ino
        self.b = tree.mkdir(self.a, b"b", 0o755, 0, 0).ino
        self.c = tree.mkdir(self.b, b"c", 0o755, 0, 0).ino
        self.f = tree.create(self.a, b"f", 0o644, 0, 0).ino
        tree.link(self.f, ROOT_INO, b"g")
        tree.wrote(self.f, 1000)
        tree.setattr(self.f, size=10)
        tree.setxattr(self.f, b"user.x", b"1")
        tree.symlink(ROOT_INO, b"s", b"x", 0, 0)
        self.o = tree.create(ROOT_INO, b"o", 0o644, 0, 0).ino
        tree.unlink(ROOT_INO, b"o")
        namespaces.create(store, "t", "one")
        namespaces.create(store, "t", "two")

    def entry(self, parent: int, name: bytes) -> bytes:
        return schema.directory_key(parent) + schema.name_hash(self.tree.super.name_key, name) + name

    def inode(self, txn: Txn, ino: int, **changes: int) -> None:
        inode = schema.decode_inode(txn.get(schema.inode_key(ino)) or b"")
        for field, value in changes.items():
            setattr(inode, field, value)
        txn.put(schema.inode_key(ino), schema.encode(inode))

    def dump(self) -> dict[bytes, bytes]:
        return dict(kv.read(self.store, lambda t: t.range(b"", b"\xff", 10_000)))


def move_entry(s: Scene, t: Txn) -> None:
    key = s.entry(s.a, b"f")
    value = t.get(key) or b""
    t.delete(key)
    t.put(schema.directory_key(s.a) + b"\0" * 7 + b"f", value)


def cycle(s: Scene, t: Txn) -> None:
    """a's only name is now inside c."""
    t.delete(s.entry(ROOT_INO, b"a"))
    t.put(s.entry(s.c, b"a"), schema.pack_dentry(s.a, stat.S_IFDIR >> 12, 3))
    s.inode(t, s.a, parent=s.c)
    s.inode(t, s.c, nlink=3)
    s.inode(t, ROOT_INO, nlink=2)


def twice(s: Scene, t: Txn) -> None:
    t.put(s.entry(ROOT_INO, b"b2"), schema.pack_dentry(s.b, stat.S_IFDIR >> 12, 3))
    s.inode(t, ROOT_INO, nlink=4)


def orphan_dir(s: Scene, t: Txn) -> None:
    t.delete(s.entry(ROOT_INO, b"a"))
    s.inode(t, s.a, nlink=0)
    s.inode(t, ROOT_INO, nlink=2)
    t.put(schema.orphan_key(s.a), schema.encode(Orphan(0, 0)))


def same_id(s: Scene, t: Txn) -> None:
    t.put(schema.namespace_key("t", "two"), t.get(schema.namespace_key("t", "one")) or b"")


BREAKS: list[tuple[str, Kind, Break]] = [
    ("no super", Kind.SUPER, lambda s, t: t.delete(schema.SUPER_KEY)),
    ("bad super", Kind.SUPER, lambda s, t: t.put(schema.SUPER_KEY, b"\xc1")),
    ("no root", Kind.ROOT, lambda s, t: t.delete(schema.inode_key(ROOT_INO))),
    ("root is a file", Kind.ROOT, lambda s, t: s.inode(t, ROOT_INO, mode=stat.S_IFREG | 0o644)),
    ("bad root", Kind.ROOT, lambda s, t: t.put(schema.inode_key(ROOT_INO), b"")),
    ("bad inode", Kind.RECORD, lambda s, t: t.put(schema.inode_key(s.f), b"\x93\1\2\3")),
    ("bad directory inode", Kind.RECORD, lambda s, t: t.put(schema.inode_key(s.a), b"\x80")),
    ("foreign inode", Kind.RECORD, lambda s, t: t.put(schema.inode_key(s.f), t.get(schema.inode_key(s.a)) or b"")),
    ("bad entry", Kind.RECORD, lambda s, t: t.put(s.entry(s.a, b"f"), b"?")),
    ("bad orphan", Kind.RECORD, lambda s, t: t.put(schema.orphan_key(s.o), b"?")),
    ("bad trim", Kind.RECORD, lambda s, t: t.put(schema.trim_key(s.f), b"?")),
    ("bad usage", Kind.RECORD, lambda s, t: t.put(schema.usage_key(0), b"?")),
    ("bad namespace", Kind.RECORD, lambda s, t: t.put(schema.namespace_key("t", "one"), b"?")),
    ("unknown key", Kind.KEY, lambda s, t: t.put(b"Zzz", b"?")),
    ("unknown low key", Kind.KEY, lambda s, t: t.put(b"\0", b"?")),
    ("long single key", Kind.KEY, lambda s, t: t.put(b"Axx", b"?")),
    ("dangling", Kind.ENTRY_DANGLING, lambda s, t: t.delete(schema.inode_key(s.f))),
    ("stray", Kind.ENTRY_STRAY, lambda s, t: t.put(s.entry(s.f, b"x"), schema.pack_dentry(s.f, 8, 3))),
    ("bad name", Kind.ENTRY_NAME, lambda s, t: t.put(s.entry(s.a, b"x/y"), schema.pack_dentry(s.f, 8, 3))),
    ("wrong hash", Kind.ENTRY_PLACE, move_entry),
    ("wrong sequence", Kind.ENTRY_PLACE, lambda s, t: t.put(s.entry(s.a, b"f"), schema.pack_dentry(s.f, 8, 0))),
    ("wrong type", Kind.ENTRY_TYPE, lambda s, t: t.put(s.entry(s.a, b"f"), schema.pack_dentry(s.f, 4, 3))),
    ("directory twice", Kind.DIRECTORY_TWICE, twice),
    (
        "root has a name",
        Kind.DIRECTORY_TWICE,
        lambda s, t: t.put(s.entry(s.c, b"r"), schema.pack_dentry(ROOT_INO, 4, 3)),
    ),
    ("wrong parent", Kind.DIRECTORY_PARENT, lambda s, t: s.inode(t, s.c, parent=s.a)),
    ("cycle", Kind.CYCLE, cycle),
    ("lost file", Kind.LOST, lambda s, t: (t.delete(s.entry(s.a, b"f")), t.delete(s.entry(ROOT_INO, b"g")))[0]),
    ("lost directory", Kind.LOST, lambda s, t: t.delete(s.entry(ROOT_INO, b"a"))),
    ("file nlink", Kind.NLINK, lambda s, t: s.inode(t, s.f, nlink=9)),
    ("directory nlink", Kind.NLINK, lambda s, t: s.inode(t, s.a, nlink=2)),
    ("root nlink", Kind.NLINK, lambda s, t: s.inode(t, ROOT_INO, nlink=7)),
    ("orphan nlink", Kind.NLINK, lambda s, t: s.inode(t, s.o, nlink=1)),
    (
        "orphan in use",
        Kind.ORPHAN_LINKED,
        lambda s, t: t.put(schema.orphan_key(s.f), schema.encode(Orphan(0, 0))),
    ),
    ("orphan directory not empty", Kind.ORPHAN_LINKED, orphan_dir),
    ("unlisted orphan", Kind.ORPHAN_UNLISTED, lambda s, t: t.delete(schema.orphan_key(s.o))),
    ("empty orphan", Kind.ORPHAN_EMPTY, lambda s, t: t.delete(schema.inode_key(s.o))),
    ("stray attribute", Kind.XATTR_STRAY, lambda s, t: t.put(schema.xattr_key(999, b"user.x"), b"1")),
    ("stray trim", Kind.TRIM_STRAY, lambda s, t: t.put(schema.trim_key(s.a), schema.encode(Trim(0, 1)))),
    ("inode counter", Kind.COUNTER, lambda s, t: t.put(schema.ALLOC_KEY, schema.pack_u64(17))),
    ("no inode counter", Kind.COUNTER, lambda s, t: t.delete(schema.ALLOC_KEY)),
    ("namespace counter", Kind.COUNTER, lambda s, t: t.put(schema.NAMESPACE_ID_KEY, schema.pack_u64(16))),
    ("usage", Kind.USAGE, lambda s, t: t.put(schema.usage_key(3), schema.encode(Usage(5, 5)))),
    ("namespace id", Kind.NAMESPACE, same_id),
]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with SqliteStore(tmp_path / "meta.db") as store:
        yield Scene(store)


def test_sound_tree_is_left_alone(scene: Scene) -> None:
    before = scene.dump()
    checked = fsck.check(scene.store)
    assert checked.findings == []
    assert (checked.inodes, checked.entries) == (7, 6)
    assert checked.files == {scene.f: 10, scene.o: 0}
    assert fsck.repair(scene.store) == fsck.Repaired([], [])
    assert scene.dump() == before


@pytest.mark.parametrize(("kind", "damage"), [pytest.param(k, b, id=n) for n, k, b in BREAKS])
def test_each_damage(scene: Scene, kind: Kind, damage: Break) -> None:
    sound = scene.dump()
    kv.run(scene.store, lambda t: damage(scene, t))
    damaged = scene.dump()
    touched = {k for k in sound.keys() | damaged.keys() if sound.get(k) != damaged.get(k)}
    found = fsck.check(scene.store).findings
    assert kind in {f.kind for f in found}, found
    assert all(str(f) for f in found)
    assert scene.dump() == damaged  # checking changes nothing
    done = fsck.repair(scene.store)
    assert done.left == []
    assert kind in {f.kind for f in done.mended}
    assert fsck.check(scene.store).findings == []
    tree = Tree(scene.store, create=False)
    mended = scene.dump()
    if not touched & {schema.SUPER_KEY, schema.inode_key(scene.f)}:
        assert tree.getattr(scene.f).size == 10  # nothing readable is thrown away
        assert mended[schema.xattr_key(scene.f, b"user.x")] == b"1"
    if kind is Kind.LOST or kind is Kind.CYCLE:
        lost = tree.lookup(ROOT_INO, LOST_FOUND).ino
        assert [e.name for e in tree.readdir(lost)] in ([b"#%d" % i] for i in (scene.a, scene.b, scene.c, scene.f))
    made = tree.create(ROOT_INO, b"after", 0o644, 0, 0)
    assert schema.inode_key(made.ino) not in mended


def test_every_kind_is_covered() -> None:
    assert {kind for _, kind, _ in BREAKS} == set(Kind)


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_always_mended(scene: Scene, seed: int) -> None:
    """Records deleted, swapped and overwritten at random: no crash, and the repaired tree is sound and usable."""
    rng = random.Random(seed)
    keys = list(scene.dump())

    def damage(txn: Txn) -> None:
        for _ in range(rng.randint(1, 6)):
            key = rng.choice(keys)
            match rng.randrange(4):
                case 0:
                    txn.delete(key)
                case 1:
                    txn.put(key, rng.randbytes(rng.randrange(20)))
                case 2:
                    txn.put(key, txn.get(rng.choice(keys)) or b"")
                case _:
                    value = bytearray(txn.get(key) or b"\0")
                    value[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
                    txn.put(key, bytes(value))

    kv.run(scene.store, damage)
    try:
        assert fsck.repair(scene.store).left == []
    except kv.FormatError:
        return  # the damage made it another schema version
    tree = Tree(scene.store, create=False)
    tree.create(tree.mkdir(ROOT_INO, b"fresh", 0o755, 0, 0).ino, b"f", 0o644, 0, 0)
    assert fsck.check(scene.store).findings == []
