"""Capabilities: bytes there and back, signatures, and what is refused."""

import os
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.cluster.capability import (
    MAX_GRANTS,
    Capability,
    CapabilityError,
    Grant,
    Kinds,
    Rights,
    SigningKey,
    key_files,
    name_rights,
    parse_rights,
    parse_token,
    read_public_key,
    read_signing_key,
    read_token,
    write_secret,
)
from kvfs.cluster.map import Class, Namespace

KEY = SigningKey(bytes(range(32)))
GRANTS = st.lists(
    st.builds(
        Grant,
        st.integers(1, 2**32 - 1),
        st.integers(1, 3).map(Kinds),
        st.integers(1, 15).map(Rights),
        st.booleans(),
    ),
    min_size=1,
    max_size=MAX_GRANTS,
    unique_by=lambda g: g.namespace,
)
TENANTS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,62}", fullmatch=True)


def token(grants: list[Grant] | None = None) -> Capability:
    return Capability.issue(
        KEY, "acme", grants or [Grant(16, Kinds.BLOCK, Rights.READ, True)], expires=int(time.time()) + 60
    )


@given(TENANTS, GRANTS, st.integers(0, 2**62), st.integers(1, 2**62 - 1))
def test_what_was_issued_is_read_and_verified(tenant: str, grants: list[Grant], start: int, length: int) -> None:
    made = Capability.issue(KEY, tenant, grants, not_before=start, expires=start + length)
    read = parse_token(made.text())
    assert read == made
    assert read.verify(KEY.verify_key)
    assert not read.verify(SigningKey(bytes(32)).verify_key)
    assert len(made.raw) <= 2048


@given(st.binary(max_size=2100))
def test_bytes_that_are_no_token_are_refused(raw: bytes) -> None:
    with pytest.raises(CapabilityError):
        Capability.decode(raw)


@given(st.data())
def test_a_changed_token_is_refused_or_not_verified(data: st.DataObject) -> None:
    raw = bytearray(token().raw)
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    try:
        read = Capability.decode(bytes(raw))
    except CapabilityError:
        return
    assert not read.verify(KEY.verify_key)


def test_rights_have_names() -> None:
    assert parse_rights("ro") == Rights.READ | Rights.LIST
    assert parse_rights("rw") == Rights.READ | Rights.WRITE | Rights.DELETE | Rights.LIST
    assert parse_rights("put") == Rights.READ | Rights.WRITE | Rights.LIST
    assert parse_rights("write+delete") == Rights.WRITE | Rights.DELETE
    for wrong in ("", "x", "Read", "read+", "read write"):
        with pytest.raises(CapabilityError):
            parse_rights(wrong)
    for number in range(1, 16):
        assert parse_rights(name_rights(Rights(number))) == Rights(number)


def test_grants_follow_the_class_of_the_namespace() -> None:
    volume = Grant.on(Namespace(16, "a", "b", Class.VOLUME), Rights.READ)
    assert volume.kinds == Kinds.BLOCK | Kinds.FILE
    assert not volume.cache
    assert Grant.on(Namespace(16, "a", "b", Class.CACHE), Rights.READ).cache
    assert Grant.on(Namespace(16, "a", "b", Class.DURABLE), Rights.READ) == Grant(16, Kinds.BLOCK, Rights.READ, False)


def test_what_cannot_be_issued() -> None:
    later = int(time.time()) + 60
    grant = Grant(16, Kinds.BLOCK, Rights.READ, True)
    with pytest.raises(CapabilityError, match="1 to 64"):
        Capability.issue(KEY, "acme", [], expires=later)
    with pytest.raises(CapabilityError, match="1 to 64"):
        Capability.issue(KEY, "acme", [Grant(i + 1, Kinds.BLOCK, Rights.READ, True) for i in range(65)], expires=later)
    with pytest.raises(CapabilityError, match="named twice"):
        Capability.issue(KEY, "acme", [grant, grant], expires=later)
    with pytest.raises(CapabilityError, match="before it begins"):
        Capability.issue(KEY, "acme", [grant], expires=5)
    with pytest.raises(CapabilityError, match="no tenant"):
        Capability.issue(KEY, "a" * 64, [grant], expires=later)


def test_files_of_keys_and_tokens(tmp_path: Path) -> None:
    secret, public = key_files(KEY)
    old = os.umask(0)
    try:
        write_secret(tmp_path / "k", secret)
    finally:
        os.umask(old)
    (tmp_path / "k.pub").write_text(public)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert read_signing_key(tmp_path / "k") == KEY
    assert read_public_key(tmp_path / "k.pub") == KEY.verify_key
    made = token()
    write_secret(tmp_path / "t", made.text())
    assert read_token(tmp_path / "t") == made
    with pytest.raises(CapabilityError, match="is there already"):
        write_secret(tmp_path / "t", made.text())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not a token"),
        ("kvfs-token-v1 !!!", "is damaged"),
        ("kvfs-token-v1", "0 bytes are no token"),
        (key_files(KEY)[0], "is not a token; it is a signing key"),
        (key_files(KEY)[1], "is not a token; it is a public key"),
    ],
)
def test_files_that_are_something_else_are_called_so(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(CapabilityError) as caught:
        read_token(tmp_path / "t")
    assert why in str(caught.value)
    with pytest.raises(CapabilityError, match="cannot be read"):
        read_token(tmp_path / "missing")
