"""`Predictor`: what a run has learnt, ready to answer in one process; no label is needed.

The base model is held once, and every adapter beside it. Prompts are taken a round at a time: all are routed, by the
frozen model's first layers, and then each adapter is written into the model once and answers those that are its own.

Shapes: n prompts, F features.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from treelora.adapters import AdapterState, mean_adapter
from treelora.engine import TorchEngine
from treelora.evaluation.fallback import adapter_key, adapter_of, answering_tasks
from treelora.evaluation.router import GaussianRouter, Routes
from treelora.memory_records import Past
from treelora_platform.config import EvaluationSettings
from treelora_platform.predict_io import Answer, Prompt

ROUND = 16
"""Batches' worth of prompts in a round."""
AVERAGES_KEPT = 64


@dataclass(frozen=True)
class Learnt:
    """What a commit holds for answering."""

    last: AdapterState
    bank: Sequence[AdapterState]
    names: tuple[str, ...]
    """Of the bank's tasks, as far as they are known one by one."""
    choices: Mapping[str, tuple[str, ...]]
    """For each task what its answers are chosen from; (): free text."""
    router: GaussianRouter
    past: Past | None
    """The method's tree, where a margin asks for it."""


class Predictor(ABC):
    """Answers prompts as the run's evaluator would; what a prompt is, a text or an image, the kinds of it know.

    Args:
        engine: The base model with room for an adapter.
        learnt: What the run has learnt.
        evaluation: The run's settings: batches, router.
        inference: last, merged or routed.
        task: Place of the task whose adapter answers everything; `inference` plays no part then.
    """

    def __init__(
        self,
        engine: TorchEngine,
        learnt: Learnt,
        evaluation: EvaluationSettings,
        inference: str,
        task: int | None = None,
    ):
        self.engine, self.learnt, self.evaluation = engine, learnt, evaluation
        self.inference, self.task = inference, task
        self.cut = 0
        """Prompts that lost their beginning so far, because they were longer than the run's max_length."""
        self._loaded = ""
        self._averages: dict[str, AdapterState] = {}

    @abstractmethod
    def _rows(self, prompts: Sequence[Prompt]) -> list[Any]:
        """The prompts as the model takes them."""

    @abstractmethod
    def _features(self, rows: Sequence[Any]) -> Tensor:
        """What the router reads, [n, F]."""

    @abstractmethod
    def _turn(self, rows: Sequence[Any], tasks: Sequence[str | None]) -> list[str]:
        """Answers with the adapter that is loaded, to rows taken for these tasks."""

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[list[Answer]]:
        """Answers in order, a list for each round.

        Raises:
            DataError: a prompt or choice that makes no tokens, or doesn't fit; the message says where.
        """
        size = ROUND * self.evaluation.batch_rows
        for start in range(0, len(prompts), size):
            yield self._round(prompts[start : start + size])

    def features(self, prompts: Sequence[Prompt]) -> Tensor:
        """What the router reads of n prompts, [n, F]. Raises: as `answers`."""
        return self._features(self._rows(prompts))

    def load(self, tasks: Sequence[int] = ()) -> str:
        """Write an adapter into the model: the mean of some tasks', or without tasks that of `inference`.

        Returns its name; does nothing where it is there already.
        """
        key = adapter_key(self.learnt.bank, tasks) if tasks else self.inference
        if key != self._loaded:
            self.engine.write_adapter(self._adapter(key, tasks))
            self._loaded = key
        return key

    def _round(self, prompts: Sequence[Prompt]) -> list[Answer]:
        begin = time.perf_counter()
        rows = self._rows(prompts)
        routed = self.task is None and self.inference == "routed"
        routes = self.learnt.router.routes(self._features(rows)) if routed else None
        answering: list[tuple[int, ...]] = [() if self.task is None else (self.task,)] * len(rows)
        if routes:
            past, margin = self.learnt.past, self.evaluation.router_margin
            answering = answering_tasks(routes, margin, past.tree if past else None, past.groups if past else None)
        routing_ms = 1000 * (time.perf_counter() - begin) / len(rows)
        turns: dict[tuple[int, ...], list[int]] = {}
        for i, tasks in enumerate(answering):
            turns.setdefault(tasks, []).append(i)
        found: dict[int, Answer] = {}
        for tasks, members in turns.items():
            begin = time.perf_counter()
            self.load(tasks)
            taken = [self._name(routes.best_n[i] if routes else self.task) for i in members]
            texts = self._turn([rows[i] for i in members], taken)
            ms = round(routing_ms + 1000 * (time.perf_counter() - begin) / len(members), 3)
            for i, task, text in zip(members, taken, texts, strict=True):
                found[i] = Answer(prompts[i].id, prompts[i].text, text, task, *self._doubt(routes, i), ms)
        return [found[i] for i in range(len(rows))]

    def _doubt(self, routes: Routes | None, i: int) -> tuple[float | None, str | None, bool]:
        """Margin, runner-up, and whether the average answers."""
        if routes is None or routes.second_n[i] < 0:
            return None, None, False
        margin = float(routes.margin_n[i])
        return margin, self._name(routes.second_n[i]), margin < self.evaluation.router_margin

    def _name(self, task: int | None) -> str | None:
        return None if task is None else self.learnt.names[task]

    def _adapter(self, key: str, tasks: Sequence[int]) -> AdapterState:
        if not tasks and (key == "last" or len(self.learnt.bank) == 1):
            return self.learnt.last
        if len(tasks) == 1:
            return self.learnt.bank[tasks[0]]
        if key not in self._averages:
            while len(self._averages) >= AVERAGES_KEPT:
                del self._averages[next(iter(self._averages))]
            bank = self.learnt.bank
            self._averages[key] = adapter_of(bank, tasks) if tasks else mean_adapter(bank)
        return self._averages[key]
