"""A Ray of our own without processes that nobody would ask anything: they cost its start seconds, and cores for ever.

Ray has no setting for this: `include_dashboard=False` still starts the dashboard's process, and waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from treelora_platform.lean_imports import without

_UNNEEDED = ("start_api_server", "start_monitor", "start_log_monitor")
"""What starts the dashboard, the autoscaler (of one machine), and what brings workers' output to the driver."""


@contextmanager
def lean_head() -> Iterator[None]:
    """Let `ray.init` start a head without them; a Ray that is made otherwise starts as it always does."""
    from ray._private.node import Node

    with ExitStack() as stack:
        for name in _UNNEEDED:
            if hasattr(Node, name):
                stack.enter_context(patch.object(Node, name, _nothing))
        # Without these a node's agent has no web server, as in a Ray that was installed without its extras.
        stack.enter_context(without("ray.dashboard.optional_deps"))
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Of a dashboard there is no address, as Ray has it at first."""
