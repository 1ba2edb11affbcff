"""A client's host that vanishes while its operations are under way. Last, since it takes the server a while to notice."""

from __future__ import annotations

from machines import Vanished

from waiting import wait_for

NOTICED_S = 90.0


def test_a_host_that_vanished_keeps_nothing_at_the_server(vanished: Vanished) -> None:
    server = vanished.server
    assert vanished.connections > 0
    wait_for(lambda: server.metric("kvfs_server_sessions") == 0, NOTICED_S)
    assert server.metric("kvfs_server_connections") == 0
    assert server.metric("kvfs_server_buffers_used") == 0
