"""Capabilities: what a client may do with which namespaces until when, signed with Ed25519 by whoever issues them.

A chunk server knows the public key and checks each request by what the capability says; no one needs to be asked.

| bytes, little-endian | |
|---|---|
| 4 | "KVCP" |
| u16 | version, 1 |
| u16 | grants |
| u64, u64 | valid from, and until before: seconds since 1970 |
| 16 | serial number, random |
| 64 | tenant, NUL-terminated |
| 8 for each grant | u32 namespace id (2^32 - 1: all), u8 kinds, u8 rights, u8 flags, u8 0 |
| 64 | Ed25519 signature of all before it |

Keys and tokens are kept as files of one line: a word that says what it is, and base64.
"""

from __future__ import annotations

import base64
import binascii
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Final

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from kvfs.cluster.map import Class, MapError, Namespace, unpad

_MAGIC: Final = b"KVCP"
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<4sHHQQ16s64s")
_GRANT: Final = struct.Struct("<IBBBB")
_SIGNATURE: Final = 64
MAX_BYTES: Final = 2048
MAX_GRANTS: Final = 64
ANY_NAMESPACE: Final = 0xFFFFFFFF
MAX_TIME: Final = (1 << 63) - 1
_FILE_BYTES: Final = 8192
SIGNING_KEY: Final = "kvfs-signing-key-v1"
PUBLIC_KEY: Final = "kvfs-public-key-v1"
TOKEN: Final = "kvfs-token-v1"


class CapabilityError(ValueError):
    """No usable key or capability; str() is one sentence that says why."""


class Kinds(IntFlag):
    BLOCK = 1
    FILE = 2


class Rights(IntFlag):
    READ = 1
    WRITE = 2
    DELETE = 4
    LIST = 8


RIGHTS: Final = {
    "ro": Rights.READ | Rights.LIST,
    "rw": Rights.READ | Rights.WRITE | Rights.DELETE | Rights.LIST,
    "put": Rights.READ | Rights.WRITE | Rights.LIST,
}
"""The names that `kvfs token issue` knows; others are written read+write+delete+list."""
CACHE: Final = 1  # flag of a grant: blocks put by it may be evicted


def parse_rights(text: str) -> Rights:
    if text in RIGHTS:
        return RIGHTS[text]
    rights = Rights(0)
    for word in text.split("+"):
        if word.upper() not in Rights.__members__ or not word.islower():
            raise CapabilityError(f"{text!r}: rights are {', '.join(RIGHTS)}, or some of read+write+delete+list")
        rights |= Rights[word.upper()]
    return rights


def name_rights(rights: Rights) -> str:
    named = next((name for name, value in RIGHTS.items() if value == rights), None)
    return named or "+".join(str(right.name).lower() for right in Rights if right in rights)


@dataclass(frozen=True, slots=True)
class Grant:
    namespace: int
    kinds: Kinds
    rights: Rights
    cache: bool

    @classmethod
    def on(cls, namespace: Namespace, rights: Rights) -> Grant:
        """A volume's namespace has files, and the block that says whose they are."""
        kinds = Kinds.BLOCK | Kinds.FILE if namespace.cls is Class.VOLUME else Kinds.BLOCK
        return cls(namespace.id, kinds, rights, namespace.cls is Class.CACHE)


