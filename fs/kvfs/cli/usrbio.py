"""`kvfs usrbio`: how to compile and link a C program against libkvfs, which pip installed with kvfs."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Annotated

import typer

from kvfs.cli.output import fail

EXAMPLES = (
    "Examples:  cc example.c $(kvfs usrbio --print-flags)   |   "
    "PKG_CONFIG_PATH=$(kvfs usrbio --print-pkgconfig) pkg-config --cflags --libs kvfs"
)


def _package() -> Path:
    """Where the native half is: beside the extension module, also of an editable installation."""
    found = importlib.util.find_spec("kvfs_usrbio._native")
    if found is None or found.origin is None:
        fail("kvfs_usrbio is not installed with its native half; run `pip install` on kvfs again")
    return Path(found.origin).parent


def usrbio(
    flags: Annotated[
        bool, typer.Option("--print-flags", help="Print compiler and linker flags of kvfs.h and libkvfs.")
    ] = False,
    pkgconfig: Annotated[
        bool, typer.Option("--print-pkgconfig", help="Print the directory that holds kvfs.pc.")
    ] = False,
) -> None:
    """Compile and link C programs against kvfs.h."""
    if flags == pkgconfig:
        fail("say --print-flags or --print-pkgconfig", code=2)
    package = _package()
    library = package / "lib"
    if pkgconfig:
        typer.echo(library / "pkgconfig")
    else:
        typer.echo(shlex.join([f"-I{package / 'include'}", f"-L{library}", "-lkvfs", f"-Wl,-rpath,{library}"]))
