"""What TreeLoRA remembers of past tasks: sketches, tree and bandit as one state machine.

Shapes: L layers, K sketch numbers a layer, N arms (see `treelora.arms`). Pure numpy: no processes, files or clocks, so
the same calls give the same answers to the bit, on one machine or behind an actor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from treelora.arms import Arms, checked_sketch
from treelora.bandit import TreeBandit
from treelora.errors import CheckpointError, ConfigError, DataError
from treelora.memory_records import Groups, MemoryConfig, Past, ProtocolError, Selection, StepCall
from treelora.tree import SignatureTree

FORMAT = 2

__all__ = ["MemoryConfig", "Past", "ProtocolError", "Selection", "StepCall", "TaskMemory"]


class TaskMemory:
    """begin_task, step 1..T, end_task, for one task after another.

    Every call may be repeated (a lost reply, a retry): the repetition gets the same answer and changes
    nothing. Only the last answer is kept, so memory doesn't grow with steps. A memory serves one run: the
    first step's.
    """

    def __init__(self, config: MemoryConfig, run: str | None = None) -> None:
        self.config = config
        self.tasks: list[str] = []
        self.arms = Arms(config)
        self.bandit: TreeBandit | None = None
        # The last task's sketch as it was told: a repeated `end_task` must tell the same.
        self._recorded_LK = np.zeros((config.layers, config.sketch_size), dtype=np.float32)
        self._run = run
        self._task: str | None = None
        self._horizon = 0
        self._last: Selection | None = None

    @property
    def tree(self) -> SignatureTree | None:
        """The tree over the arms; None before the first task has ended."""
        return self.arms.tree

    def begin_task(self, task: str, horizon: int) -> Past:
        """Open a task of at most about `horizon` steps (T of the LCB).

        Raises: ProtocolError where another task is open or this one is already learnt.
        """
        if horizon < 1:
            raise ConfigError(f"task {task!r}: horizon = {horizon}; a task needs at least one step")
        if self._task is None:
            if task in self.tasks:
                raise ProtocolError(f"begin_task({task!r}): it is already learnt, as task {self.tasks.index(task)}")
            self._open(task, horizon)
        elif (task, horizon) != (self._task, self._horizon):
            raise ProtocolError(
                f"begin_task({task!r}, {horizon}): expected end_task({self._task!r}), which is open "
                f"with horizon {self._horizon}"
            )
        return self.past()

    def past(self) -> Past:
        """What is known of the tasks that have ended; the sketches are read-only."""
        return Past(self.arms.sketches_NLK, self.arms.groups, self.tree)

    def step(self, call: StepCall) -> Selection:
        """The arms of call.step. Raises: ProtocolError (run, task or step), DataError (bad observation)."""
        if self._task is None or call.task != self._task:
            expected = f"a step of {self._task!r}" if self._task else f"begin_task({call.task!r})"
            raise ProtocolError(f"step {call.step} of {call.task!r}: expected {expected}")
        if self._run is not None and call.run != self._run:
            raise ProtocolError(f"step {call.step} of run {call.run!r}: this memory belongs to run {self._run!r}")
        last = self._last.step if self._last else 0
        if self._last is not None and call.step == last:
            return self._last
        if call.step != last + 1:
            raise ProtocolError(f"step {call.step} of {call.task!r}: expected step {last + 1} (or {last} again)")
        self._observe(call)
        if self.bandit is None:
            arms = np.full(self.config.layers, -1, dtype=np.int64)
            lcb = np.full(self.config.layers, -np.inf, dtype=np.float32)
        else:
            arms = self.bandit.select(call.step)
            lcb = self.bandit.lcb(arms)
        self._run, self._last = call.run, _frozen_selection(call.task, call.step, arms, lcb)
        return self._last

    def end_task(self, task: str, sketch: np.ndarray, mass: float = 1.0) -> Groups:
        """Record the task's normalised sketch [L, K] and grow the tree; the two closest arms are merged if need be.

        mass: the rows that the sketch stands for, its weight in merging. Returns the groups as they are now.

        Raises: DataError naming task and layer for NaN, a wrong shape or a layer that isn't normalised;
        ProtocolError where the task isn't open, or was recorded with another sketch.
        """
        sketch_LK = checked_sketch(self.config, task, sketch)
        if not (np.isfinite(mass) and mass > 0):
            raise DataError(f"task {task!r}: mass = {mass}; it counts rows, so it must be positive")
        if self._task is None and self.tasks and task == self.tasks[-1]:
            if not np.array_equal(sketch_LK, self._recorded_LK):
                raise ProtocolError(f"end_task({task!r}): already recorded, with another sketch")
            return self.arms.groups
        if task != self._task:
            expected = f"end_task({self._task!r})" if self._task else f"begin_task({task!r})"
            raise ProtocolError(f"end_task({task!r}): expected {expected}")
        self.tasks.append(task)
        self._recorded_LK = sketch_LK
        self.arms.add_task(len(self.tasks) - 1, sketch_LK, mass)
        self._task, self._horizon, self._last, self.bandit = None, 0, None, None
        return self.arms.groups

    def describe(self) -> dict[str, Any]:
        """For logs and reports: JSON values only (None: an untried leaf's LCB)."""
        bandit = self.bandit
        described: dict[str, Any] = {
            "tasks": self.arms.labels(self.tasks),
            "tree": json.loads(self.tree.to_json()) if self.tree else None,
            "run": self._run,
            "task": self._task,
            "horizon": self._horizon,
            "step": self._last.step if self._last else 0,
            "arms": self._last.arms.tolist() if self._last else None,
        }
        if bandit is not None and self.tree is not None:
            lcb_NL = bandit.bounds[:, self.tree.leaf].T * bandit.scale
            described |= {
                "counts": bandit.counts[:, :-1].tolist(),
                "pulls": bandit.pulls().tolist(),
                "lcb": _finite(lcb_NL),
                "scale": bandit.scale.tolist(),
                "ratio": _finite(bandit.ratio()),
            }
        return described

    def state_dict(self) -> dict[str, np.ndarray | str]:
        """Everything needed to go on, as arrays and one JSON text: no pickle."""
        last = self._last
        record = {
            "format": FORMAT,
            "config": asdict(self.config),
            "tasks": self.tasks,
            **self.arms.record(),
            "run": self._run,
            "task": self._task,
            "horizon": self._horizon,
            "step": last.step if last else 0,
        }
        state: dict[str, np.ndarray | str] = {
            "memory": json.dumps(record),
            "recorded": self._recorded_LK.copy(),
            **self.arms.state_dict(),
        }
        if last is not None:
            state |= {"arms": last.arms.copy(), "lcb": last.lcb.copy()}
        if self.bandit is not None:
            state |= {f"bandit.{name}": array for name, array in self.bandit.state_dict().items()}
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, np.ndarray | str], *, run: str | None = None) -> TaskMemory:
        """Continue bit for bit where `state_dict` was taken; with `run`, on behalf of that run from now on.

        Raises: CheckpointError where the state is incomplete or contradicts itself.
        """
        try:
            record = json.loads(str(state["memory"]))
            if record["format"] != FORMAT:
                raise CheckpointError(f"memory state has format {record['format']!r}; this version reads {FORMAT}")
            known = {field.name for field in fields(MemoryConfig)}
            if set(record["config"]) != known:
                raise CheckpointError(f"memory state: settings {sorted(set(record['config']) ^ known)} don't fit")
            memory = cls(MemoryConfig(**record["config"]))
            memory._restore(record, {key: np.asarray(value) for key, value in state.items() if key != "memory"})
        except (KeyError, TypeError, ValueError, ConfigError, DataError) as error:
            raise CheckpointError(f"memory state can't be used: {error!r}; take another checkpoint") from error
        memory._run = run if run is not None else memory._run
        return memory

    def _open(self, task: str, horizon: int) -> None:
        self._task, self._horizon, self._last, self.bandit = task, horizon, None, None
        if self.tree is not None:
            config = self.config
            self.bandit = TreeBandit(
                self.tree,
                config.layers,
                config.exploration,
                horizon,
                search=config.search,
                bound=config.bound,
                noise=config.noise,
                seed=config.seed,
                task=task,
                newest=self.arms.newest,
            )

    def _observe(self, call: StepCall) -> None:
        if call.observation is None:
            return
        if self._last is None or self.bandit is None:
            why = "there is no past task" if self.bandit is None else "no arm was chosen before it"
            raise ProtocolError(f"step {call.step} of {call.task!r}: observation must be None, for {why}")
        try:
            if self.config.search == "full":
                self.bandit.observe_all(call.observation)
            else:
                self.bandit.observe(self._last.arms, call.observation)
        except DataError as error:
            raise DataError(f"task {call.task!r}, observation of step {call.step - 1}: {error}") from None

    def _restore(self, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        tasks = record["tasks"]
        if not all(isinstance(task, str) for task in tasks) or len(set(tasks)) != len(tasks):
            raise CheckpointError(f"memory state: tasks {tasks} aren't distinct names")
        self.tasks, self.arms = list(tasks), Arms.restored(self.config, tasks, record, arrays)
        self._recorded_LK = arrays["recorded"].astype(np.float32)
        self._run = record["run"]
        if record["task"] is None:
            return
        self._open(record["task"], record["horizon"])
        if self.bandit is not None:
            own = {name.removeprefix("bandit."): a for name, a in arrays.items() if name.startswith("bandit.")}
            self.bandit.load_state_dict(own)
        if record["step"]:
            arms, lcb = arrays["arms"].astype(np.int64), arrays["lcb"].astype(np.float32)
            low, high = (0, len(self.arms)) if tasks else (-1, 0)
            if (
                arms.shape != (self.config.layers,)
                or lcb.shape != arms.shape
                or not ((arms >= low) & (arms < high)).all()
            ):
                raise CheckpointError(f"memory state: arms {arms.tolist()} don't fit {len(self.arms)} arms")
            self._last = _frozen_selection(record["task"], record["step"], arms, lcb)


def _frozen_selection(task: str, step: int, arms: np.ndarray, lcb: np.ndarray) -> Selection:
    # A repeated call returns the same object: nobody may write into it.
    arms.flags.writeable = lcb.flags.writeable = False
    return Selection(task, step, arms, lcb)


def _finite(values: np.ndarray) -> Any:
    return np.where(np.isfinite(values), values, np.array(None)).tolist()
