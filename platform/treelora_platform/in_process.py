"""A run in the driver's own process (`cluster.workers: 0`): no Ray, plain torch, the memory beside the model.

For debugging, notebooks, and studies of many small runs, which would spend more time on starting processes than on
learning. Commits, tables and tracking are those of any other run; a failure isn't tried again by itself, but the same
command goes on from the last commit.
"""

from __future__ import annotations

import traceback
from typing import Any

from treelora.errors import TreeLoRAError
from treelora_platform.attempts import interruptible
from treelora_platform.quiet import quiet
from treelora_platform.worker import run_here


def fit_here(job: dict[str, Any]) -> str | None:
    """Go through the stream in this process; returns None, or why that failed."""
    with interruptible(), quiet():
        try:
            run_here(job)
        except TreeLoRAError as error:
            return str(error)
        # as a worker's: the run must be recorded as failed, whatever went wrong
        except Exception as error:  # noqa: BLE001
            return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    return None
