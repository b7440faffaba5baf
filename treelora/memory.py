"""What TreeLoRA remembers of past tasks: sketches, tree and bandit as one state machine.

Shapes: L layers, K sketch numbers a layer, N past tasks. Pure numpy: no processes, files or clocks, so the
same calls give the same answers to the bit, on one machine or behind an actor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from treelora import tree_build
from treelora.bandit import TreeBandit
from treelora.errors import CheckpointError, ConfigError, DataError
from treelora.memory_records import MemoryConfig, ProtocolError, Selection, StepCall
from treelora.sketch import layer_distances
from treelora.tree import SignatureTree

FORMAT = 1
NORM_TOLERANCE = 1e-2

__all__ = ["MemoryConfig", "ProtocolError", "Selection", "StepCall", "TaskMemory"]


class TaskMemory:
    """begin_task, step 1..T, end_task, for one task after another.

    Every call may be repeated (a lost reply, a retry): the repetition gets the same answer and changes
    nothing. Only the last answer is kept, so memory doesn't grow with steps. A memory serves one run: the
    first step's.
    """

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config
        self.tasks: list[str] = []
        self.tree: SignatureTree | None = None
        self.bandit: TreeBandit | None = None
        self._sketches_NLK = np.zeros((0, config.layers, config.sketch_size), dtype=np.float32)
        # Kept while N <= rebuild_limit; a derived value, not part of the state.
        self._distances_LNN = np.zeros((config.layers, 0, 0))
        self._run: str | None = None
        self._task: str | None = None
        self._horizon = 0
        self._last: Selection | None = None

    def begin_task(self, task: str, horizon: int) -> np.ndarray:
        """Open a task of at most about `horizon` steps (T of the LCB); the past tasks' sketches [N, L, K].

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
        return self._sketches_NLK.copy()

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

    def end_task(self, task: str, sketch: np.ndarray) -> None:
        """Record the task's normalised sketch [L, K] and grow the tree.

        Raises: DataError naming task and layer for NaN, a wrong shape or a layer that isn't normalised;
        ProtocolError where the task isn't open, or was recorded with another sketch.
        """
        sketch_LK = self._checked_sketch(task, sketch)
        if self._task is None and self.tasks and task == self.tasks[-1]:
            if not np.array_equal(sketch_LK, self._sketches_NLK[-1]):
                raise ProtocolError(f"end_task({task!r}): already recorded, with another sketch")
            return
        if task != self._task:
            expected = f"end_task({self._task!r})" if self._task else f"begin_task({task!r})"
            raise ProtocolError(f"end_task({task!r}): expected {expected}")
        self._sketches_NLK = np.concatenate([self._sketches_NLK, sketch_LK[None]])
        self.tasks.append(task)
        self._grow()
        self._task, self._horizon, self._last, self.bandit = None, 0, None, None

    def describe(self) -> dict[str, Any]:
        """For logs and reports: JSON values only (None: an untried leaf's LCB)."""
        bandit = self.bandit
        described: dict[str, Any] = {
            "tasks": list(self.tasks),
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
            "tree": self.tree.to_json() if self.tree else None,
            "run": self._run,
            "task": self._task,
            "horizon": self._horizon,
            "step": last.step if last else 0,
        }
        state: dict[str, np.ndarray | str] = {
            "memory": json.dumps(record),
            "sketches": self._sketches_NLK.copy(),
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
                seed=config.seed,
                task=task,
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

    def _grow(self) -> None:
        tasks = len(self.tasks)
        if self.tree is not None and tasks > self.config.rebuild_limit:
            self._distances_LNN = np.zeros((self.config.layers, 0, 0))
            self.tree = self.tree.insert(self._sketches_NLK)
            return
        if self._distances_LNN.shape[1] == tasks - 1:
            row_LN = layer_distances(self._sketches_NLK[-1], self._sketches_NLK).T
            grown = np.zeros((self.config.layers, tasks, tasks))
            grown[:, :-1, :-1] = self._distances_LNN
            grown[:, -1, :] = grown[:, :, -1] = row_LN
            self._distances_LNN = grown
        else:  # restored from a state, which doesn't carry them
            self._distances_LNN = tree_build.pairwise_distances(self._sketches_NLK)
        config = self.config
        self.tree = SignatureTree.build(self._sketches_NLK, config.tree, config.blocks, self._distances_LNN)

    def _checked_sketch(self, task: str, sketch: np.ndarray) -> np.ndarray:
        sketch_LK = np.array(sketch, dtype=np.float32)
        shape = (self.config.layers, self.config.sketch_size)
        if sketch_LK.shape != shape:
            raise DataError(f"task {task!r}: sketch has shape {sketch_LK.shape}, need {shape}")
        bad = np.flatnonzero(~np.isfinite(sketch_LK).all(axis=1))
        if len(bad):
            raise DataError(f"task {task!r}, layer {bad[0]}: the sketch holds NaN or infinity; measure it again")
        norm_L = np.linalg.norm(sketch_LK.astype(np.float64), axis=1)
        bad = np.flatnonzero((norm_L > 0) & (np.abs(norm_L - 1) > NORM_TOLERANCE))
        if len(bad):
            raise DataError(
                f"task {task!r}, layer {bad[0]}: the sketch has norm {norm_L[bad[0]]:.4g}, not 1 (or 0); "
                "pass it through treelora.sketch.normalise"
            )
        return sketch_LK

    def _restore(self, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        tasks = record["tasks"]
        if not all(isinstance(task, str) for task in tasks) or len(set(tasks)) != len(tasks):
            raise CheckpointError(f"memory state: tasks {tasks} aren't distinct names")
        shape = (len(tasks), self.config.layers, self.config.sketch_size)
        if arrays["sketches"].shape != shape:
            raise CheckpointError(f"memory state: sketches have shape {arrays['sketches'].shape}, need {shape}")
        for name, sketch in zip(tasks, arrays["sketches"], strict=True):
            self._checked_sketch(name, sketch)
        self.tasks, self._sketches_NLK = list(tasks), arrays["sketches"].astype(np.float32)
        if tasks:
            self.tree = SignatureTree.from_json(record["tree"])
            if (self.tree.tasks, self.tree.layers) != shape[:2]:
                raise CheckpointError(f"memory state: the tree has {self.tree.tasks} tasks, the sketches {shape[0]}")
        self._run = record["run"]
        if record["task"] is None:
            return
        self._open(record["task"], record["horizon"])
        if self.bandit is not None:
            self.bandit.load_state_dict({name: arrays[f"bandit.{name}"] for name in ("counts", "sums")})
        if record["step"]:
            arms, lcb = arrays["arms"].astype(np.int64), arrays["lcb"].astype(np.float32)
            low, high = (0, len(tasks)) if tasks else (-1, 0)
            if arms.shape != (shape[1],) or lcb.shape != arms.shape or not ((arms >= low) & (arms < high)).all():
                raise CheckpointError(f"memory state: arms {arms.tolist()} don't fit {len(tasks)} past tasks")
            self._last = _frozen_selection(record["task"], record["step"], arms, lcb)


def _frozen_selection(task: str, step: int, arms: np.ndarray, lcb: np.ndarray) -> Selection:
    # A repeated call returns the same object: nobody may write into it.
    arms.flags.writeable = lcb.flags.writeable = False
    return Selection(task, step, arms, lcb)


def _finite(values: np.ndarray) -> Any:
    return np.where(np.isfinite(values), values, np.array(None)).tolist()
