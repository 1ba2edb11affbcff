"""Ctrl-C and friends, so that what was started is always ended: one KeyboardInterrupt, never at the wrong moment."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Generator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """While entered, the first of SIGNALS becomes a KeyboardInterrupt, and later ones are ignored: cleaning up is bounded.

    Within `held` it waits until the end of that: a process that has been started is known before anything is raised.
    """

    def __init__(self) -> None:
        self._old: dict[signal.Signals, Any] = {}
        self._held = 0
        self._pending = False

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                self._old[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _arrived(self, _: int, __: FrameType | None) -> None:
        for number in self._old:
            signal.signal(number, signal.SIG_IGN)
        if not self._held:
            raise KeyboardInterrupt
        self._pending = True

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if self._pending and not self._held:
                self._pending = False
                raise KeyboardInterrupt
