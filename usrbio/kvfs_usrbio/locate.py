"""Finds the data directory behind a path: itself, or that of the kvfs mounted there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

FSTYPE = "fuse.kvfs"
_SCHEME = "kvfs://"
_ESCAPE = re.compile(r"\\([0-7]{3})")


def mount_source(data_directory: Path) -> str:
    """What a mount of this directory calls its source, as `df` shows it: kvfs:///path. Also an URL that opens it."""
    return _SCHEME + quote(str(data_directory))


def mounted_from(path: Path) -> Path | None:
    """The data directory whose mount `path` lies on. Nothing of the path is touched: the mount may be dead."""
    wanted = Path(os.path.abspath(path))
    found: tuple[int, str] | None = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            before, _, after = line.partition(" - ")
            kind, _, rest = after.partition(" ")
            point = Path(_plain(before.split(" ")[4]))
            if wanted != point and point not in wanted.parents:
                continue
            # Of two mounts on one path the later one is seen.
            if found is None or len(point.parts) >= found[0]:
                source = _plain(rest.split(" ", 1)[0])
                found = len(point.parts), source if kind == FSTYPE else ""
    if found is None or not found[1].startswith(_SCHEME):
        return None
    return Path(unquote(found[1].removeprefix(_SCHEME)))


def _plain(text: str) -> str:
    """Mount tables write blanks and backslashes in octal."""
    return _ESCAPE.sub(lambda m: chr(int(m[1], 8)), text)
