"""The first step of a task in a protected slice: its passes show what layers read, before there is an A to learn with.

While B is zero neither a pass nor its result depends on A. So A is designed when they are done, and B's gradient, which
does depend on it, is computed from what came to A and from the gradients at the layers' outputs: scale g^T (x A^T),
summed over tokens. These two are kept from the passes to the end of the step; an A that is trained keeps the first of
them in every step.

Shapes: S tokens of a micro-batch, O outputs, d inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from treelora.adapters import ADAPTER
from treelora.input_space import InputMoments
from treelora.watching import Seen

UNREAD = 1e-6
"""Tokens whose |g|^2 is less than this share of the mean don't count as inputs: padding, and what is zero but for
rounding, as for the query of a row's first token."""


class FirstStep:
    """What its passes show on this worker, all micro-batches together."""

    def __init__(self, layers: Sequence[tuple[str, Any]], inputs: InputMoments) -> None:
        """With the adapted modules by name, and empty moments."""
        self.layers, self.inputs = layers, inputs
        self._passes: list[list[Seen]] = [[] for _ in layers]

    def saw(self, layer: int, seen: Seen) -> None:
        """Take in what a pass shows of a layer."""
        self.inputs.add(layer, seen.x, read_at_all(seen.g))
        self._passes[layer].append(seen)

    def gradients(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """B's gradients [O, r] by layer, with these A [r, d]; of this worker's loss."""
        found = {}
        for (name, module), passes in zip(self.layers, self._passes, strict=True):
            products = [seen.g.float().T @ (seen.entered.float() @ rows[name].T) for seen in passes]
            found[name] = module.scaling[ADAPTER] * torch.stack(products).sum(0)
        return found


def read_at_all(g_SO: Tensor) -> Tensor:
    """Which tokens the loss depends on: bool [S]."""
    squares_S = g_SO.float().square().sum(-1)
    return squares_S > UNREAD * squares_S.mean()
