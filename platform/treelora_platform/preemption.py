"""Notices that a machine is about to be taken away, such as those of spot instances, and the error that follows."""

from __future__ import annotations

from treelora.errors import LostError


class PreemptedError(LostError):
    """A worker's machine is about to be taken away; all is committed. No failure, however often it happens."""


def is_preempted() -> bool:
    """Whether Ray Train has told this worker that a node of its group is being drained.

    `ray.train.get_preemption_info` says the same, but it waits for all workers at every call; this is what it reads.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    told = getattr(get_train_context(), "preemption_context", None)  # since ray 2.5x; older ones give no notice
    return told is not None and told.preemption_info is not None
