"""The tree actor: one `TaskMemory` for all workers of a run, and the client that rank 0 talks to it with.

One call a step, asked for a step ahead: `submit` sends it, `collect` waits for the answer. Calls carry (run, task,
step) and are idempotent in the memory itself; Ray never retries them (a replay of a fatal call would kill the actor
again).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
from torch import Tensor

from treelora.errors import LostError
from treelora.local_memory import pack_state, unpack_state
from treelora.memory import MemoryConfig, Past, Selection, StepCall, TaskMemory
from treelora.memory_records import Groups

CALL_TIMEOUT_S = 60.0


class TreeKeeper:
    """The actor's class: plain Python around a memory, launched by `launch_tree_actor`."""

    def __init__(self) -> None:
        self.memory: TaskMemory | None = None

    def open(self, config: MemoryConfig, state: Mapping[str, np.ndarray | str] | None, run: str) -> None:
        """Start empty, or from a commit: a group of workers that starts again takes the memory back with it."""
        self.memory = TaskMemory.from_state_dict(state, run=run) if state else TaskMemory(config)

    def begin_task(self, task: str, horizon: int) -> Past:
        """See `TaskMemory.begin_task`."""
        return self._opened().begin_task(task, horizon)

    def step(self, call: StepCall) -> Selection:
        """See `TaskMemory.step`."""
        return self._opened().step(call)

    def end_task(self, task: str, sketch: np.ndarray, mass: float) -> Groups:
        """See `TaskMemory.end_task`."""
        return self._opened().end_task(task, sketch, mass)

    def past(self) -> Past:
        """See `TaskMemory.past`."""
        return self._opened().past()

    def state(self) -> dict[str, np.ndarray | str]:
        """See `TaskMemory.state_dict`."""
        return self._opened().state_dict()

    def describe(self) -> dict[str, Any]:
        """See `TaskMemory.describe`."""
        return self._opened().describe()

    def _opened(self) -> TaskMemory:
        if self.memory is None:
            raise LostError("the tree actor has started again and holds no memory; the workers bring it back")
        return self.memory


def launch_tree_actor(name: str) -> Any:
    """Start the actor of a run on the driver's node; it ends with the driver's Ray session.

    Args:
        name: The run's name; the actor is found as `tree-<name>`.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    actor_class = ray.remote(TreeKeeper)
    return actor_class.options(
        name=f"tree-{name}",
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    ).remote()


class TreeClient:
    """`treelora.methods.Memory` on the tree actor.

    Raises:
        LostError: the actor didn't answer within `timeout_s`, or is gone.
    """

    def __init__(self, name: str, config: MemoryConfig, run: str, timeout_s: float = CALL_TIMEOUT_S):
        self.config, self.run, self.timeout_s = config, run, timeout_s
        self.name = f"tree-{name}"
        self.actor = ray.get_actor(self.name)
        self._task = ""
        self._pending: Any = None
        self._call("open", config, None, run)

    def begin_task(self, task: str, horizon: int) -> Past:
        """See `Memory`."""
        self._task = task
        return self._call("begin_task", task, horizon)

    def submit(self, step: int, observation: np.ndarray | None) -> None:
        """See `Memory`."""
        self._step = step
        self._pending = self.actor.step.remote(StepCall(self.run, self._task, step, observation))

    def collect(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Memory`."""
        selection: Selection = self._wait(self._pending, f"step {self._step} of {self._task!r}")
        return selection.arms, selection.lcb

    def end_task(self, task: str, sketch: np.ndarray, mass: float) -> Groups:
        """See `Memory`."""
        return self._call("end_task", task, sketch, mass)

    def past(self) -> Past:
        """See `Memory`."""
        return self._call("past")

    def describe(self) -> dict[str, Any]:
        """See `TaskMemory.describe`."""
        return self._call("describe")

    def state_dict(self) -> dict[str, Tensor]:
        """See `Memory`; calls already sent are answered first, because an actor answers in order."""
        return pack_state(self._call("state"))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Memory`."""
        self._call("open", self.config, unpack_state(state), self.run)

    def _call(self, method: str, *args: Any) -> Any:
        return self._wait(getattr(self.actor, method).remote(*args), method)

    def _wait(self, answer: Any, what: str) -> Any:
        try:
            return ray.get(answer, timeout=self.timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise LostError(f"actor {self.name}: no answer to {what} within {self.timeout_s:.0f} s") from None
        except ray.exceptions.RayActorError as error:
            raise LostError(f"actor {self.name} died during {what} ({type(error).__name__})") from error
