"""`olora`: O-LoRA (Wang et al., Findings of EMNLP 2023, arXiv 2310.14152): every task in a subspace of its own.

A task learns a new slice of the adapter; the slices before it stay as they are. A penalty keeps the rows of its A
orthogonal to those of all earlier tasks', whose span stands for the earlier gradients' subspace:

    loss + lambda_1 * sum over layers and i < t of sum |A_i A_t^T|

The paper writes squares of the entries, its authors' code takes absolute values; so do we, and lambda_1 is theirs. The
optional L2 term of that code is zero in all its recipes and left out.

Shapes: n r rows of past tasks, r own rows, A [R, in].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treelora.adapters import AdapterState
from treelora.engine import Engine
from treelora.methods.base import StepMetrics, TaskContext
from treelora.methods.slices import Accumulating, cut, fresh_rows
from treelora.options.peers import OLoRAOptions


class OLoRA(Accumulating):
    """O-LoRA."""

    name = "olora"

    def __init__(self, options: OLoRAOptions | None = None, seed: int = 0, *, rank: int) -> None:
        super().__init__(options, seed, rank=rank)
        self.options = options or OLoRAOptions()
        self._past: dict[str, Tensor] = {}
        self._last = StepMetrics()

    def open(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Accumulating`."""
        super().open(task, engine, bank)
        tensors = engine.adapter_tensors().items()
        self._past = {name: cut(name, a, self.slices.past).clone() for name, a in tensors if ".lora_A." in name}

    def start_a(self, name: str, part: Tensor) -> Tensor:
        """See `Accumulating`."""
        return fresh_rows(name, part.shape, self.slices.index, self.seed)

    def penalty_loss(self, engine: Engine) -> Tensor | None:
        """See `Method`."""
        if self.slices.index == 0:
            return None
        leaves = engine.adapter_leaves()
        overlaps = [(past_a @ leaves[name].T).abs().sum() for name, past_a in self._past.items()]
        penalty = self.options.strength * torch.stack(overlaps).sum()
        self._penalty = penalty.detach()
        return penalty

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        if self.slices.index == 0:
            return
        leaves, by_penalty, by_loss = engine.adapter_leaves(), [], []
        for name, own in engine.adapter_gradients().items():
            if name in self._past:
                past_a = self._past[name]
                by_penalty.append(self.options.strength * (leaves[name].detach() @ past_a.T).sign() @ past_a)
                own = own - by_penalty[-1]
            by_loss.append(own.norm())
        pulled = torch.stack([gradient.norm() for gradient in by_penalty]).norm()
        ratio = pulled / torch.stack(by_loss).norm().clamp_min(1e-30)
        self._last = StepMetrics({"penalty_loss": self._penalty, "penalty_ratio": ratio})

    def step_skipped(self) -> None:
        """See `Method`."""
        self._last = StepMetrics()

    def metrics(self) -> StepMetrics:
        """See `Method`."""
        return self._last
