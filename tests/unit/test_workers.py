"""Workers: what was begun is waited for, within bounds; everything else ends as cancelled."""

from __future__ import annotations

import threading

import pytest

from kvfs_usrbio.connectors import workers
from kvfs_usrbio.connectors.workers import Workers


def test_close_waits_for_what_was_begun_and_cancels_the_rest() -> None:
    pool = Workers(1, "test")
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> int:
        begun.set()
        go_on.wait(10)
        return 1

    first, second = pool.submit(slow), pool.submit(lambda: 2)
    begun.wait(10)
    closer = threading.Thread(target=pool.close)
    closer.start()
    go_on.set()
    closer.join(10)
    assert first.result(0) == 1
    assert second.cancelled() or second.result(0) == 2  # the thread may have been faster than close
    assert pool.submit(lambda: 3).cancelled()


def test_close_says_what_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CLOSE_S", 0.05)
    pool = Workers(1, "test")
    go_on = threading.Event()
    hung, waiting = pool.submit(lambda: go_on.wait(10)), pool.submit(lambda: True)
    while not hung.running():
        pass
    assert not pool.close()
    assert waiting.cancelled()
    assert not hung.done()
    go_on.set()
    assert hung.result(10)
    assert pool.close()


def test_errors_are_the_callers() -> None:
    pool = Workers(2, "test")
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 // 0).result(10)
    assert pool.submit(lambda: 7).result(10) == 7
    assert pool.close()
