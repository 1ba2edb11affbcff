"""Checks a stopped data directory and, if told to, mends it: chunk store, metadata, and what one says about the other.

A chunk server's device is a store alone, and a volume's data directory is metadata alone: each is checked for itself. What a
server's chunks belong to is known elsewhere, so none of them counts as unowned.

Metadata first: what it knows decides which chunks belong to nobody. A repair drops what is proven unsound or unowned and
nothing else; while the metadata itself is damaged beyond what can be read, no chunk counts as unowned.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any, Final

import msgspec

from kvfs._node import ffi, lib
from kvfs.cluster import volume
from kvfs.daemon import Layout
from kvfs.meta import fsck as tree
from kvfs.meta import namespaces, schema
from kvfs.meta.kv import MAX_RANGE, DamagedError, FormatError, StoreError, Txn, prefix_end, read
from kvfs.meta.sqlite import SqliteStore

FILE_CHUNK: Final = 64 << 10
ERR_BYTES: Final = 512
POLL_S: Final = 0.1


class FsckError(Exception):
    """The check cannot be done; str() is one sentence that says why."""


class Exit(IntEnum):
    """As fsck(8)."""

    CLEAN = 0
    CORRECTED = 1
    LEFT = 4
    OPERATIONAL = 8
    USAGE = 16


class Part(StrEnum):
    DATABASE = "database"
    TREE = "tree"
    STORE = "store"


class Chunk(IntEnum):
    """The problems of native/store/check_store.h."""

    SUPER_DAMAGED = 1
    PAGE_DAMAGED = 2
    GROUP_DAMAGED = 3
    RECORD_IMPOSSIBLE = 4
    SLOT_TWICE = 5
    PIECE_MISSING = 6
    PIECE_STRAY = 7
    DATA_DAMAGED = 8
    INODE_UNKNOWN = 9
    BEYOND_SIZE = 10
    NAMESPACE_UNKNOWN = 11


TEXT: Final = {
    Chunk.SUPER_DAMAGED: "superblock copy damaged",
    Chunk.PAGE_DAMAGED: "checkpoint page damaged: its records are lost",
    Chunk.GROUP_DAMAGED: "journal damaged: the last changes it recorded are lost",
    Chunk.RECORD_IMPOSSIBLE: "impossible record",
    Chunk.SLOT_TWICE: "space claimed by two chunks, or that is no slot",
    Chunk.PIECE_MISSING: "block incomplete",
    Chunk.PIECE_STRAY: "piece without its block",
    Chunk.DATA_DAMAGED: "data does not match its checksum",
    Chunk.INODE_UNKNOWN: "data of a file that does not exist",
    Chunk.BEYOND_SIZE: "data beyond the end of its file",
    Chunk.NAMESPACE_UNKNOWN: "block of a namespace that does not exist",
}
UNOWNED: Final = (Chunk.INODE_UNKNOWN, Chunk.BEYOND_SIZE, Chunk.NAMESPACE_UNKNOWN)
LEFT_BY_A_CRASH: Final = (Chunk.INODE_UNKNOWN, Chunk.BEYOND_SIZE)
"""Bytes are stored before the names and sizes that lead to them; the next start drops those without."""


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    part: Part
    text: str
    mended: bool
    path: str | None = None
    """Of a file whose data is concerned, below the mount point; bytes `begin` to `end` of it are (to be) dropped and
    then read as zeros, unless they were unowned."""
    begin: int | None = None
    end: int | None = None
    block: str | None = None
    """TENANT/NAMESPACE KEY of a block that is (to be) dropped."""

    def __str__(self) -> str:
        where = f"{self.path}: bytes {self.begin} to {self.end}: " if self.path is not None else ""
        where += f"{self.block}: " if self.block is not None else ""
        return f"{self.part.value}: {where}{self.text}{' (mended)' if self.mended else ''}"


class FsckReport(msgspec.Struct):
    """What `kvfs fsck --json` prints."""

    directory: str
    exit_code: int = 0
    closed_properly: bool = True
    chunks: int = 0
    blocks: int = 0
    file_chunks: int = 0
    data_bytes: int = 0
    verified_bytes: int = 0
    salvaged_blocks: int = 0
    inodes: int = 0
    orphans_compared: bool = True
    unfinished_chunks: int = 0
    """Left by a crash: data that no name or size leads to yet. No problem: the next start drops it, and so does a repair."""
    found: int = 0
    """All problems, also those not listed one by one."""
    left: int = 0
    """Those that are still there."""
    problems: list[Problem] = []


Progress = Callable[[int, int], None]
"""Called with bytes verified and bytes to verify."""


@dataclass(slots=True)
class _Known:
    """What the metadata knows."""

    complete: bool = False
    files: dict[int, int] = field(default_factory=dict[int, int])
    names: dict[int, str] = field(default_factory=dict[int, str])


@contextmanager
def _locked(layout: Layout) -> Generator[None]:
    """No daemon may start meanwhile, and none may run."""
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FsckError(f"{layout.root} is in use: stop it with `kvfs down --dir {layout.root}`") from None
        yield
    finally:
        os.close(fd)


def fsck(directory: Path, *, data: bool = False, repair: bool = False, progress: Progress | None = None) -> FsckReport:
    """Checks everything in `directory`, or the store that it is itself; FsckError if that cannot be done at all."""
    layout = Layout(directory.absolute())
    if layout.root.is_file() or layout.root.is_block_device():
        return _store_alone(layout.root, data=data, repair=repair, progress=progress)
    alone = not layout.store.exists() and (layout.root / volume.NOTE).exists()
    if not layout.store.exists() and not alone:
        raise FsckError(f"{layout.root} is not a kvfs data directory: there is no {layout.store.name} in it")
    if not os.access(layout.root, os.W_OK) or not (alone or os.access(layout.store, os.W_OK)):
        raise FsckError(f"{layout.root} is read-only, or not yours: fsck has to lock it")
    report = FsckReport(str(layout.root))
    try:
        with _locked(layout):
            known = _metadata(layout, report, repair)
            if alone:
                report.orphans_compared = False
            else:
                _store(layout.store, layout.metadata, report, known, data=data, repair=repair, progress=progress)
    except FormatError as e:
        raise FsckError(str(e).rstrip(".")) from e
    except OSError as e:
        raise FsckError(f"{layout.root}: {e.strerror or e}") from e
    return _graded(report)


def _graded(report: FsckReport) -> FsckReport:
    report.exit_code = Exit.LEFT if report.left else Exit.CORRECTED if report.found else Exit.CLEAN
    return report


def _store_alone(store: Path, *, data: bool, repair: bool, progress: Progress | None) -> FsckReport:
    """Of a chunk server. The native check holds the device's lock, so no server runs meanwhile."""
    if not os.access(store, os.W_OK):
        raise FsckError(f"{store} is read-only, or not yours: fsck has to lock it")
    report = FsckReport(str(store))
    _store(store, None, report, _Known(), data=data, repair=repair, progress=progress)
    return _graded(report)


