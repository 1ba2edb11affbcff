"""The tree's error: an errno, as the mount hands it to the kernel."""

from __future__ import annotations

import errno
import os


class FsError(OSError):
    def __init__(self, code: int, what: str = "") -> None:
        text = os.strerror(code)
        super().__init__(code, f"{text}: {what}" if what else text)

    def __repr__(self) -> str:
        return f"FsError({errno.errorcode.get(self.errno or 0, self.errno)})"
