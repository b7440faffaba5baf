"""The memory in this process: what the `treelora` method talks to where there is no actor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treelora.memory import MemoryConfig, Past, StepCall, TaskMemory
from treelora.memory_records import Groups


class LocalMemory:
    """`treelora.methods.Memory` on a `TaskMemory`."""

    def __init__(self, config: MemoryConfig, run: str = "local"):
        self.memory, self.run = TaskMemory(config, run), run
        self._task = ""
        self._answer: tuple[np.ndarray, np.ndarray] | None = None

    def begin_task(self, task: str, horizon: int) -> Past:
        """See `Memory`."""
        self._task = task
        return _writable(self.memory.begin_task(task, horizon))

    def submit(self, step: int, observation: np.ndarray | None) -> None:
        """See `Memory`."""
        selection = self.memory.step(StepCall(self.run, self._task, step, observation))
        self._answer = (selection.arms, selection.lcb)

    def collect(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Memory`."""
        assert self._answer is not None, "collect without submit"
        return self._answer

    def end_task(self, task: str, sketch: np.ndarray, mass: float) -> Groups:
        """See `Memory`."""
        return self.memory.end_task(task, sketch, mass)

    def past(self) -> Past:
        """See `Memory`."""
        return _writable(self.memory.past())

    def describe(self) -> dict[str, Any]:
        """See `Memory`."""
        return self.memory.describe()

    def state_dict(self) -> dict[str, Tensor]:
        """See `Memory`."""
        return pack_state(self.memory.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Memory`."""
        self.memory = TaskMemory.from_state_dict(unpack_state(state), run=self.run)


def pack_state(state: Mapping[str, np.ndarray | str]) -> dict[str, Tensor]:
    """A memory's state as tensors only, texts as UTF-8 bytes: fit for one safetensors file."""
    return {
        name: torch.frombuffer(bytearray(value.encode()), dtype=torch.uint8)
        if isinstance(value, str)
        else torch.from_numpy(np.array(value))
        for name, value in state.items()
    }


def _writable(past: Past) -> Past:
    # torch warns of arrays that can't be written to, and it's right: tensors on them could be
    return replace(past, sketches=past.sketches.copy())


def unpack_state(state: Mapping[str, Tensor]) -> dict[str, np.ndarray | str]:
    """Inverse of `pack_state`."""
    return {
        name: bytes(tensor.numpy()).decode() if tensor.dtype == torch.uint8 else tensor.numpy()
        for name, tensor in state.items()
    }
