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
from typing import Any, Final, cast

PART_MAX: Final = 16 << 20  # bytes of one value of kvfs
SAMPLES: Final = 64  # places of a weight file that are looked at
SAMPLE_BYTES: Final = 4096
TENSOR_BYTES: Final = 256  # of each tensor, from its middle
MAX_TENSORS: Final = 8192  # of a model; of one with more, so many evenly spread ones
MAX_HEADER: Final = 64 << 20
CONFIGURATION: Final = ("config.json", "params.json", "quantize_config.json", "hf_quant_config.json")
WEIGHTS: Final = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
MAX_FILES: Final = 4096


def fingerprint(facts: Mapping[str, object]) -> bytes:
    """32 bytes that differ if any fact does. What JSON cannot say is taken by its text."""
    text = json.dumps(facts, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def weights(path: Path) -> str:
    """A digest of a model's file, or of its directory: names, sizes, the configuration, and samples of the weights. Copies of
    a model are alike wherever they lie, and reading it all would take minutes. Of a safetensors file a piece of every tensor
    is looked at, since a model that was trained further may differ in few of them; weights that differ nowhere in the samples
    are not told apart."""
    digest = hashlib.blake2b(digest_size=32)
    if path.is_file():
        _sample(path, MAX_TENSORS, digest)
        return digest.hexdigest()
    found = [one for one in sorted(path.iterdir()) if one.name in CONFIGURATION or one.suffix in WEIGHTS]
    found = [one for one in found[:MAX_FILES] if one.is_file()]
    for one in found:
        digest.update(f"{one.name}\0".encode())
        _sample(one, max(MAX_TENSORS // len(found), 1), digest)
    return digest.hexdigest()


def _sample(path: Path, tensors: int, digest: Any) -> None:
    size = path.stat().st_size
    digest.update(f"{size}\0".encode())
    with path.open("rb", buffering=0) as file:
        header = file.read(8)
        length = int.from_bytes(header, "little")
        places: list[int] | None = None
        if path.suffix == ".safetensors" and length <= min(size, MAX_HEADER):
            text = file.read(length)
            digest.update(text)
            places = _middles(text, 8 + length)
        if places is not None:
            every = -(-len(places) // tensors) or 1
            samples, sample = places[::every], TENSOR_BYTES
        elif size > SAMPLES * SAMPLE_BYTES:
            samples, sample = [size * i // SAMPLES for i in range(SAMPLES)], SAMPLE_BYTES
        else:
            samples, sample = [0], size
        for place in samples:
            file.seek(place)
            digest.update(file.read(sample))


def _middles(header: bytes, start: int) -> list[int] | None:
    """Where to look into each tensor of a safetensors file; None if this is no header of one."""
    try:
        tensors = json.loads(header)
        spans = sorted(tuple(one["data_offsets"]) for name, one in tensors.items() if name != "__metadata__")
        return [start + max(first, (first + end - TENSOR_BYTES) // 2) for first, end in spans]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def model_facts(model: str, revision: str | None, commit: str | None) -> dict[str, str | None]:
    """Which weights: those of a local directory or file by what they are, those of a hub by name and commit."""
    if os.path.exists(model):
        return {"weights": weights(Path(model))}
    return {"model": model, "revision": commit or revision}


def without_paths(config: object) -> object:
    """A model's configuration without the places from which its parts were read."""
    if isinstance(config, Mapping):
        given = cast("Mapping[str, object]", config)
        return {name: without_paths(value) for name, value in given.items() if name != "_name_or_path"}
    if isinstance(config, list | tuple):
        return [without_paths(value) for value in cast("Sequence[object]", config)]
    return config


def parts_of(layers: Sequence[int], wanted: int | None = None) -> list[range]:
    """The fewest runs of nearly equally many layers (given by their bytes per block) of which each fits a value, or as many
    as wanted: ranks with fewer layers than others have the same number."""
    count = len(layers)
    if wanted is not None and wanted > count:
        raise ValueError(f"{count} layers cannot be stored in the {wanted} parts that other ranks need")
    for parts in range(1, count + 1) if wanted is None else (wanted,):
        runs = [range(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
        if all(sum(layers[i] for i in run) <= PART_MAX for run in runs):
            return runs
    if wanted is not None:
        raise ValueError(f"a block of {count} layers, {sum(layers)} bytes, does not fit {wanted} parts of {PART_MAX}")
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
