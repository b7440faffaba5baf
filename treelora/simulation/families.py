"""Synthetic tasks whose families are known: gradients in two levels of families, crossed with an answer vocabulary.

Shapes: N tasks, L layers, D_l numbers of layer l's gradient, K sketch numbers a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from treelora.errors import ConfigError
from treelora.sketch import CountSketch, normalise


@dataclass(frozen=True)
class FamilyDesign:
    """How many tasks, and how long each component of their gradients is. Raises: ConfigError.

    A task is one of `repeats` for a pair of a family and a vocabulary: the two are crossed, so that neither
    labeling tells anything about the other. Its gradient of layer l is

        common + rule_l (superfamily + family) + words_l vocabulary + own + noise

    where each component is a fixed random direction for its label (own: of the task; noise: of the measurement)
    times the length below. rule_l and words_l, drawn for each layer between 0 and 1, say how much the layer
    knows of the rule and of the answer's words. Layers have sizes in turn, as q and v projections have.
    """

    superfamilies: int = 2
    families: int = 2  # of each superfamily
    vocabularies: int = 3
    repeats: int = 2
    layers: int = 12
    layer_dims: tuple[int, ...] = (1152, 384)
    sketch_size: int = 64
    common: float = 1.0
    superfamily: float = 0.5
    family: float = 0.6
    vocabulary: float = 0.4
    own: float = 0.8
    noise: float = 0.25

    def __post_init__(self) -> None:
        counts = (self.superfamilies, self.families, self.vocabularies, self.repeats, self.layers, *self.layer_dims)
        lengths = (self.common, self.superfamily, self.family, self.vocabulary, self.own, self.noise)
        if min(counts) < 1 or self.tasks < 2:
            raise ConfigError(f"families: {self}: every count must be at least 1, and at least 2 tasks come of them")
        if not (np.isfinite(lengths).all() and min(lengths) >= 0 and max(lengths) > 0):
            raise ConfigError(f"families: {self}: lengths must be finite and not negative, and one of them above 0")

    @property
    def tasks(self) -> int:
        """N."""
        return self.superfamilies * self.families * self.vocabularies * self.repeats


@dataclass(frozen=True, eq=False)
class FamilyTasks:
    """signatures: [N, L, K] normalised sketches in the stream's order. labels: labeling -> a label a task."""

    signatures: np.ndarray
    labels: dict[str, list[int]]


def draw_families(design: FamilyDesign, seed: int) -> FamilyTasks:
    """Tasks in a random order, so that the time at which a task comes says nothing about its family."""
    rng = np.random.default_rng(seed)
    per_family = design.vocabularies * design.repeats
    order = rng.permutation(design.tasks)
    family = order // per_family
    superfamily, vocabulary = family // design.families, order % per_family // design.repeats
    relevance_L2 = rng.uniform(size=(design.layers, 2))
    dims = [design.layer_dims[layer % len(design.layer_dims)] for layer in range(design.layers)]
    sketch = CountSketch(dims, design.sketch_size, seed)

    layers = []
    for dim, (rule, words) in zip(dims, relevance_L2, strict=True):
        common, *by_label = (
            rng.normal(size=(count, dim)) / np.sqrt(dim)
            for count in (1, design.superfamilies, family.max() + 1, design.vocabularies, design.tasks, design.tasks)
        )
        gradient_ND = design.common * common + rule * design.superfamily * by_label[0][superfamily]
        gradient_ND = gradient_ND + rule * design.family * by_label[1][family]
        gradient_ND = gradient_ND + words * design.vocabulary * by_label[2][vocabulary]
        layers.append(gradient_ND + design.own * by_label[3] + design.noise * by_label[4])
    signatures = [
        normalise(sketch.sketch([torch.from_numpy(layer[task]) for layer in layers])).numpy()
        for task in range(design.tasks)
    ]
    labels = {"family": family, "superfamily": superfamily, "vocabulary": vocabulary}
    return FamilyTasks(np.stack(signatures), {name: values.tolist() for name, values in labels.items()})
