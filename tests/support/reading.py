"""What tests of `protect` and `guard` share: the tokens that a task's steps show, M written out, old losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from tests.support.regularising import context
from treelora.adapters import AdapterState
from treelora.loop import StreamLoop
from treelora.methods.reading import Reading
from treelora.objective import answer_loss
from treelora.watching import Seen

LAYERS, WIDTH = 4, 32
"""Adapted layers of the tiny model, and their inputs."""


class Shown(NamedTuple):
    """A layer's part in one backward pass."""

    measured: bool
    layer: int
    x: Tensor
    g: Tensor


@contextmanager
def shown_tokens(loop: StreamLoop) -> Iterator[list[list[Shown]]]:
    """What is shown of each task that the loop learns meanwhile."""
    tasks: list[list[Shown]] = []
    begin_task, saw = loop.method.begin_task, Reading._saw

    def begun(*args: Any) -> None:
        tasks.append([])
        begin_task(*args)

    def recorded(reading: Reading, layer: int, seen: Seen) -> None:
        tasks[-1].append(Shown(reading.measured, layer, seen.x.clone(), seen.g.clone()))
        saw(reading, layer, seen)

    with patch.object(loop.method, "begin_task", begun), patch.object(Reading, "_saw", recorded):
        yield tasks


def moments(task: Sequence[Shown]) -> Tensor:
    """M of each layer, [L, d, d]; all that was shown must have been measured."""
    m_Ldd = torch.zeros(LAYERS, WIDTH, WIDTH)
    for shown in task:
        assert shown.measured
        for x_d, g_O in zip(shown.x, shown.g, strict=True):
            m_Ldd[shown.layer] += g_O.square().sum() * torch.outer(x_d, x_d)
    return m_Ldd


def first_losses(loop: StreamLoop, states: Sequence[AdapterState]) -> list[float]:
    """The first task's training loss with each of these adapters, without dropout."""
    losses, task = [], context(loop, 0)
    loop.engine.module.eval()
    for state in states:
        loop.engine.write_adapter(state)
        with torch.no_grad():
            losses.append(sum(float(answer_loss(loop.engine.module, b, 1.0)) for b in task.micro_batches(0)))
    return losses
