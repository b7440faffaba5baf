"""The stream loop: learn one unit after another with one method on one engine, judge after each, commit on the way.

It knows nothing of Ray, files or servers: what the platform wants to do at a step, a score or a commit are `Hooks`.
Every random number is a function of (seed, task, step, rank), so a position says all that must be known of the RNG, and
a resumed stream equals an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

from treelora.adapters import AdapterState
from treelora.alignment import HeadAlignment
from treelora.data.batches import Batch
from treelora.engine import Engine, read_adapter, read_head
from treelora.errors import TreeLoRAError
from treelora.evaluation.evaluator import Evaluator
from treelora.evaluation.matrix import Score
from treelora.lookahead import Lookahead
from treelora.loop_records import LoopOptions, Position, StepRecord, TaskRecord, tensor_bytes
from treelora.methods.base import Method, TaskContext
from treelora.schedule import learning_rate
from treelora.training_data import Unit


class Hooks(Protocol):
    """What happens around the loop, on every rank."""

    def stage(self, unit: int, name: str, what: str) -> None:
        """Something other than a step begins."""

    def stepped(self, record: StepRecord, steps: int) -> None:
        """A step is done; `steps` are those of its task."""

    def scored(self, scores: Sequence[Score], task: TaskRecord) -> None:
        """A unit was judged."""

    def commit(self, position: Position, loop: StreamLoop) -> None:
        """A state that can be gone on from: make it safe. Collective."""

    def leaving(self) -> bool:
        """Whether this rank's machine is about to be taken away; asked at every step, so it must not wait."""

    def leave(self) -> None:
        """Some rank's machine is, and all is committed: end this attempt by raising."""


