"""What past tasks protect of each layer's inputs, all of it or as much as a number of bytes holds.

Where there isn't room for all directions V [d, p] of a layer, those that are read least are given up first. How much of
what each past task reads lies along them is kept for that,

    C = sum over tasks of V^T M V / trace M

in V's own coordinates. V is turned to the eigenvectors of C, so that C is its diagonal; the sum of the last k entries
is then the least that giving up k directions can cost. That is the shrinking of an incremental principal component
analysis, or of frequent directions (arXiv 1501.01711) with nothing taken off the rest.

Shapes: d inputs of a layer, p protected directions, K columns of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from treelora.input_space import Spectrum, protect

DIRECTIONS, READ = "protected/", "read_along/"


class Weighed(NamedTuple):
    """A layer's protected directions, and what is read along them where that must be known."""

    space: Tensor
    """Orthonormal [d, p] float32; what is read most first, where that is known."""
    read: Tensor
    """The entries of C, [p] float32: shares of what a task reads, added up; [0] where there is room for all."""


class ProtectedSpaces:
    """Of all layers, as they grow from task to task."""

    def __init__(self, share: float, room: int | None = None) -> None:
        """share: of what a task reads. room: bytes for all layers together (None: any number)."""
        self.share, self.room = share, room
        self.layers: dict[str, Weighed] = {}

    def space(self, layer: str) -> Tensor | None:
        """A layer's protected directions [d, p]; None before the first task has ended."""
        known = self.layers.get(layer)
        return known.space if known else None

    def grown(self, layer: str, spectrum: Spectrum) -> Weighed:
        """A layer's as they are with what one more task reads; `keep` then takes in all layers'."""
        known = self.layers.get(layer)
        space_dp = protect(spectrum, known.space if known else None, self.share)
        if self.room is None:
            return Weighed(space_dp, torch.zeros(0))
        return weigh(spectrum, space_dp, known.read if known else torch.zeros(0))

    def keep(self, layers: Mapping[str, Weighed]) -> None:
        """Have these from now on, or as many of their directions as there is room for."""
        self.layers = dict(layers) if self.room is None else within(layers, self.room)

    def state_dict(self) -> dict[str, Tensor]:
        """As tensors."""
        spaces = {DIRECTIONS + layer: weighed.space for layer, weighed in self.layers.items()}
        if self.room is None:
            return spaces
        return spaces | {READ + layer: weighed.read for layer, weighed in self.layers.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to `state_dict`, which may be part of a larger one."""
        layers = [key.removeprefix(DIRECTIONS) for key in state if key.startswith(DIRECTIONS)]
        self.layers = {
            layer: Weighed(state[DIRECTIONS + layer], state.get(READ + layer, torch.zeros(0))) for layer in layers
        }


def weigh(spectrum: Spectrum, space_dp: Tensor, read_q: Tensor) -> Weighed:
    """Take in what one more task reads.

    Args:
        spectrum: The task's.
        space_dp: What is protected, the task's own new directions behind those that were before.
        read_q: What tasks before it read along the first q of them.
    """
    vectors_dK, values_K, trace = spectrum
    space_dp = space_dp.double()
    half_pK = space_dp.T @ (vectors_dK * values_K.sqrt())
    c_pp = half_pK @ half_pK.T / (trace or 1.0)  # the trace of a layer that isn't read is zero, as C is
    c_pp.diagonal()[: len(read_q)] += read_q
    values_p, turn_pp = torch.linalg.eigh(c_pp)
    return Weighed((space_dp @ turn_pp.flip(1)).float(), values_p.flip(0).clamp_min(0).float())


def direction_bytes(width: int) -> int:
    """What a direction of a layer with so many inputs takes, and what is read along it."""
    return 4 * (width + 1)


def within(layers: Mapping[str, Weighed], room: int) -> dict[str, Weighed]:
    """As many directions as `room` bytes hold, those that are read most for their bytes; of ties the first layer's."""
    costs = {name: direction_bytes(len(weighed.space)) for name, weighed in layers.items()}
    offers = [(float(read) / costs[name], name) for name, weighed in layers.items() for read in weighed.read]
    kept = dict.fromkeys(layers, 0)
    for _, name in sorted(offers, key=lambda offer: -offer[0]):
        if costs[name] > room:
            break
        room -= costs[name]
        kept[name] += 1
    return {
        name: Weighed(space_dp[:, : kept[name]].contiguous(), read_p[: kept[name]])
        for name, (space_dp, read_p) in layers.items()
    }
