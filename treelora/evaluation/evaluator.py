"""Scores every task seen so far, in every inference mode, shared over the workers.

`last` answers with the adapter under training, `merged` with the mean of all tasks' adapters, `routed` with the
adapter of the task that a router takes the row for, or with an average where it can't tell two tasks apart
(`treelora.evaluation.fallback`); no mode is told the task. Where answers of one adapter on one row never change, they
are kept: `routed` mostly reuses what `last` has answered when the adapter was fresh.

Shapes: n rows, F features.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from treelora.adapters import AdapterState, mean_adapter
from treelora.engine import Engine
from treelora.evaluation.fallback import AVERAGE, adapter_key, adapter_of, answering_tasks
from treelora.evaluation.image_reader import ImageReader
from treelora.evaluation.matrix import BEFORE_TRAINING, Score
from treelora.evaluation.reader import EvaluationOptions, Reader, Row
from treelora.evaluation.router import GaussianRouter, Routes
from treelora.evaluation.text_metrics import METRICS
from treelora.memory_records import Groups
from treelora.training_data import Split, TestSplit
from treelora.tree import SignatureTree

MEAN, BASE = "mean", "base"


@dataclass(frozen=True)
class RouterReport:
    """How the router did on the test rows of the tasks seen so far."""

    accuracy: float
    """Percent taken for the right task."""
    fallback_share: float
    """Percent whose margin was below `router_margin`."""
    mixed_up: tuple[tuple[int, int, int], ...]
    """(task, the task that its rows were taken for, rows), where these differ."""


class Evaluator:
    """Judges one model on the test splits of a stream. All methods are collective."""

    def __init__(
        self,
        engine: Engine,
        tests: Sequence[TestSplit],
        options: EvaluationOptions,
        reader: Reader,
    ):
        self.engine, self.tests, self.options, self.reader = engine, tests, options, reader
        self.router = GaussianRouter()
        self._features: dict[int, Tensor] = {}
        self._answers: dict[tuple[str, Row], str] = {}

    def learn_task(self, name: str, train: Split) -> None:
        """Fit the router on a task's training rows, once; features are those of the frozen base model."""
        everything = self._features_of(train, range(len(train))) if self.reader.needs_features else None
        self.reader.learn(train, everything)
        if "routed" in self.options.modes and name not in self.router.names:
            places, classes = self.reader.router_rows(train)
            self.router.add_task(name, self._features_of(train, places), classes)

    def adapted_features(self, split: Split) -> Tensor:
        """What the head reads of all rows of a split of images, with the adapter as it is now: float32 [n, F]."""
        assert isinstance(self.reader, ImageReader)
        return self._features_of(split, range(len(split)), self.reader.adapted_features)

    def score(
        self,
        seen: Sequence[int],
        after: int,
        after_name: str,
        bank: Sequence[AdapterState],
        progress: Callable[[str], None] = lambda mode: None,
        tree: SignatureTree | None = None,
        groups: Groups | None = None,
    ) -> list[Score]:
        """Scores of the tasks `seen` once task `after` was learnt; `bank[k]` is task k's adapter.

        `tree`, over arms, and the tasks behind each arm say what is averaged where the router is unsure.
        The adapter under training is that of the last task, unless `bank` has a merged one for it. With an empty bank
        (nothing was trained) only `last` is scored.
        """
        if not self.reader.lasting:
            self._answers.clear()
        scores = []
        for mode in self.options.modes if bank else ("last",):
            if mode != "last" and len(bank) != len(seen):
                continue  # all tasks were learnt as one: there is nothing to merge or to route to
            progress(mode)
            begin = time.perf_counter()
            answers = self._routed(seen, bank, tree, groups) if mode == "routed" else self._answer(mode, seen, bank)
            seconds = (time.perf_counter() - begin) / len(seen)
            scores += [self._score(mode, task, after, after_name, answers, seconds) for task in seen]
        return scores

    def score_unlearnt(self, task: int, after: int, after_name: str) -> list[Score]:
        """Scores of a task that is still to be learnt, for FWT: with the adapter under training, then without.

        Both of inference `last`; the second is the base model's, recorded as before training.
        """
        rows, scores = [(task, row) for row in range(len(self.tests[task]))], []
        for key, adapter, index, name in (
            ("unlearnt", None, after, after_name),
            (BASE, self._no_adapter, BEFORE_TRAINING, ""),
        ):
            begin = time.perf_counter()
            answers = self._with_adapter(key, adapter, rows, range(task + 1))
            scores.append(self._score("last", task, index, name, answers, time.perf_counter() - begin))
        kept = self._answers.items()
        self._answers = {asked: answer for asked, answer in kept if asked[0] not in ("unlearnt", BASE)}
        return scores

    def router_report(self, seen: Sequence[int]) -> RouterReport | None:
        """What the router makes of the seen tasks' test prompts; None where there is no router."""
        if "routed" not in self.options.modes or not self.router.names:
            return None
        routes = {task: self._routes(task) for task in seen}
        taken = {task: np.bincount(r.best_n, minlength=len(self.router.names)) for task, r in routes.items()}
        unsure = np.concatenate([r.margin_n < self.options.router_margin for r in routes.values()])
        return RouterReport(
            accuracy=100 * sum(int(counts[task]) for task, counts in taken.items()) / len(unsure),
            fallback_share=100 * float(unsure.mean()),
            mixed_up=tuple(
                (task, int(other), int(counts[other]))
                for task, counts in taken.items()
                for other in np.flatnonzero(counts)
                if other != task
            ),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Router, what the reader keeps, and kept answers, as tensors.

        The answers belong to it: which rows share a batch depends on them, and so do the last bits of a score.
        """
        kept = [[key, *row, answer] for (key, row), answer in self._answers.items()]
        answers = torch.frombuffer(bytearray(json.dumps(kept).encode()), dtype=torch.uint8)
        router = self.router.state_dict() if self.router.names else {}
        parts = {"router": router, "reader": self.reader.state_dict()}
        return {"answers": answers} | {
            f"{part}/{name}": t for part, state in parts.items() for name, t in state.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to `state_dict`."""
        answers = json.loads(bytes(state["answers"].tolist()))
        self._answers = {(key, (task, row)): answer for key, task, row, answer in answers}
        self.router = router_of(state)
        self.reader.load_state_dict(reader_state(state))

    def _score(
        self, mode: str, task: int, after: int, after_name: str, answers: Mapping[Row, str], seconds: float
    ) -> Score:
        test = self.tests[task]
        return Score(
            mode=mode,
            task=test.task.name,
            after_task=after_name,
            task_index=task,
            after_index=after,
            metric=test.task.metric,
            score=self._measure(test, [answers[task, row] for row in range(len(test))]),
            rows=len(test),
            seconds=seconds,
        )

    def _no_adapter(self) -> AdapterState:
        tensors = self.engine.adapter_tensors().items()
        return {name: torch.zeros(tensor.shape) for name, tensor in tensors if ".lora_B." in name}

    def _answer(self, mode: str, seen: Sequence[int], bank: Sequence[AdapterState]) -> dict[Row, str]:
        rows = [(task, row) for task in seen for row in range(len(self.tests[task]))]
        current = f"task {len(bank) - 1}"
        if mode == "last":
            return self._with_adapter(current, None, rows, seen)
        if len(bank) == 1:
            return self._with_adapter(current, None, rows, seen)
        answers = self._with_adapter(MEAN, lambda: mean_adapter(bank), rows, seen)
        self._answers = {asked: answer for asked, answer in self._answers.items() if asked[0] != MEAN}
        return answers  # not kept: the next task changes the mean

    def _routed(
        self, seen: Sequence[int], bank: Sequence[AdapterState], tree: SignatureTree | None, groups: Groups | None
    ) -> dict[Row, str]:
        chosen: dict[tuple[int, ...], list[Row]] = {}
        for task in seen:
            answering = answering_tasks(self._routes(task), self.options.router_margin, tree, groups)
            for row, tasks in enumerate(answering):
                chosen.setdefault(tasks, []).append((task, row))
        answers: dict[Row, str] = {}
        used: set[str] = set()
        for tasks in sorted(chosen):
            key = adapter_key(bank, tasks)
            adapter = None if key == f"task {len(bank) - 1}" else partial(adapter_of, bank, tasks)
            answers |= self._with_adapter(key, adapter, chosen[tasks], seen)
            used.add(key)
        # of the averages only those that were asked for are kept: a tree that has changed may never ask again
        kept = self._answers.items()
        self._answers = {asked: a for asked, a in kept if asked[0] in used or not asked[0].startswith(AVERAGE)}
        return answers

    def _with_adapter(
        self, key: str, adapter: Callable[[], AdapterState] | None, rows: Sequence[Row], seen: Sequence[int]
    ) -> dict[Row, str]:
        missing = [row for row in rows if (key, row) not in self._answers]
        if missing:
            with self.engine.using_adapter(adapter() if adapter else None):
                for kind in self.reader.kinds:
                    part = [row for row in missing if self.tests[row[0]].task.kind == kind]
                    read = self.reader.base_answers if key == BASE else self.reader.answers
                    for row, answer in zip(part, self._shared(part, partial(read, kind, seen=seen)), strict=True):
                        self._answers[key, row] = answer
        return {row: self._answers[key, row] for row in rows}

    def _shared(self, rows: Sequence[Row], read: Callable[[Sequence[Row]], list[str]]) -> list[str]:
        """Answers of all rows, each worker computing its share; equal shares, because ZeRO-3 runs in lockstep."""
        world = self.engine.world_size
        if not rows:
            return []
        padded = list(rows) + [rows[0]] * (-len(rows) % world)
        parts = self.engine.gather(read(padded[self.engine.rank :: world]))
        return [parts[i % world][i // world] for i in range(len(rows))]

    def _measure(self, test: TestSplit, answers: Sequence[str]) -> float:
        references = [example.answer for example in test.examples]
        sources = [example.prompt for example in test.examples]
        return METRICS[test.task.metric](answers, references, sources)

    def _routes(self, task: int) -> Routes:
        if task not in self._features:
            self._features[task] = self._features_of(self.tests[task], range(len(self.tests[task])))
        # rank 0's: on another kind of CPU the last bits may differ, and every rank must take the same adapter
        return self.engine.broadcast(self.router.routes(self._features[task]))

    def _features_of(
        self, split: Split, places: Sequence[int], measure: Callable[[Split, Sequence[int]], Tensor] | None = None
    ) -> Tensor:
        world = self.engine.world_size
        padded = [*places, *[places[0]] * (-len(places) % world)]
        parts = self.engine.gather((measure or self.reader.features)(split, padded[self.engine.rank :: world]))
        return torch.stack([parts[i % world][i // world] for i in range(len(places))])


def reader_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the reader has kept, in an evaluator's `state_dict`."""
    return {name.removeprefix("reader/"): tensor for name, tensor in state.items() if name.startswith("reader/")}


def router_of(state: Mapping[str, Tensor]) -> GaussianRouter:
    """The router in an evaluator's `state_dict`; one without tasks where none was taught."""
    router = {name.removeprefix("router/"): tensor for name, tensor in state.items() if name.startswith("router/")}
    return GaussianRouter.from_state_dict(router) if router else GaussianRouter()
