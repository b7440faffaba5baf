"""A Ray of our own without processes that nobody would ask anything: they cost its start seconds, and cores for ever.

Ray has no setting for this: `include_dashboard=False` still starts the dashboard's process, and waits for it. And it
asks for its node once a second only, which is most of what is left of its start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from treelora_platform.lean_imports import without

_UNNEEDED = ("start_api_server", "start_monitor", "start_log_monitor")
"""What starts the dashboard, the autoscaler (of one machine), and what brings workers' output to the driver."""
_NODE_POLL_S, _NODE_PATIENCE_S = 0.02, 30.0


@contextmanager
def lean_head() -> Iterator[None]:
    """Let `ray.init` start a head without them, at once; a Ray that is made otherwise starts as it always does."""
    from ray._private import services
    from ray._private.node import Node

    with ExitStack() as stack:
        for name in _UNNEEDED:
            if hasattr(Node, name):
                stack.enter_context(patch.object(Node, name, _nothing))
        # Without these a node's agent has no web server, as in a Ray that was installed without its extras.
        stack.enter_context(without("ray.dashboard.optional_deps"))
        if hasattr(services, "get_node"):
            stack.enter_context(patch.object(services, "get_node", _watchful(services.get_node)))
        yield


def _watchful(get_node: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    """Ray's own, which sleeps for a second where there is no such node yet, called when there is."""

    def get_soon(gcs_address: str, node_id: str) -> Any:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

        client, end = GcsClient(address=gcs_address), time.monotonic() + _NODE_PATIENCE_S
        while time.monotonic() < end:
            if any(found.hex() == node_id for found in client.get_all_node_info(timeout=_NODE_PATIENCE_S)):
                break
            time.sleep(_NODE_POLL_S)
        return get_node(gcs_address, node_id)

    return get_soon


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Of a dashboard there is no address, as Ray has it at first."""
