"""`kvfs usrbio`: how to compile and link C programs against the libraries that pip installed with kvfs: libkvfs, and
libhf3fs_api_shared for programs written for 3FS."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Annotated

import typer

from kvfs.cli.output import fail

EXAMPLES = (
    "Examples:  cc example.c $(kvfs usrbio --print-flags)   |   "
    "PKG_CONFIG_PATH=$(kvfs usrbio --print-pkgconfig) pkg-config --cflags --libs hf3fs_usrbio   |   "
    "cmake -DCMAKE_PREFIX_PATH=$(kvfs usrbio --print-prefix) .   |   "
    "LD_LIBRARY_PATH=$(kvfs usrbio --print-prefix)/lib ./built-for-3fs"
)


def _package() -> Path:
    """Where the native half is: beside the extension module, also of an editable installation."""
    found = importlib.util.find_spec("kvfs_usrbio._native")
    if found is None or found.origin is None:
        fail("kvfs_usrbio is not installed with its native half; run `pip install` on kvfs again")
    return Path(found.origin).parent


def usrbio(
    flags: Annotated[
        bool, typer.Option("--print-flags", help="Print the compiler's and the linker's flags, for either header.")
    ] = False,
    pkgconfig: Annotated[
        bool, typer.Option("--print-pkgconfig", help="Print the directory that holds kvfs.pc and hf3fs_usrbio.pc.")
    ] = False,
    prefix: Annotated[
        bool,
        typer.Option(
            "--print-prefix", help="Print the directory that holds include and lib, where CMake finds hf3fs_usrbio."
        ),
    ] = False,
) -> None:
    """Compile and link C programs against kvfs.h, or unchanged ones written for 3FS against hf3fs_usrbio.h."""
    if flags + pkgconfig + prefix != 1:
        fail("say one of --print-flags, --print-pkgconfig and --print-prefix", code=2)
    package = _package()
    library = package / "lib"
    if pkgconfig:
        typer.echo(library / "pkgconfig")
    elif prefix:
        typer.echo(package)
    else:
        names = ["-lhf3fs_api_shared", "-lkvfs"]
        typer.echo(shlex.join([f"-I{package / 'include'}", f"-L{library}", *names, f"-Wl,-rpath,{library}"]))
