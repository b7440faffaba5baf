"""A group of Ray Train's workers without the actor that they would report to together.

Nothing of ours calls `ray.train.report` or its collectives: workers talk through `torch.distributed`, and commits are
our own. The actor's process would take a second of the start, memory, and some of every core for ever.
"""

from __future__ import annotations

from typing import Any


class Nobody:
    """Stands for that actor; whoever called it would get an AttributeError."""

    @classmethod
    def options(cls, **how: Any) -> type[Nobody]:
        """As of an actor's class."""
        return cls

    @classmethod
    def remote(cls, **arguments: Any) -> Nobody:
        """As of an actor's class."""
        return cls()


def leave_out_synchronization() -> None:
    """For all groups that a controller starts from now on; to be called in its process."""
    from ray.train.v2._internal.execution.worker_group import state, worker_group

    worker_group.SynchronizationActor = Nobody  # type: ignore[misc, assignment]
    state._shutdown_sync_actor = _leave  # type: ignore[assignment]


def _leave(actor: Any) -> None:
    """There is nothing to end."""
