"""What the loss of the task at hand reads of its layers' inputs, measured in some of the steps that it is learnt in.

Shapes: S tokens of a micro-batch, d inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from treelora.engine import Engine
from treelora.input_space import InputMoments, Spectrum
from treelora.methods.base import Method, TaskContext
from treelora.methods.first_step import FirstStep
from treelora.signature import adapted_modules
from treelora.watching import Seen, watch

COLUMNS = 64
"""K of the sketches: so many directions of a layer's inputs are known at most."""
MEASURED = 4
"""Steps of a task that show what its loss reads; each costs a few per cent more than others."""
T = TypeVar("T")


class Reading:
    """From a task's first step, or a resumption, to its end."""

    def __init__(self, engine: Engine, steps: int, seed: int) -> None:
        """For a task of so many steps."""
        self.engine, self.steps = engine, steps
        layers: list[tuple[str, Any]] = adapted_modules(engine.module)
        self.layers = layers
        widths = {name: module.in_features for name, module in layers}
        self.moments = InputMoments(widths, COLUMNS, seed, engine.device)
        self.measured = False
        """Whether this step's passes are seen."""
        self.first: FirstStep | None = None
        """Who else is to see them."""
        self._handles = watch(engine.module, lambda: self.measured or self.first is not None, self._saw)

    def before_step(self, step: int) -> None:
        """Steps count from 1; those that are measured are spread evenly, the last is one of them."""
        self.measured = step * MEASURED // self.steps > (step - 1) * MEASURED // self.steps

    def after_step(self) -> None:
        """The step counts. Collective."""
        self.first = None
        if self.measured:
            self.moments.keep(self.engine)

    def step_skipped(self) -> None:
        """It doesn't."""
        self.moments.drop()

    def close(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def shared(self, compute: Callable[[str, Spectrum], T], moments: InputMoments | None = None) -> dict[str, T]:
        """Something of each layer's spectrum, computed by one worker: not every machine rounds alike. Collective.

        Args:
            moments: Others than the task's.
        """
        spectra = (moments or self.moments).spectra(self.engine)
        mine = {layer: compute(layer, spectrum) for layer, spectrum in spectra.items()}
        found = {layer: value for part in self.engine.gather(mine) for layer, value in part.items()}
        return {layer: found[layer] for layer in self.moments.layers}

    def state_dict(self) -> dict[str, Tensor]:
        """What was seen so far, on all workers."""
        return {"read": self.moments.sums.cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go back to `state_dict`."""
        self.moments.sums.copy_(state["read"])

    def _saw(self, layer: int, seen: Seen) -> None:
        if self.first:
            self.first.saw(layer, seen)
        if self.measured:
            # a worker's loss is so many times its part of the global batch's
            weights_S = (seen.g.float() / self.engine.world_size).square().sum(-1)
            self.moments.add(layer, seen.x, weights_S)


class ReadsInputs(Method):
    """What methods share that measure, while they learn a task, what its loss reads."""

    reading: Reading | None = None
    """Of the current task; None between tasks."""

    @property
    def seen(self) -> Reading:
        """What the current task's loss reads."""
        assert self.reading, "no task is being learnt"
        return self.reading

    def watch(self, task: TaskContext, engine: Engine) -> Reading:
        """Begin with a task, or begin again."""
        if self.reading:
            self.reading.close()
        self.reading = Reading(engine, task.steps, self.seed)
        return self.reading
