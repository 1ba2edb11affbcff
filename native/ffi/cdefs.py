"""Turns the project's C headers into declarations that cffi can parse: the headers stay the only source of truth."""

from __future__ import annotations

import re
from pathlib import Path

NATIVE = Path(__file__).resolve().parent.parent


def declarations(*headers: str) -> str:
    """The headers' declarations, without what is only for C++ and with `#define NAME number` left to the compiler."""
    out: list[str] = []
    for header in headers:
        text = (NATIVE / header).read_text()
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.DOTALL)
        for line in text.splitlines():
            define = re.match(r"#define (\w+) +\S", line)
            if define:
                out.append(f"#define {define[1]} ...")
            elif not line.startswith("#"):
                out.append(line)
    return "\n".join(out)