def _add(report: FsckReport, problem: Problem) -> None:
    report.found += 1
    report.left += not problem.mended
    report.problems.append(problem)


# ---- metadata


def _metadata(layout: Layout, report: FsckReport, repair: bool) -> _Known:
    known = _Known()
    if not layout.metadata.exists():
        _add(report, Problem(Part.DATABASE, f"{layout.metadata.name} is missing", False))
        return known
    try:
        with SqliteStore(layout.metadata, create=False) as store:
            damage = store.verify()
            for text in damage:
                _add(report, Problem(Part.DATABASE, text, False))
            if damage:
                return known  # what it says cannot be trusted, and mending would build on it
            if repair:
                done = tree.repair(store)
                mended, left = done.mended, done.left
            else:
                mended, left = [], tree.check(store).findings
            for finding in mended:
                _add(report, Problem(Part.TREE, str(finding), True))
            for finding in left:
                _add(report, Problem(Part.TREE, str(finding), False))
            checked = tree.check(store)
            report.inodes = checked.inodes
            read(store, lambda txn: _learn(txn, known, checked))
            if known.complete:
                known.names = {n.namespace.id: f"{n.tenant}/{n.name}" for n in namespaces.list_all(store)}
    except DamagedError as e:
        _add(report, Problem(Part.DATABASE, str(e), False))
        return _Known()
    except FormatError:
        raise
    except StoreError as e:
        raise FsckError(str(e).rstrip(".")) from e
    return known


