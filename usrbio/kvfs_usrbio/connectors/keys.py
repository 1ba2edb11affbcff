"""Names of stored KV: an engine's own hash of a block, and a fingerprint of all that makes its bytes fit or not.

A block of one rank holds that rank's layers one after the other. It is stored in as many parts as the largest value of
kvfs asks for; every part of every rank has a key of its own, and a block is there if all of them are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

PART_MAX: Final = 16 << 20  # bytes of one value of kvfs
SAMPLES: Final = 16  # places of a weight file that are looked at
SAMPLE_BYTES: Final = 4096
WEIGHTS: Final = (".safetensors", ".bin", ".gguf", ".pt")
MAX_FILES: Final = 4096


def fingerprint(facts: Mapping[str, object]) -> bytes:
    """32 bytes that differ if any fact does. What JSON cannot say is taken by its text."""
    text = json.dumps(facts, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def weights(directory: Path) -> str:
    """A digest of a model's files: names, sizes, the configuration, and samples of the weights. Copies of a model are alike
    wherever they lie, and reading it all would take minutes; weights that differ nowhere in the samples are not told apart."""
    digest = hashlib.blake2b(digest_size=32)
    for path in sorted(directory.iterdir())[:MAX_FILES]:
        if not path.is_file() or not (path.name == "config.json" or path.suffix in WEIGHTS):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb", buffering=0) as file:
            # The first bytes name a safetensors file's tensors.
            places = [size * i // SAMPLES for i in range(SAMPLES)] if size > SAMPLES * SAMPLE_BYTES else [0]
            for place in places:
                file.seek(place)
                digest.update(file.read(SAMPLES * SAMPLE_BYTES if len(places) == 1 else SAMPLE_BYTES))
    return digest.hexdigest()


def model_facts(model: str, revision: str | None, commit: str | None) -> dict[str, str | None]:
    """Which weights: those of a local directory by what they are, those of a hub by name and commit."""
    if os.path.isdir(model):
        return {"weights": weights(Path(model))}
    return {"model": model, "revision": commit or revision}


def parts_of(layers: Sequence[int]) -> list[range]:
    """The fewest runs of nearly equally many layers (given by their bytes per block) of which each fits a value."""
    count = len(layers)
    for parts in range(1, count + 1):
        runs = [range(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
        if all(sum(layers[i] for i in run) <= PART_MAX for run in runs):
            return runs
    raise ValueError(f"one layer of a block has {max(layers)} bytes; a value of kvfs has at most {PART_MAX}")


class Keyring:
    """Keys of 32 bytes for the blocks of one model, as laid out by one kind of engine on `ranks` ranks."""

    def __init__(self, facts: bytes, ranks: int, parts: int, salt: bytes = b"") -> None:
        self.ranks = ranks
        self.parts = parts
        self._facts = facts
        self._prefixes = [
            [
                hashlib.blake2b(b"%d/%d %d/%d " % (rank, ranks, part, parts) + salt, key=facts).digest()
                for part in range(parts)
            ]
            for rank in range(ranks)
        ]

    def salted(self, salt: bytes) -> Keyring:
        """Other keys for the same blocks: what was stored under the old ones is not found any more."""
        return Keyring(self._facts, self.ranks, self.parts, salt)

    def of_rank(self, block: bytes, rank: int) -> list[bytes]:
        """One key per part."""
        return [hashlib.blake2b(block, digest_size=32, key=prefix).digest() for prefix in self._prefixes[rank]]

    def of_all(self, blocks: Sequence[bytes]) -> list[bytes]:
        """For each block the keys of all parts of all ranks."""
        return [key for block in blocks for rank in range(self.ranks) for key in self.of_rank(block, rank)]
