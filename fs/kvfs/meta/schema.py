"""Records and keys of the POSIX tree in the key-value store; knows no operation on them.

| key | value |
|---|---|
| S | `Super` |
| A | next inode number not yet handed to anyone, u64 |
| I ino | `Inode` |
| D parent hash name | dentry: ino u64, type u8 (mode >> 12), sequence u8 |
| X ino name | an extended attribute's value |
| O ino | `Orphan`: an inode with no name left, kept until its data is gone |
| T ino | `Trim`: data beyond the size still to be removed after a truncation |
| U shard | `Usage`: this shard's share of the counts for statfs |
| N tenant/name | `Namespace` |
| M | next namespace id, u32 |
| Q key | what `fsck` took out of the way because it could not be decoded |

Numbers in keys are big-endian. `hash` is 7 bytes of BLAKE2b of the name, keyed with the file system's secret. It
makes a directory entry's place (hash and sequence) a 63-bit number that never changes while the entry lives: the
readdir cookie. Entries of one directory with one hash have different sequence numbers, 3 to 127.
"""

from __future__ import annotations

import hashlib
import struct
from enum import StrEnum
from typing import Annotated, Final

import msgspec

SCHEMA_VERSION: Final = 1
ROOT_INO: Final = 1
FIRST_INO: Final = 16
MAX_NAME: Final = 255
MAX_SYMLINK: Final = 4095
MAX_SIZE: Final = (1 << 63) - 1
MAX_NLINK: Final = 1_000_000_000
MAX_XATTR_VALUE: Final = 65536
MAX_XATTR_LIST: Final = 65536
FIRST_SEQUENCE: Final = 3
LAST_SEQUENCE: Final = 127

U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=0x7FFFFFFFFFFFFFFF)]
I64 = Annotated[int, msgspec.Meta(ge=-0x8000000000000000, le=0x7FFFFFFFFFFFFFFF)]


class Super(msgspec.Struct, array_like=True, frozen=True):
    version: int
    uuid: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    name_key: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    created_ns: I64


class Inode(msgspec.Struct, array_like=True, gc=False):
    ino: U63
    mode: U16
    """Type and permission bits, as in stat."""
    nlink: U32
    uid: U32
    gid: U32
    size: U63
    rdev: U32
    atime: I64
    mtime: I64
    ctime: I64
    parent: U63 = 0
    """Of a directory; 0 for anything else."""
    target: bytes = b""
    """Of a symbolic link."""


class Orphan(msgspec.Struct, array_like=True, frozen=True):
    session: U63
    """The mount that removed the last name."""
    since_ns: I64


class Trim(msgspec.Struct, array_like=True, frozen=True):
    keep: U63
    upto: U63
    """Data in [keep, upto) must be gone before the file may grow again."""


class Usage(msgspec.Struct, array_like=True, frozen=True):
    files: I64
    bytes: I64
    """Counted modulo 2**64 (`wrap`): sizes of sparse files may add up to more, and are right again when these go."""


class NamespaceClass(StrEnum):
    CACHE = "cache"
    DURABLE = "durable"


class Namespace(msgspec.Struct, array_like=True, frozen=True):
    id: Annotated[int, msgspec.Meta(ge=1, le=0xFFFFFFFF)]
    cls: NamespaceClass
    created_ns: I64


class Dentry(msgspec.Struct, frozen=True, gc=False):
    parent: int
    name: bytes
    hash: bytes
    ino: int
    dtype: int
    sequence: int

    @property
    def cookie(self) -> int:
        return int.from_bytes(self.hash, "big") << 7 | self.sequence


encode: Final = msgspec.msgpack.Encoder().encode
decode_super: Final = msgspec.msgpack.Decoder(Super).decode
decode_inode: Final = msgspec.msgpack.Decoder(Inode).decode
decode_orphan: Final = msgspec.msgpack.Decoder(Orphan).decode
decode_trim: Final = msgspec.msgpack.Decoder(Trim).decode
decode_usage: Final = msgspec.msgpack.Decoder(Usage).decode
decode_namespace: Final = msgspec.msgpack.Decoder(Namespace).decode

SUPER_KEY: Final = b"S"
ALLOC_KEY: Final = b"A"
NAMESPACE_ID_KEY: Final = b"M"
HASH_BYTES: Final = 7
DENTRY_HEAD: Final = 1 + 8 + HASH_BYTES

_DENTRY = struct.Struct(">QBB")
_KEY = struct.Struct(">cQ")


def inode_key(ino: int) -> bytes:
    return _KEY.pack(b"I", ino)


def orphan_key(ino: int) -> bytes:
    return _KEY.pack(b"O", ino)


def trim_key(ino: int) -> bytes:
    return _KEY.pack(b"T", ino)


def xattr_key(ino: int, name: bytes = b"") -> bytes:
    return _KEY.pack(b"X", ino) + name


def wrap(count: int) -> int:
    """The signed 64-bit number that is equal to it modulo 2**64."""
    return ((count + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def usage_key(shard: int) -> bytes:
    return b"U" + bytes((shard,))


def namespace_key(tenant: str, name: str) -> bytes:
    return b"N" + tenant.encode() + b"/" + name.encode()


def directory_key(parent: int) -> bytes:
    return _KEY.pack(b"D", parent)


def key_ino(key: bytes) -> int:
    """The inode number in an I, O, T, X or D key."""
    return int.from_bytes(key[1:9], "big")


def name_hash(name_key: bytes, name: bytes) -> bytes:
    return hashlib.blake2b(name, digest_size=HASH_BYTES, key=name_key).digest()


def pack_dentry(ino: int, dtype: int, sequence: int) -> bytes:
    return _DENTRY.pack(ino, dtype, sequence)


def unpack_dentry(key: bytes, value: bytes) -> Dentry:
    """msgspec.ValidationError when the record cannot be one."""
    if len(value) != _DENTRY.size or len(key) <= DENTRY_HEAD:
        raise msgspec.ValidationError("no directory entry")
    numbers: tuple[int, int, int] = _DENTRY.unpack(value)
    ino, dtype, sequence = numbers
    return Dentry(key_ino(key), key[DENTRY_HEAD:], key[9:DENTRY_HEAD], ino, dtype, sequence)


def pack_u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


def unpack_u64(value: bytes) -> int:
    if len(value) != 8:
        raise msgspec.ValidationError("no 64-bit number")
    return int.from_bytes(value, "big")