def _learn(txn: Txn, known: _Known, checked: tree.Checked) -> None:
    """Sizes of files, with what a truncation under way has still to remove; everything of what cannot be decoded."""
    known.files = dict(checked.files)
    known.complete = True
    for prefix in (b"T", b"Q"):
        begin = prefix
        while rows := txn.range(begin, prefix_end(prefix), MAX_RANGE):
            for key, value in rows:
                if key[:1] == b"T" and len(key) == 9:
                    ino = schema.key_ino(key)
                    try:
                        upto = schema.decode_trim(value).upto
                    except msgspec.MsgspecError:
                        upto = schema.MAX_SIZE
                    known.files[ino] = max(known.files.get(ino, 0), upto)
                elif key[:2] == b"QI":
                    known.files[schema.key_ino(key[1:])] = schema.MAX_SIZE
                elif key[:2] == b"QN":
                    known.complete = False
            begin = rows[-1][0] + b"\0"
    for finding in checked.findings:
        if finding.kind is tree.Kind.RECORD and finding.key[:1] == b"I":
            known.files[finding.ino] = schema.MAX_SIZE
        elif finding.kind is tree.Kind.RECORD and finding.key[:1] == b"N":
            known.complete = False


def _paths(metadata: Path | None, wanted: set[int]) -> dict[int, str]:
    """A path of each of these inodes; read only when there is something to say about one."""
    up: dict[int, tuple[int, bytes]] = {}

    def scan(txn: Txn) -> None:
        begin = b"D"
        while rows := txn.range(begin, prefix_end(b"D"), MAX_RANGE):
            for key, value in rows:
                try:
                    entry = schema.unpack_dentry(key, value)
                except msgspec.MsgspecError:
                    continue
                up.setdefault(entry.ino, (entry.parent, entry.name))
            begin = rows[-1][0] + b"\0"

    if wanted and metadata is not None and metadata.exists():
        try:
            with SqliteStore(metadata, create=False) as store:
                read(store, scan)
        except StoreError:
            up.clear()
    out: dict[int, str] = {}
    for ino in wanted:
        names: list[bytes] = []
        at = ino
        while at in up and at != schema.ROOT_INO and len(names) < 4096:
            at, name = up[at]
            names.append(name)
        whole = at == schema.ROOT_INO and bool(names)
        out[ino] = "/" + os.fsdecode(b"/".join(reversed(names))) if whole else f"(inode {ino})"
    return out


# ---- the store


@dataclass(frozen=True, slots=True)
class _Found:
    problem: Chunk
    length: int
    where: int
    kind: int
    key_len: int
    ns: int
    id: bytes


@dataclass(slots=True)
class _Checked:
    counts: list[int]
    """By Chunk, of all problems."""
    findings: list[_Found]
    report: Any
    """Numbers of kvfs_check_report."""


