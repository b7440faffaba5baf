"""Scores every task seen so far, in every inference mode, shared over the workers.

`last` answers with the adapter under training, `merged` with the mean of all tasks' adapters, `routed` with the
adapter of the task that a router takes the prompt for; no mode is told the task. Answers of one adapter on one row
never change, so they are kept: `routed` mostly reuses what `last` has answered when the adapter was fresh.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from treelora.adapters import AdapterState, mean_adapter
from treelora.engine import Engine
from treelora.evaluation.choice import score_choices
from treelora.evaluation.features import prompt_features
from treelora.evaluation.generate import generate_answers
from treelora.evaluation.matrix import Score
from treelora.evaluation.router import GaussianRouter
from treelora.evaluation.text_metrics import METRICS
from treelora.training_data import Split, TestSplit

MEAN = "mean"
Row = tuple[int, int]
"""(task, row of its test split)."""


@dataclass(frozen=True)
class EvaluationOptions:
    """See `EvaluationSettings` of the platform's configuration."""

    modes: tuple[str, ...] = ("last", "routed")
    batch_rows: int = 16
    max_new_tokens: int = 64
    router_layer: int = 8
    router_rows: int = 96


class Evaluator:
    """Judges one model on the test splits of a stream. All methods are collective."""

    def __init__(
        self,
        engine: Engine,
        tests: Sequence[TestSplit],
        options: EvaluationOptions,
        tokenizer: object,
        pad_id: int,
        partitioned: bool = False,
    ):
        self.engine, self.tests, self.options = engine, tests, options
        self.tokenizer, self.pad_id, self.partitioned = tokenizer, pad_id, partitioned
        self.router = GaussianRouter()
        self._features: dict[int, Tensor] = {}
        self._answers: dict[tuple[str, Row], str] = {}

    def learn_task(self, name: str, train: Split) -> None:
        """Fit the router on a task's training prompts, once; features are those of the frozen base model."""
        if "routed" in self.options.modes and name not in self.router.names:
            self.router.add_task(name, self._prompt_features(train.prompts(self.options.router_rows)))

    def score(
        self,
        seen: Sequence[int],
        after: int,
        after_name: str,
        bank: Sequence[AdapterState],
        progress: Callable[[str], None] = lambda mode: None,
    ) -> list[Score]:
        """Scores of the tasks `seen` once task `after` was learnt; `bank[k]` is task k's adapter.

        The adapter under training is that of the last task, unless `bank` has a merged one for it. With an empty bank
        (nothing was trained) only `last` is scored.
        """
        scores = []
        for mode in self.options.modes if bank else ("last",):
            if mode != "last" and len(bank) != len(seen):
                continue  # all tasks were learnt as one: there is nothing to merge or to route to
            progress(mode)
            begin = time.perf_counter()
            answers = self._answer(mode, seen, bank)
            seconds = (time.perf_counter() - begin) / len(seen)
            for task in seen:
                test = self.tests[task]
                scores.append(
                    Score(
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
                )
        return scores

    def router_accuracy(self, seen: Sequence[int]) -> float | None:
        """Percent of the seen tasks' test prompts that the router takes for the right task."""
        if "routed" not in self.options.modes or not self.router.names:
            return None
        return 100 * float(np.mean(np.concatenate([self._route(task) == task for task in seen])))

    def state_dict(self) -> dict[str, Tensor]:
        """Router and kept answers, as tensors.

        The answers belong to it: which rows share a batch depends on them, and so do the last bits of a score.
        """
        kept = [[key, *row, answer] for (key, row), answer in self._answers.items()]
        answers = torch.frombuffer(bytearray(json.dumps(kept).encode()), dtype=torch.uint8)
        router = self.router.state_dict() if self.router.names else {}
        return {"answers": answers} | {f"router/{name}": tensor for name, tensor in router.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to `state_dict`."""
        kept = json.loads(bytes(state["answers"].tolist()))
        self._answers = {(key, (task, row)): answer for key, task, row, answer in kept}
        router = {k.removeprefix("router/"): tensor for k, tensor in state.items() if k.startswith("router/")}
        self.router = GaussianRouter.from_state_dict(router) if router else GaussianRouter()

    def _answer(self, mode: str, seen: Sequence[int], bank: Sequence[AdapterState]) -> dict[Row, str]:
        rows = [(task, row) for task in seen for row in range(len(self.tests[task]))]
        current = f"task {len(bank) - 1}"
        if mode == "last":
            return self._with_adapter(current, None, rows)
        if mode == "merged":
            if len(bank) == 1:
                return self._with_adapter(current, None, rows)
            answers = self._with_adapter(MEAN, mean_adapter(bank), rows)
            self._answers = {asked: answer for asked, answer in self._answers.items() if asked[0] != MEAN}
            return answers  # not kept: the next task changes the mean
        chosen = {(task, row): int(k) for task in seen for row, k in enumerate(self._route(task))}
        answers = {}
        for k, state in enumerate(bank):
            tasks = [task for task, other in enumerate(bank) if other is state]
            key = "task " + "+".join(map(str, tasks))
            adapter = None if key == current else state
            answers |= self._with_adapter(key, adapter, [row for row in rows if chosen[row] == k])
        return answers

    def _with_adapter(self, key: str, adapter: AdapterState | None, rows: Sequence[Row]) -> dict[Row, str]:
        missing = [row for row in rows if (key, row) not in self._answers]
        if missing:
            with self.engine.using_adapter(adapter):
                for kind in ("choice", "generation"):
                    part = [row for row in missing if self.tests[row[0]].task.kind == kind]
                    for row, answer in zip(part, self._shared(part, kind), strict=True):
                        self._answers[key, row] = answer
        return {row: self._answers[key, row] for row in rows}

    def _shared(self, rows: Sequence[Row], kind: str) -> list[str]:
        """Answers of all rows, each worker computing its share; equal shares, because ZeRO-3 runs in lockstep."""
        world = self.engine.world_size
        if not rows:
            return []
        padded = list(rows) + [rows[0]] * (-len(rows) % world)
        mine = padded[self.engine.rank :: world]
        parts = self.engine.gather(self._choose(mine) if kind == "choice" else self._generate(mine))
        return [parts[i % world][i // world] for i in range(len(rows))]

    def _choose(self, rows: Sequence[Row]) -> list[str]:
        choices = [self._choice_ids(row) for row in rows]
        scores = score_choices(
            self.engine.module,
            [self._prompt_ids(row) for row in rows],
            choices,
            pad_id=self.pad_id,
            batch_rows=self.options.batch_rows,
            device=self.engine.device,
        )
        return [self.tests[t].examples[r].choices[int(s.argmax())] for (t, r), s in zip(rows, scores, strict=True)]

    def _generate(self, rows: Sequence[Row]) -> list[str]:
        return generate_answers(
            self.engine.module,
            self.tokenizer,  # type: ignore[arg-type]
            [self._prompt_ids(row) for row in rows],
            max_new_tokens=self.options.max_new_tokens,
            batch_rows=self.options.batch_rows,
            synced=self.partitioned,
            device=self.engine.device,
        )

    def _measure(self, test: TestSplit, answers: Sequence[str]) -> float:
        references = [example.answer for example in test.examples]
        sources = [example.prompt for example in test.examples]
        return METRICS[test.task.metric](answers, references, sources)

    def _route(self, task: int) -> np.ndarray:
        if task not in self._features:
            self._features[task] = self._prompt_features(self.tests[task].prompts())
        chosen, _ = self.router.predict(self._features[task])
        return chosen.numpy()

    def _prompt_features(self, prompts: list[list[int]]) -> Tensor:
        world = self.engine.world_size
        padded = prompts + [prompts[0]] * (-len(prompts) % world)
        mine = prompt_features(
            self.engine.module,
            padded[self.engine.rank :: world],
            layer=max(1, self.options.router_layer),
            pad_id=self.pad_id,
            batch_rows=self.options.batch_rows,
            device=self.engine.device,
        )
        parts = self.engine.gather(mine)
        return torch.stack([parts[i % world][i // world] for i in range(len(prompts))])

    def _prompt_ids(self, row: Row) -> list[int]:
        test = self.tests[row[0]]
        return test.rows.prompt_ids(int(test.chosen[row[1]])).tolist()

    def _choice_ids(self, row: Row) -> list[list[int]]:
        test = self.tests[row[0]]
        return [ids.tolist() for ids in test.rows.choice_ids(int(test.chosen[row[1]]))]
