"""What the platform does around the loop: rank 0 records, tracks and commits; the other ranks wait where they must."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from treelora.adapters import ADAPTER, grown, grown_head, load_adapter, save_adapter
from treelora.data.names import slugify
from treelora.engine import read_adapter, read_head
from treelora.errors import CheckpointError
from treelora.evaluation.matrix import Score
from treelora.loop import StreamLoop
from treelora.loop_records import Position, StepRecord, TaskRecord, tensor_bytes
from treelora.methods import Remembering
from treelora_platform.checkpoint import Commit, newest_commit, write_commit
from treelora_platform.diagnostics import PenaltyWatch
from treelora_platform.preemption import PreemptedError
from treelora_platform.recorder import Recorder
from treelora_platform.storage.keeper import Keeper
from treelora_platform.tracking import Uploader
from treelora_platform.watchdog import Watchdog

LEAVE_S = 20.0
"""For the last commit on a machine that is about to be taken away to reach the storage."""


class PlatformHooks:
    """`treelora.loop.Hooks`; `recorder`, `uploader` and `keeper` exist on rank 0 only."""

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        recorder: Recorder | None,
        uploader: Uploader | None,
        watchdog: Watchdog | None = None,
        preempted: Callable[[], bool] = lambda: False,
        keeper: Keeper | None = None,
    ):
        self.run_dir, self.keep = run_dir, keep
        self.recorder, self.uploader, self.keeper = recorder, uploader, keeper
        self.watchdog, self.preempted = watchdog or Watchdog(run_dir, "rank-0", None), preempted
        self._memory_bytes: int | None = None
        self._penalty = PenaltyWatch()
        self.saved: set[str] = set()
        """Adapters that the newest commit has on disk."""

    def stage(self, unit: int, name: str, what: str) -> None:
        """See `Hooks`."""
        self.watchdog.feed(f"{name}: {what}")
        if self.recorder:
            self.recorder.event("stage", unit=unit, task=name, what=what)
            self._notify()

    def stepped(self, record: StepRecord, steps: int) -> None:
        """See `Hooks`."""
        self.watchdog.feed(f"{record.task}: step {record.step}")
        if self.recorder:
            self.recorder.event(
                "step",
                unit=record.task_index,
                task=record.task,
                step=record.step,
                steps=steps,
                loss=record.loss,
            )
            if warning := self._penalty.see(record, steps):
                self.recorder.event("warning", what=warning)
            if self.recorder.add_step(record):
                self._notify()

    def scored(self, scores: Sequence[Score], task: TaskRecord) -> None:
        """See `Hooks`."""
        self.watchdog.feed(f"{task.task}: scores")
        if self.recorder:
            self.recorder.add_scores(scores, task, self._memory_bytes)
            self.recorder.event("scored", unit=task.task_index, task=task.task, scores=_mean_by_mode(scores))
            self._notify()

    def take_up(self, loop: StreamLoop) -> None:
        """Bring a freshly assembled loop, and the run's files, to the newest commit. Collective.

        Raises:
            CheckpointError: there are commits, but none that can be used.
        """
        found: tuple[Commit | None, list[str]] = newest_commit(self.run_dir) if loop.engine.rank == 0 else (None, [])
        # rank 0 decides for all: another rank that looks a moment later may see the first commit of this very attempt
        commit, troubles = loop.engine.broadcast(found)
        if commit:
            restore(loop, commit, self.run_dir)
            self.saved = set(commit.adapters)
            self._memory_bytes = tensor_bytes(commit.parts["memory"]) if "memory" in commit.parts else None
        if self.recorder:
            _tell_of_beginning(self.recorder, loop, troubles)

    def commit(self, position: Position, loop: StreamLoop) -> None:
        """See `Hooks`."""
        engine, method = loop.engine, loop.method
        head = read_head(engine)
        parts: dict[str, dict[str, Tensor]] = {"adapter": read_adapter(engine), "head": head}
        if loop.alignment:
            parts["alignment"] = loop.alignment.state_dict()
        within_task = position.step > 0 and not position.trained
        if within_task:
            parts["optimizer"] = engine.optimizer_state()
        if loop.method.trains:
            parts["method"] = {name: tensor.clone() for name, tensor in method.state_dict().items()}
        if engine.rank == 0:
            assert self.recorder
            self.recorder.flush()
            if isinstance(method, Remembering):
                parts["memory"] = self._memory(method, position, loop)
            parts["evaluator"] = loop.evaluator.state_dict()
            adapters = bank_folders(loop)
            if position.trained:
                self._save_adapters(adapters, loop, head)
            write_commit(self.run_dir, Commit(position, adapters, parts), self.keep)
            self.recorder.event("commit", unit=position.unit, step=position.step)
            self._notify()
        engine.broadcast(None)
        self.watchdog.feed(f"the commit of step {position.global_step}")

    def leaving(self) -> bool:
        """See `Hooks`."""
        return self.preempted()

    def leave(self) -> None:
        """See `Hooks`.

        Raises:
            PreemptedError: always.
        """
        if self.keeper:
            self.keeper.flush(LEAVE_S)
        raise PreemptedError("a machine of this group is about to be taken away")

    def _memory(self, method: Remembering, position: Position, loop: StreamLoop) -> dict[str, Tensor]:
        assert method.memory
        assert self.recorder
        state = method.memory.state_dict()
        self._memory_bytes = tensor_bytes(state)
        if position.trained:
            self.recorder.write_tree(position.unit, loop.units[position.unit].name, method.memory.describe())
        return state

    def _save_adapters(self, folders: Sequence[str], loop: StreamLoop, head: dict[str, Tensor]) -> None:
        """Write the adapter of the unit just learnt, with the head as it is now, and those that it was merged into."""
        peft_config = loop.engine.module.peft_config[ADAPTER]  # type: ignore[index]
        known, self.saved = self.saved, set(folders)
        newest = folders[-1:]
        for folder, state in dict(zip(folders, loop.bank, strict=True)).items():
            if folder not in known or folder in newest:
                save_adapter(state | head, peft_config, self.run_dir / "adapters" / folder)

    def _notify(self) -> None:
        for outlet in (self.uploader, self.keeper):
            if outlet:
                outlet.notify()


def _tell_of_beginning(recorder: Recorder, loop: StreamLoop, troubles: Sequence[str]) -> None:
    for trouble in troubles:
        recorder.event("warning", what=f"commit passed over: {trouble}")
    for test in loop.evaluator.tests:
        if cut := test.rows.truncated:
            recorder.event("note", what=f"{test.task.name}: {cut} of {len(test.rows)} test prompts cut to max_length")
    recorder.rewind(loop.position, [unit.name for unit in loop.units])
    recorder.event(
        "begin",
        steps=[unit.plan.steps if loop.method.trains else 0 for unit in loop.units],
        units=[unit.name for unit in loop.units],
        global_step=loop.position.global_step,
    )


def restore(loop: StreamLoop, commit: Commit, run_dir: Path) -> None:
    """Bring a freshly assembled loop to where a commit was made. Collective.

    Raises:
        CheckpointError: an adapter or a part is missing or damaged.
    """
    parts = {name: dict(tensors) for name, tensors in commit.parts.items()}
    needed = ["adapter", "evaluator", *(["memory"] if isinstance(loop.method, Remembering) else [])]
    lacking = [part for part in needed if part not in parts]
    if lacking:
        raise CheckpointError(f"{run_dir}: the commit lacks its {', '.join(lacking)}; --fresh begins anew")
    shapes = {name: tensor.shape for name, tensor in loop.engine.adapter_tensors().items()}
    states = {}
    if loop.engine.rank == 0:  # other ranks may be on nodes that have nothing of the run
        states = {
            folder: grown(load_adapter(run_dir / "adapters" / folder), shapes)
            for folder in dict.fromkeys(commit.adapters)
        }
    states = loop.engine.broadcast(states)
    loop.bank = [states[folder] for folder in commit.adapters]
    head = grown_head(parts.get("head", {}), read_head(loop.engine))
    loop.engine.write_adapter(grown(parts["adapter"], shapes) | head)
    if loop.alignment:
        loop.alignment.load_state_dict(parts.get("alignment", {}))
    loop.engine.load_optimizer_state(parts.get("optimizer", {}))
    if isinstance(loop.method, Remembering) and loop.method.memory:
        loop.method.memory.load_state_dict(parts["memory"])
    if "method" in parts:
        loop.method.load_state_dict(parts["method"])
    loop.evaluator.load_state_dict(parts["evaluator"])
    loop.position = commit.position


def bank_folders(loop: StreamLoop) -> tuple[str, ...]:
    """For each unit in the bank the folder of its adapter under `adapters/`; units that share an adapter share it."""
    folders = []
    for state in loop.bank:
        units = [unit for unit, other in enumerate(loop.bank) if other is state]
        name = slugify(loop.units[units[0]].name)
        if len(units) > 1:
            name += f"-and-{len(units) - 1}-more-{zlib.crc32(repr(units).encode()):08x}"
        folders.append(f"{units[0]:04d}-{name}")
    return tuple(folders)


def _mean_by_mode(scores: Sequence[Score]) -> dict[str, float]:
    scores = [score for score in scores if score.after_index >= score.task_index]
    modes = dict.fromkeys(score.mode for score in scores)
    return {mode: float(torch.tensor([s.score for s in scores if s.mode == mode]).mean()) for mode in modes}