def _native(store: Path, known: _Known, *, data: bool, repair: bool, progress: Progress | None) -> _Checked:
    ids = sorted(known.names)
    files = sorted(known.files.items())
    data_path = ffi.new("char[]", os.fsencode(store))
    ns_ids = ffi.new("uint32_t[]", ids)
    inos = ffi.new("uint64_t[]", [ino for ino, _ in files])
    sizes = ffi.new("uint64_t[]", [size for _, size in files])
    config = ffi.new(
        "struct kvfs_check_config*",
        {
            "data_path": data_path,
            "data": data,
            "repair": repair,
            "orphans": known.complete,
            "namespaces": len(ids),
            "ns_ids": ns_ids,
            "files": len(files),
            "inos": inos,
            "sizes": sizes,
        },
    )
    shared = ffi.new("struct kvfs_check_progress*")
    out = ffi.new("struct kvfs_check_report*")
    err = ffi.new("char[]", ERR_BYTES)
    result: list[int] = []
    # A thread of its own, so that this one can show progress and be interrupted.
    worker = threading.Thread(target=lambda: result.append(lib.kvfs_check(config, shared, out, err, ERR_BYTES)))
    worker.start()
    try:
        while worker.is_alive():
            worker.join(POLL_S)
            if progress is not None and shared.total:
                progress(shared.done, shared.total)
    except BaseException:
        shared.cancel = 1
        worker.join()
        raise
    if result[0] < 0:
        raise OSError(-result[0], ffi.string(err).decode(errors="replace"))
    try:
        found = (
            [
                _Found(Chunk(f.problem), f.length, f.where, f.kind, f.key_len, f.ns, bytes(ffi.buffer(f.id)))
                for f in ffi.unpack(out.finding, out.findings)
            ]
            if out.findings
            else []
        )
        return _Checked([int(n) for n in out.counts], found, out[0])
    finally:
        lib.kvfs_check_free(out)


def _store(
    store: Path,
    metadata: Path | None,
    report: FsckReport,
    known: _Known,
    *,
    data: bool,
    repair: bool,
    progress: Progress | None,
) -> None:
    report.orphans_compared = known.complete
    try:
        done = _native(store, known, data=data, repair=repair, progress=progress)
    except OSError as e:
        if e.errno != errno.EUCLEAN:
            raise FsckError(f"{store}: {e.strerror}") from e
        _add(report, Problem(Part.STORE, e.strerror or "damaged", False))
        return
    left = 0
    if done.report.repaired:
        left = sum(_native(store, known, data=False, repair=False, progress=None).counts)
    mended = bool(done.report.repaired) and left == 0
    if not done.report.closed:
        report.unfinished_chunks = sum(done.counts[kind] for kind in LEFT_BY_A_CRASH)
        for kind in LEFT_BY_A_CRASH:
            done.counts[kind] = 0
        done.findings = [f for f in done.findings if f.problem not in LEFT_BY_A_CRASH]
    unlisted = sum(done.counts) - len(done.findings)
    report.found += unlisted
    report.left += 0 if mended else unlisted
    inos = {int.from_bytes(f.id[:8], "little") for f in done.findings if f.kind == 2 and f.length}
    paths = _paths(metadata, inos)
    for found in done.findings:
        _add(report, _describe(found, known, paths, mended))
    report.closed_properly = bool(done.report.closed)
    report.chunks = done.report.chunks
    report.blocks = done.report.block_chunks
    report.file_chunks = done.report.file_chunks
    report.data_bytes = done.report.data_bytes
    report.verified_bytes = done.report.verified_bytes
    report.salvaged_blocks = done.report.salvaged


def _describe(found: _Found, known: _Known, paths: dict[int, str], mended: bool) -> Problem:
    text = TEXT[found.problem]
    match found.problem:
        case Chunk.SUPER_DAMAGED:
            return Problem(Part.STORE, f"{text} (copy {found.where})", mended)
        case Chunk.PAGE_DAMAGED:
            return Problem(Part.STORE, f"{text} (page {found.where})", mended)
        case Chunk.GROUP_DAMAGED:
            return Problem(Part.STORE, f"{text} ({found.length} from group {found.where})", mended)
        case Chunk.RECORD_IMPOSSIBLE:
            return Problem(Part.STORE, f"{text} (in {found.where})", mended)
        case _:
            pass
    if found.kind == 2:
        ino, chunk = (int.from_bytes(found.id[i : i + 8], "little") for i in (0, 8))
        begin = chunk * FILE_CHUNK
        path = paths[ino] if found.ns == 0 else f"(inode {ino} of volume {found.ns})"
        return Problem(Part.STORE, text, mended, path=path, begin=begin, end=begin + found.length)
    name = known.names.get(found.ns, f"(namespace {found.ns})")
    return Problem(Part.STORE, text, mended, block=f"{name} {found.id[: min(found.key_len, 32)].hex()}")