@dataclass(frozen=True, slots=True)
class Capability:
    tenant: str
    grants: tuple[Grant, ...]
    not_before: int
    expires: int
    serial: bytes
    raw: bytes
    """As it goes to servers, signature included."""

    @classmethod
    def issue(
        cls, key: SigningKey, tenant: str, grants: Sequence[Grant], *, expires: int, not_before: int | None = None
    ) -> Capability:
        """A minute's grace where the servers' clocks are behind ours."""
        start = int(time.time()) - 60 if not_before is None else not_before
        if not 1 <= len(grants) <= MAX_GRANTS:
            raise CapabilityError(f"{len(grants)} namespaces: a token is for 1 to {MAX_GRANTS}")
        if len({g.namespace for g in grants}) != len(grants):
            raise CapabilityError("a namespace is named twice")
        name = tenant.encode()
        if not 1 <= len(name) <= 63 or not tenant.isascii():
            raise CapabilityError(f"{tenant[:80]!r} is no tenant's name")
        if not 0 <= start < expires <= MAX_TIME:
            raise CapabilityError("it would end before it begins")
        serial = os.urandom(16)
        body = _HEAD.pack(_MAGIC, _VERSION, len(grants), start, expires, serial, name)
        for g in grants:
            body += _GRANT.pack(g.namespace, g.kinds, g.rights, CACHE if g.cache else 0, 0)
        return cls(tenant, tuple(grants), start, expires, serial, body + key.sign(body).signature)

    @classmethod
    def decode(cls, raw: bytes) -> Capability:
        """What it says; who signed it, `verify` says."""
        if not _HEAD.size + _GRANT.size + _SIGNATURE <= len(raw) <= MAX_BYTES:
            raise CapabilityError(f"{len(raw)} bytes are no token")
        magic, version, count, start, expires, serial, tenant = _HEAD.unpack_from(raw)
        if magic != _MAGIC:
            raise CapabilityError("this is no token")
        if version != _VERSION:
            raise CapabilityError(f"the token has version {version}; this kvfs knows {_VERSION}")
        if not 1 <= count <= MAX_GRANTS or len(raw) != _HEAD.size + count * _GRANT.size + _SIGNATURE:
            raise CapabilityError("the token's length and its count of namespaces do not agree")
        if expires <= start:
            raise CapabilityError("the token ends before it begins")
        grants: list[Grant] = []
        for i in range(count):
            namespace, kinds, rights, flags, reserved = _GRANT.unpack_from(raw, _HEAD.size + i * _GRANT.size)
            if not namespace or not kinds or not rights or kinds & ~3 or rights & ~15 or flags & ~CACHE or reserved:
                raise CapabilityError("the token grants something that this kvfs does not know")
            grants.append(Grant(namespace, Kinds(kinds), Rights(rights), bool(flags & CACHE)))
        try:
            name = unpad(tenant)
        except MapError as e:
            raise CapabilityError(f"the token's tenant: {e}") from None
        return cls(name, tuple(grants), start, expires, serial, raw)

    def verify(self, key: VerifyKey) -> bool:
        try:
            key.verify(self.raw[:-_SIGNATURE], self.raw[-_SIGNATURE:])
        except BadSignatureError:
            return False
        return True

    def names(self, namespace: int) -> bool:
        """Whether it gives any right to it."""
        return any(g.namespace in (namespace, ANY_NAMESPACE) for g in self.grants)

    def text(self) -> str:
        """One line, as the file has it."""
        return _line(TOKEN, self.raw)


def _line(word: str, raw: bytes) -> str:
    return f"{word} {base64.b64encode(raw).decode()}\n"


def _unline(word: str, text: str, what: str) -> bytes:
    found, _, rest = text.strip().partition(" ")
    if found != word:
        kinds = {SIGNING_KEY: "a signing key", PUBLIC_KEY: "a public key", TOKEN: "a token"}
        held = f"; it is {kinds[found]}" if found in kinds else ""
        raise CapabilityError(f"{what} is not {kinds[word]}{held}")
    try:
        return base64.b64decode(rest, validate=True)
    except binascii.Error:
        raise CapabilityError(f"{what} is damaged") from None


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_FILE_BYTES).decode("ascii", errors="replace")
    except OSError as e:
        raise CapabilityError(f"{path} cannot be read: {e.strerror}") from e


def read_signing_key(path: Path) -> SigningKey:
    raw = _unline(SIGNING_KEY, _read(path), str(path))
    if len(raw) != 32:
        raise CapabilityError(f"{path} is damaged")
    return SigningKey(raw)


def read_public_key(path: Path) -> VerifyKey:
    raw = _unline(PUBLIC_KEY, _read(path), str(path))
    if len(raw) != 32:
        raise CapabilityError(f"{path} is damaged")
    return VerifyKey(raw)


def read_token(path: Path) -> Capability:
    return parse_token(_read(path), str(path))


def parse_token(text: str, what: str = "the text") -> Capability:
    return Capability.decode(_unline(TOKEN, text, what))


def key_files(key: SigningKey) -> tuple[str, str]:
    """The text of the signing key's file and of the public key's."""
    return _line(SIGNING_KEY, bytes(key)), _line(PUBLIC_KEY, bytes(key.verify_key))


def write_secret(path: Path, text: str) -> None:
    """A new file that only its owner can read."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_EXCL
    try:
        with os.fdopen(os.open(path, flags, 0o600), "w") as file:
            file.write(text)
    except FileExistsError:
        raise CapabilityError(f"{path} is there already") from None
    except OSError as e:
        raise CapabilityError(f"{path} cannot be written: {e.strerror}") from e
