"""Names of requests' blocks, for programs that play requests whose beginnings are the same."""

from __future__ import annotations

import hashlib
import random

BRANCHES = 3  # that a prefix may go on with


def chain(rng: random.Random, longest: int) -> list[bytes]:
    """Each of 32 bytes, following from the one before and a choice; mostly the same one, so that requests share prefixes."""
    names: list[bytes] = []
    for _ in range(rng.randrange(1, longest + 1)):
        choice = 0 if rng.random() < 0.9 else rng.randrange(BRANCHES)
        names.append(hashlib.sha256((names[-1] if names else b"") + bytes([choice])).digest())
    return names
