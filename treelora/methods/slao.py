"""`slao`: SLAO (Qiao and Mahdavi, ICLR 2026, arXiv 2512.23017): one adapter, merged after every task.

Task i, from 1, starts at its predecessor's B and at an orthonormal basis of the rows of its predecessor's A, and trains
as usual. What is used and kept is a running merge, in which B weighs the less the later it comes; A is the latest:

    A_i <- Q^T  with  Q R = A_(i-1)^T,         B_i <- B_(i-1)          the start
    A_merged = A_i,    B_merged <- B_merged + (B_i - B_merged) / sqrt(i)    the end

The signs of Q are chosen so that R's diagonal is not negative: rows that are orthonormal already are left alone.
The first task starts as every method's does. Beside the merged adapter, the last task's own is kept for the next start.

Shapes: r rank, A [r, in], B [out, r].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from treelora.adapters import AdapterState
from treelora.engine import Engine, read_adapter
from treelora.methods.base import Method, TaskContext
from treelora.options import Options


class SLAO(Method):
    """SLAO; it has no settings."""

    name = "slao"

    def __init__(self, options: Options | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.tuned: AdapterState = {}
        """The last task's adapter as training left it."""
        self._task = 0
        self._merged: AdapterState = {}

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self.resume_task(task, engine, bank)
        if self.tuned:
            engine.write_adapter(engine.broadcast(self.start()))  # not every machine rounds a QR alike

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self._task = task.index + 1
        self._merged = dict(bank[-1]) if bank else {}

    def start(self) -> AdapterState:
        """Where the next task starts: a function of the last task's adapter."""
        return {name: orthonormal_rows(tensor) if ".lora_A." in name else tensor for name, tensor in self.tuned.items()}

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        self.tuned = read_adapter(engine)
        if self._merged:
            engine.write_adapter(merge(self._merged, self.tuned, self._task))

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        return dict(self.tuned)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        self.tuned = dict(state)


def orthonormal_rows(a: Tensor) -> Tensor:
    """Rows that are orthonormal and span what those of `a` span: [r, in], the Q^T of A^T = Q R with diag R >= 0."""
    q, r = torch.linalg.qr(a.T.double())
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    return (q * signs).T.float().contiguous()


def merge(merged: Mapping[str, Tensor], tuned: Mapping[str, Tensor], task: int) -> AdapterState:
    """The running merge after task number `task`, counted from 1."""
    return {
        name: tensor if ".lora_A." in name else merged[name] + (tensor - merged[name]) / math.sqrt(task)
        for name, tensor in tuned.items()
    }
