"""`Reader`: how the rows of one kind of data are answered and what features they have; and the reader of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from treelora.engine import Engine
from treelora.evaluation.choice import score_choices
from treelora.evaluation.features import prompt_features
from treelora.evaluation.frozen_cache import FrozenCache
from treelora.evaluation.generate import generate_answers
from treelora.training_data import Split, TestSplit

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
    router_margin: float = 0.0


class Reader(Protocol):
    """Answers rows with the engine's current adapter. What a call is given is this worker's share; collective."""

    kinds: tuple[str, ...]
    """Of tasks, in the order in which their rows are answered."""
    lasting: bool
    """Whether one adapter's answer on a row stays what it is while more tasks are learnt."""

    def answers(self, kind: str, rows: Sequence[Row], seen: Sequence[int]) -> list[str]:
        """An answer a row, where the tasks `seen` were learnt."""
        ...

    def base_answers(self, kind: str, rows: Sequence[Row], seen: Sequence[int]) -> list[str]:
        """The same while the engine computes without adapter."""
        ...

    def features(self, split: Split, places: Sequence[int]) -> Tensor:
        """What the frozen base model makes of rows of a split: float32 [n, F] on the CPU."""
        ...

    def router_rows(self, train: Split) -> tuple[list[int], Tensor | None]:
        """Rows of a training split that teach the router, and their classes if each is to be known by itself."""
        ...

    def learn(self, train: Split, features_nF: Tensor | None) -> None:
        """A task was learnt; `features_nF` are those of all its rows if `needs_features`."""
        ...

    @property
    def needs_features(self) -> bool:
        """Whether `learn` wants features."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What `learn` has kept."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to `state_dict`."""
        ...


class TextReader:
    """Answers prompts: the likeliest of their choices, or generated text."""

    kinds: tuple[str, ...] = ("choice", "generation")
    lasting = True
    needs_features = False

    def __init__(
        self,
        engine: Engine,
        tests: Sequence[TestSplit],
        options: EvaluationOptions,
        tokenizer: Any,
        partitioned: bool = False,
        cache: FrozenCache | None = None,
    ):
        self.engine, self.tests, self.options = engine, tests, options
        self.tokenizer, self.pad_id, self.partitioned = tokenizer, tokenizer.pad_token_id, partitioned
        # where weights are partitioned, ranks compute in lockstep, and one must not find what another lacks
        self.cache = None if partitioned else cache

    def answers(self, kind: str, rows: Sequence[Row], seen: Sequence[int]) -> list[str]:
        """See `Reader`."""
        return self._choose(rows) if kind == "choice" else self._generate(rows)

    def base_answers(self, kind: str, rows: Sequence[Row], seen: Sequence[int]) -> list[str]:
        """See `Reader`."""
        if kind != "choice" or not self.cache:
            return self.answers(kind, rows, seen)
        asked = [[self._prompt_ids(row), self._choice_ids(row)] for row in rows]
        return self.cache.answers([self.options.batch_rows, asked], lambda: self._choose(rows))

    def features(self, split: Split, places: Sequence[int]) -> Tensor:
        """See `Reader`."""
        prompts = [split.rows.prompt_ids(int(split.chosen[place])).tolist() for place in places]
        layer = max(1, self.options.router_layer)

        def compute() -> Tensor:
            return prompt_features(
                self.engine.module,
                prompts,
                layer=layer,
                pad_id=self.pad_id,
                batch_rows=self.options.batch_rows,
                device=self.engine.device,
            )

        return self.cache.features([layer, self.options.batch_rows, prompts], compute) if self.cache else compute()

    def router_rows(self, train: Split) -> tuple[list[int], Tensor | None]:
        """See `Reader`."""
        return list(range(min(len(train), self.options.router_rows))), None

    def learn(self, train: Split, features_nF: Tensor | None) -> None:
        """See `Reader`."""

    def state_dict(self) -> dict[str, Tensor]:
        """See `Reader`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Reader`."""

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
            self.tokenizer,
            [self._prompt_ids(row) for row in rows],
            max_new_tokens=self.options.max_new_tokens,
            batch_rows=self.options.batch_rows,
            synced=self.partitioned,
            device=self.engine.device,
        )

    def _prompt_ids(self, row: Row) -> list[int]:
        test = self.tests[row[0]]
        return test.rows.prompt_ids(int(test.chosen[row[1]])).tolist()

    def _choice_ids(self, row: Row) -> list[list[int]]:
        test = self.tests[row[0]]
        return [ids.tolist() for ids in test.rows.choice_ids(int(test.chosen[row[1]]))]
