"""kill -9 of the daemon under a program that syncs what it writes: appends, replaced files, new and removed names."""

from __future__ import annotations

import os
import random

import pytest
import sync_writer
from mount_process import Mounted

pytestmark = pytest.mark.timeout(120)

ROUNDS = 5


def test_what_was_synced_is_there_in_order(mounted: Mounted) -> None:
    directory = mounted.root / "d"
    directory.mkdir()
    rng = random.Random(6)
    for _ in range(ROUNDS):
        # At any moment of a step later than the last that is reported.
        last = mounted.kill_under(sync_writer.__file__, directory, rng.uniform(0.1, 0.8))[-1]
        mounted.start()
        steps = {int(name.removeprefix("step-")) for name in os.listdir(directory) if name.startswith("step-")}
        # The step that was under way may be there in part, and nothing of a later one.
        expected = set(range(max(1, last - sync_writer.KEPT_STEPS + 1), last + 1))
        assert steps - {last + 1} in (expected, expected - {last + 1 - sync_writer.KEPT_STEPS})
        for step in steps - {last + 1}:
            assert (directory / f"step-{step}").read_bytes() == sync_writer.record(step)
        assert (directory / "state").read_bytes() in (sync_writer.state(last), sync_writer.state(last + 1))
        log = (directory / "log").read_bytes()
        synced = b"".join(sync_writer.record(step) for step in range(1, last + 1))
        assert log.startswith(synced)
        assert sync_writer.record(last + 1).startswith(log[len(synced) :])
        # The next round begins where this one ended.
        (directory / "log").write_bytes(synced)
        (directory / f"step-{last + 1}").unlink(missing_ok=True)
        lost = directory / f"step-{last + 1 - sync_writer.KEPT_STEPS}"
        if last >= sync_writer.KEPT_STEPS and not lost.exists():
            lost.write_bytes(sync_writer.record(last + 1 - sync_writer.KEPT_STEPS))
