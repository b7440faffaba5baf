"""The reader of images: the likeliest class that the head, or the nearest mean of a class, gives.

Shapes: n rows, F features, C classes of the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from treelora.engine import Engine
from treelora.evaluation.batching import evaluating
from treelora.evaluation.features import adapters_off
from treelora.evaluation.reader import EvaluationOptions, Row
from treelora.image_data import ImageCollator, StreamClasses, StreamImages
from treelora.models.vision import pooled_features
from treelora.training_data import Split, TestSplit, choose_rows


class ImageReader:
    """Answers with the class of the largest logit among those that a row may be taken for."""

    kinds: tuple[str, ...] = ("image",)
    lasting = False
    """More classes become answerable, and the head that all adapters share changes."""
    needs_features = False

    def __init__(
        self,
        engine: Engine,
        tests: Sequence[TestSplit],
        options: EvaluationOptions,
        classes: StreamClasses,
        collator: ImageCollator,
    ):
        self.engine, self.tests, self.options = engine, tests, options
        self.classes, self.collator = classes, collator

    def answers(self, kind: str, rows: Sequence[Row], seen: Sequence[int]) -> list[str]:
        """See `Reader`."""
        places: list[int] = []
        with evaluating(self.engine.module):
            for some in self._batches(rows):
                images = [self.tests[task].rows.item(int(self.tests[task].chosen[row]))[0] for task, row in some]
                logits_nC = self.engine.module(pixel_values=self.collator.pixels(images, self.engine.device)).logits
                places += _best(logits_nC.float().cpu(), self.classes, some, seen)
        return [self.classes.names[place] for place in places]

    def base_answers(self, kind: str, rows: Sequence[Row], seen: Sequence[int]) -> list[str]:
        """See `Reader`."""
        return self.answers(kind, rows, seen)

    def features(self, split: Split, places: Sequence[int]) -> Tensor:
        """See `Reader`."""
        with evaluating(self.engine.module), adapters_off(self.engine.module):
            return self._pooled(split, places)

    def adapted_features(self, split: Split, places: Sequence[int]) -> Tensor:
        """What the head reads with the adapter as it is now: float32 [n, F] on the CPU."""
        with evaluating(self.engine.module):
            return self._pooled(split, places)

    def router_rows(self, train: Split) -> tuple[list[int], Tensor | None]:
        """See `Reader`: as many of each class as can be."""
        classes = train.rows.classes[train.chosen]
        places = choose_rows(classes, self.options.router_rows, 0)
        return places.tolist(), torch.from_numpy(classes[places])

    def learn(self, train: Split, features_nF: Tensor | None) -> None:
        """See `Reader`."""

    def state_dict(self) -> dict[str, Tensor]:
        """See `Reader`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Reader`."""

    def forget(self) -> None:
        """The test rows are others now."""

    def _pooled(self, split: Split, places: Sequence[int]) -> Tensor:
        rows: StreamImages = split.rows
        step, device = self.options.batch_rows, self.engine.device
        batches = (
            self.collator.pixels([rows.item(int(split.chosen[p]))[0] for p in places[i : i + step]], device)
            for i in range(0, len(places), step)
        )
        return torch.cat([part.cpu() for part in pooled_features(self.engine.module, batches)])

    def _batches(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        step = self.options.batch_rows
        return [rows[start : start + step] for start in range(0, len(rows), step)]


class NearestMeanReader(ImageReader):
    """Answers with the class whose mean of frozen features is nearest by angle: method `ncm`.

    Rebuffi et al. (CVPR 2017, arXiv 1611.07725) classify so by learnt features; on those of a frozen pre-trained model
    it is the baseline that Janson et al. (2022, arXiv 2210.04428) ask every continual learner to beat.
    """

    needs_features = True

    def __init__(self, *args: Any):
        """As `ImageReader`."""
        super().__init__(*args)
        self._sums: dict[int, Tensor] = {}
        self._known: dict[Row, Tensor] = {}

    def answers(self, kind: str, rows: Sequence[Row], seen: Sequence[int]) -> list[str]:
        """See `Reader`."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._known]
        for task in dict.fromkeys(task for task, _ in missing):
            places = [row for other, row in missing if other == task]
            features = self.features(self.tests[task], places)
            self._known |= {(task, row): feature for row, feature in zip(places, features, strict=True)}
        features_nF = F.normalize(torch.stack([self._known[row] for row in rows]), dim=1)
        scores_nC = torch.full((len(rows), len(self.classes.names)), -torch.inf)
        for place, total_F in self._sums.items():
            scores_nC[:, place] = features_nF @ F.normalize(total_F, dim=0)
        return [self.classes.names[place] for place in _best(scores_nC, self.classes, rows, seen)]

    def learn(self, train: Split, features_nF: Tensor | None) -> None:
        """See `Reader`."""
        assert features_nF is not None
        classes = train.rows.classes[train.chosen]
        for place in np.unique(classes).tolist():
            total_F = F.normalize(features_nF[torch.from_numpy(classes == place)], dim=1).sum(dim=0)
            # a class that several tasks have, domains say, goes on growing
            self._sums[place] = self._sums.get(place, torch.zeros_like(total_F)) + total_F

    def forget(self) -> None:
        """See `ImageReader`."""
        self._known.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """See `Reader`."""
        return {f"sum/{place}": total_F.clone() for place, total_F in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Reader`."""
        self._sums = {int(name.removeprefix("sum/")): total_F.clone() for name, total_F in state.items()}


def _best(scores_nC: Tensor, classes: StreamClasses, rows: Sequence[Row], seen: Sequence[int]) -> list[int]:
    masks = {task: torch.from_numpy(classes.answerable(task, seen)) for task in {task for task, _ in rows}}
    mask_nC = torch.stack([masks[task] for task, _ in rows])
    return scores_nC.masked_fill(~mask_nC, -torch.inf).argmax(dim=1).tolist()
