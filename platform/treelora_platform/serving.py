"""`Predictor`: what a run has learnt, ready to answer prompts in one process; no label is needed.

The base model is held once, and every adapter beside it. Prompts are taken a round at a time: all are routed, by the
frozen model's first layers, and then each adapter is written into the model once and answers those that are its own.

Shapes: n prompts, F features.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from treelora.adapters import AdapterState, mean_adapter
from treelora.data.prompting import PromptStyle, answer_with_end, cut_left, encode, resolve_frame
from treelora.engine import TorchEngine
from treelora.errors import DataError
from treelora.evaluation.choice import score_choices
from treelora.evaluation.fallback import adapter_key, adapter_of, answering_tasks
from treelora.evaluation.features import prompt_features
from treelora.evaluation.generate import generate_answers
from treelora.evaluation.router import GaussianRouter, Routes
from treelora.memory_records import Past
from treelora_platform.config import EvaluationSettings, ModelConfig
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


class Predictor:
    """Answers prompts as the run's evaluator would.

    Args:
        engine: The base model with room for an adapter.
        learnt: What the run has learnt.
        model, evaluation: The run's settings: template, lengths, batches, router.
        inference: last, merged or routed.
        task: Place of the task whose adapter answers everything; `inference` plays no part then.
        choices: For prompts that don't bring their own; (): free text; None: those of the task that a prompt is
            taken for.
    """

    def __init__(
        self,
        engine: TorchEngine,
        tokenizer: Any,
        learnt: Learnt,
        model: ModelConfig,
        evaluation: EvaluationSettings,
        inference: str,
        task: int | None = None,
        choices: tuple[str, ...] | None = None,
    ):
        self.engine, self.tokenizer, self.learnt = engine, tokenizer, learnt
        self.model, self.evaluation = model, evaluation
        self.inference, self.task, self.choices = inference, task, choices
        self.frame = resolve_frame(tokenizer, PromptStyle(model.template, model.system_prompt))
        self.cut = 0
        """Prompts that lost their beginning so far, because they were longer than the run's max_length."""
        self._loaded = ""
        self._averages: dict[str, AdapterState] = {}
        self._ids: dict[tuple[bool, str], list[int]] = {}

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

    def _features(self, rows: Sequence[_Row]) -> Tensor:
        return prompt_features(
            self.engine.module,
            [self._fitted(row, self._choice_ids(row, row.prompt.choices or ())) for row in rows],
            layer=max(1, self.evaluation.router_layer),
            pad_id=self.tokenizer.pad_token_id,
            batch_rows=self.evaluation.batch_rows,
            device=self.engine.device,
        )

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

    def _turn(self, rows: Sequence[_Row], tasks: Sequence[str | None]) -> list[str]:
        """Answers with the adapter that is loaded, to rows taken for these tasks."""
        choices = [self._choices(row, task) for row, task in zip(rows, tasks, strict=True)]
        tokens = [self._choice_ids(row, own) for row, own in zip(rows, choices, strict=True)]
        prompts = [self._fitted(row, own) for row, own in zip(rows, tokens, strict=True)]
        self.cut += sum(len(ids) < len(row.ids) for ids, row in zip(prompts, rows, strict=True))
        common: dict[str, Any] = {"batch_rows": self.evaluation.batch_rows, "device": self.engine.device}
        answers = [""] * len(rows)
        if chosen := [i for i, own in enumerate(choices) if own]:
            scores = score_choices(
                self.engine.module,
                [prompts[i] for i in chosen],
                [tokens[i] for i in chosen],
                pad_id=self.tokenizer.pad_token_id,
                **common,
            )
            for i, score in zip(chosen, scores, strict=True):
                answers[i] = choices[i][int(score.argmax())]
        if written := [i for i, own in enumerate(choices) if not own]:
            texts = generate_answers(
                self.engine.module,
                self.tokenizer,
                [prompts[i] for i in written],
                max_new_tokens=self.evaluation.max_new_tokens,
                **common,
            )
            for i, text in zip(written, texts, strict=True):
                answers[i] = text
        return answers

    def _choices(self, row: _Row, task: str | None) -> tuple[str, ...]:
        for choices in (row.prompt.choices, self.choices):
            if choices is not None:
                return choices
        return self.learnt.choices.get(task, ()) if task is not None else ()

    def _rows(self, prompts: Sequence[Prompt]) -> list[_Row]:
        texts = [self.frame.prompt_text(prompt.text) for prompt in prompts]
        rows = zip(prompts, texts, encode(self.tokenizer, texts), strict=True)
        tokenised = [_Row(prompt, text, [*self.frame.bos_ids, *ids]) for prompt, text, ids in rows]
        for row in tokenised:
            if not row.ids:
                raise DataError(f"{row.prompt.where}: the prompt makes no tokens; remove it")
        return tokenised

    def _choice_ids(self, row: _Row, choices: Sequence[str]) -> list[list[int]]:
        """Tokens of each choice, with what ends an answer; equal texts are tokenised once."""
        tokens = []
        for choice in choices:
            key = (row.text[-1:].isspace(), choice)
            if key not in self._ids:
                try:
                    self._ids[key] = answer_with_end(self.tokenizer, self.frame, row.text, choice)
                except DataError as error:
                    raise DataError(f"{row.prompt.where}: {error}") from None
            tokens.append(self._ids[key])
        return tokens

    def _fitted(self, row: _Row, choice_ids: Sequence[Sequence[int]]) -> list[int]:
        """The prompt's tokens, cut on the left where they leave no room for the longest choice, or for one token."""
        most = self.model.max_length
        longest = max(map(len, choice_ids), default=1)
        room = most - longest
        if room < 1:
            raise DataError(
                f"{row.prompt.where}: a choice has {longest} tokens, the run's max_length is {most}; shorten it"
            )
        if len(row.ids) > room and self.model.long_rows == "refuse":
            raise DataError(
                f"{row.prompt.where}: the prompt has {len(row.ids)} tokens, there is room for {room} (model.max_length "
                f"{most}, and the run refuses long rows); shorten it"
            )
        return cut_left(row.ids, self.frame.head_ids, room)


@dataclass(frozen=True)
class _Row:
    """A prompt, in its template, and as tokens."""

    prompt: Prompt
    text: str
    ids: list[int]