@dataclass
class StreamLoop:
    """One method learning one stream on one engine."""

    engine: Engine
    method: Method
    units: Sequence[Unit]
    evaluator: Evaluator
    options: LoopOptions
    hooks: Hooks
    bank: list[AdapterState] = field(default_factory=list)
    """Adapters of the units trained so far."""
    position: Position = field(default_factory=Position)
    alignment: HeadAlignment | None = None
    """Of image classifiers, where asked for."""
    _leaving: bool = False

    def run(self) -> None:
        """Go on from `position` to the end of the stream. Collective.

        Raises:
            TreeLoRAError: loss or gradient was not finite for `max_bad_steps` steps in a row, or throughout a task.
        """
        while self.position.unit < len(self.units):
            unit = self.units[self.position.unit]
            if not self.position.trained:
                if self.method.trains:
                    self._train(unit)
                self._commit(replace(self.position, step=unit.plan.steps, trained=True))
                self._leave_if_asked()
            self._judge(unit)
            self._commit(Position(unit=self.position.unit + 1, global_step=self.position.global_step))

    def _train(self, unit: Unit) -> None:
        index, start = self.position.unit, self.position.step
        begin = time.perf_counter() - self.position.train_seconds
        engine, method = self.engine, self.method
        micro_batches = Lookahead(
            lambda step: unit.micro_batches(step, engine.rank, engine.world_size, engine.device),
            unit.plan.steps if unit.collator.prefetched else 0,
        )
        context = TaskContext(
            index=index,
            name=unit.name,
            steps=unit.plan.steps,
            micro_batches=micro_batches,
            normaliser=lambda step: unit.normaliser(step, engine.world_size),
            global_batch=unit.plan.global_batch,
            sizes=tuple(earlier.plan.n_rows for earlier in self.units[: index + 1]),
            class_means=self.alignment.means() if self.alignment else None,
            fetch=self._fetch,
        )
        engine.module.train()
        passes = _Passes(engine.module, self.position.passes)
        self._seed(index, start)
        if start:
            method.resume_task(context, engine, self.bank)
        else:
            self.hooks.stage(index, unit.name, method.preparation)
            engine.reset_optimizer()
            method.begin_task(context, engine, self.bank)
        bad = 0
        for step in range(start + 1, unit.plan.steps + 1):
            record = self._step(context, unit, step)
            bad = 0 if record.good else bad + 1
            if bad >= min(self.options.max_bad_steps, unit.plan.steps):
                raise TreeLoRAError(
                    f"task {unit.name!r}, step {step}: loss {record.loss}, gradient norm {record.grad_norm}; not "
                    f"finite for {bad} steps in a row. The last commit is intact; lower train.learning_rate"
                )
            seconds = time.perf_counter() - begin
            self.position = Position(index, step, False, self.position.global_step + 1, seconds, passes.count)
            self.hooks.stepped(record, unit.plan.steps)
            every = self.options.commit_every
            if step < unit.plan.steps and (self._leaving or (every and step % every == 0)):
                self._commit(self.position)
                self._leave_if_asked()
        micro_batches.close()
        method.end_task(engine)
        if self.alignment and not method.at_once:
            self._align(self.alignment, unit)
        self.bank.append(read_adapter(engine))
        method.merge_bank(self.bank)
        self.position = replace(self.position, passes=passes.stop(), train_seconds=time.perf_counter() - begin)

    def _step(self, task: TaskContext, unit: Unit, step: int) -> StepRecord:
        engine, method, options = self.engine, self.method, self.options
        begin = time.perf_counter()
        self._seed(task.index, step)
        lr = learning_rate(step, task.steps, options.learning_rate, options.warmup, options.min_lr)
        method.before_step(step)
        waiting = time.perf_counter()
        batches, normaliser = task.micro_batches(step - 1), task.normaliser(step - 1)
        waited = time.perf_counter() - waiting
        # the second number rides along, so that all ranks learn at the same step that one of them must go
        total = torch.tensor([0.0, float(self.hooks.leaving())], device=engine.device)
        for number, batch in enumerate(batches):
            loss, last = method.loss(engine, batch, normaliser), number == len(batches) - 1
            total[0] += loss.detach()
            penalty = method.penalty_loss(engine) if last else None
            engine.backward(loss if penalty is None else loss + penalty, last=last)
        value, leaving = engine.all_reduce(total, mean=True).tolist()
        self._leaving = leaving > 0
        norm: float = math.nan
        if math.isfinite(value):
            method.after_backward(engine)
            norm = float(engine.step(lr))
        else:
            engine.drop_gradients()
        if math.isfinite(norm):
            method.after_step(engine, lr)
        else:
            method.step_skipped()
        metrics = method.metrics()
        return StepRecord(
            global_step=self.position.global_step + 1,
            task=task.name,
            task_index=task.index,
            step=step,
            time_unix_ms=time.time_ns() // 1_000_000,
            loss=value,
            lr=lr,
            grad_norm=norm,
            tokens=unit.tokens(step - 1),
            rows=unit.plan.global_batch,
            peak_memory_mb=peak_memory_mb(engine.device),
            data_seconds=waited,
            arms=metrics.arms,
            **{name: float(v) for name, v in metrics.scalars.items()},
            step_seconds=time.perf_counter() - begin,
        )

    def _align(self, alignment: HeadAlignment, unit: Unit) -> None:
        index = self.position.unit
        self.hooks.stage(index, unit.name, "aligning the head")
        for task, split in zip(unit.tasks, unit.splits, strict=True):
            features_nF = self.evaluator.adapted_features(split)
            alignment.learn_task(task, features_nF, torch.from_numpy(split.rows.classes[split.chosen]))
        # rank 0's, because another kind of CPU may round otherwise
        self.engine.write_adapter(self.engine.broadcast(alignment.aligned(read_head(self.engine), index)))

    def _fetch(self, rows: Sequence[tuple[int, int]]) -> Batch:
        items = [self.units[unit].item(row) for unit, row in rows]
        return self.units[self.position.unit].collator(items, self.engine.device, None)

    def _judge(self, unit: Unit) -> None:
        index = self.position.unit
        begin = time.perf_counter()
        if not self.method.at_once:  # else there is one adapter at most, and nothing to choose
            for task, split in zip(unit.tasks, unit.splits, strict=True):
                self.hooks.stage(index, unit.name, "teaching the router")
                self.evaluator.learn_task(self.evaluator.tests[task].task.name, split)
        seen = [task for done in self.units[: index + 1] for task in done.tasks]
        unsure = self.evaluator.options.router_margin > 0
        past = self.method.task_tree(self.engine) if unsure and self.bank else None
        scores = self.evaluator.score(
            seen,
            max(seen),
            unit.name,
            self.bank,
            lambda mode: self.hooks.stage(index, unit.name, f"scoring {len(seen)} tasks, inference {mode}"),
            past.tree if past else None,
            past.groups if past else None,
        )
        if self.options.forward and self.method.trains and not self.method.joint:
            scores += self._unlearnt(index)
        router = self.evaluator.router_report(seen) if len(self.bank) == len(seen) else None
        steps = unit.plan.steps if self.method.trains else 0
        record = TaskRecord(
            task=unit.name,
            task_index=index,
            steps=steps,
            train_seconds=self.position.train_seconds,
            eval_seconds=time.perf_counter() - begin,
            tokens=sum(unit.tokens(step) for step in range(steps)),
            passes=self.position.passes,
            adapter_bytes=self._bank_bytes(),
            state_bytes=tensor_bytes(self.method.state_dict()) if self.method.trains else 0,
            router_accuracy=router.accuracy if router else None,
            fallback_share=router.fallback_share if router else None,
            mixed_up=router.mixed_up if router else None,
        )
        self.hooks.scored(scores, record)

    def _unlearnt(self, index: int) -> list[Score]:
        """Scores of the next unit before it is learnt, and of the first one as the base model has them."""
        name, scores = self.units[index].name, []
        if index == 0:
            scores += self.evaluator.score_unlearnt(0, index, name)[1:]
        if index + 1 < len(self.units):
            self.hooks.stage(index, name, f"scoring {self.units[index + 1].name} before it is learnt")
            scores += self.evaluator.score_unlearnt(index + 1, index, name)
        return scores

    def _bank_bytes(self) -> int:
        distinct = {id(state): state for state in self.bank}
        kept = self.bank[-1:] if self.method.accumulates else distinct.values()  # the last one holds all others
        return sum(tensor_bytes(state) for state in kept)

    def _commit(self, position: Position) -> None:
        self.position = position
        self.hooks.commit(position, self)

    def _leave_if_asked(self) -> None:
        if self._leaving:
            self.hooks.leave()

    def _seed(self, unit: int, step: int) -> None:
        torch.manual_seed(hash((self.options.seed, unit, step, self.engine.rank)) % 2**63)


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory held so far: of the GPU, or resident memory of the process, in MB (10^6 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class _Passes:
    """Counts the forward passes of a model, of whatever purpose."""

    def __init__(self, module: nn.Module, count: int):
        self.count = count
        # of a model that takes several passes for one call, what runs in each of them
        self._handle = getattr(module, "passed_through", module).register_forward_pre_hook(self._one)

    def _one(self, module: nn.Module, inputs: object) -> None:
        self.count += 1

    def stop(self) -> int:
        self._handle.remove()
        return self.count
