"""`TextPredictor`: what a run on text has learnt, ready to answer prompts in one process.

Shapes: n prompts, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from treelora.data.prompting import PromptStyle, answer_with_end, cut_left, encode, resolve_frame
from treelora.engine import TorchEngine
from treelora.errors import DataError
from treelora.evaluation.choice import score_choices
from treelora.evaluation.features import prompt_features
from treelora.evaluation.generate import generate_answers
from treelora_platform.config import EvaluationSettings, ModelConfig
from treelora_platform.predict_io import Prompt
from treelora_platform.serving import Learnt, Predictor


class TextPredictor(Predictor):
    """Answers prompts; see `Predictor`.

    Args:
        tokenizer: Of the base model.
        model: The run's settings: template, lengths.
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
        super().__init__(engine, learnt, evaluation, inference, task)
        self.tokenizer, self.model, self.choices = tokenizer, model, choices
        self.frame = resolve_frame(tokenizer, PromptStyle(model.template, model.system_prompt))
        self._ids: dict[tuple[bool, str], list[int]] = {}

    def _features(self, rows: Sequence[_Row]) -> Tensor:
        return prompt_features(
            self.engine.module,
            [self._fitted(row, self._choice_ids(row, row.prompt.choices or ())) for row in rows],
            layer=max(1, self.evaluation.router_layer),
            pad_id=self.tokenizer.pad_token_id,
            batch_rows=self.evaluation.batch_rows,
            device=self.engine.device,
        )

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
