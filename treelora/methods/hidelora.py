"""`hidelora`: HiDe-LoRA (Wang et al., NeurIPS 2023, arXiv 2310.07234; HiDe-PET, arXiv 2407.05229).

The LoRA form of HiDe-Prompt takes class-incremental learning apart into three problems, each solved by itself:

- *within-task prediction*: each task has its own adapter. It starts as its predecessor ended, and when its training
  ends it is drawn to the mean of those before it, A and B by themselves: w_t <- (1 - a) w_t + a mean of w_1 .. w_(t-1);
- *task identity*: a test row gets the adapter of the task that Gaussians of the frozen model's features take it for
  (for images a Gaussian a class): inference `routed`, which evaluation.modes must have;
- *task-adaptive prediction*: after each task the head learns all seen classes anew from Gaussians of the adapted
  features (`treelora.alignment`): vision.align, which must be on.

Its loss has the contrastive term of `treelora.methods.spreading`. Start, a = 0.1 and lambda = 0.001 are those of the
authors' code (https://github.com/thu-ml/HiDe-Prompt).

Where this leaves them: the task is read off the Gaussians by Bayes' rule, with a covariance that all share, where they
train a layer on features drawn from them; `lora.target_modules` are the user's (theirs: keys and values).

For text there is no head to align, nor features to spread: what is left is an adapter a task and routing.

Shapes: A [r, in], B [out, r].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from treelora.adapters import AdapterState, fresh_tensor
from treelora.engine import Engine, read_adapter
from treelora.methods.base import TaskContext
from treelora.methods.spreading import Spreading
from treelora.options.peers import HiDeLoRAOptions


class HiDeLoRA(Spreading):
    """HiDe-LoRA."""

    name = "hidelora"

    def __init__(self, options: HiDeLoRAOptions | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.options = options or HiDeLoRAOptions()
        self.spread = self.options.spread
        self._past: list[AdapterState] = []

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self.resume_task(task, engine, bank)
        if self.options.start == "fresh" and bank:
            engine.write_adapter({name: fresh_tensor(name, t.shape, self.seed) for name, t in bank[0].items()})

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        super().resume_task(task, engine, bank)
        self._past = list(bank)

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        if self._past and self.options.ensemble:
            engine.write_adapter(drawn(read_adapter(engine), self._past, self.options.ensemble))


def drawn(state: Mapping[str, Tensor], past: Sequence[Mapping[str, Tensor]], share: float) -> AdapterState:
    """(1 - share) times an adapter plus share times the mean of past ones, tensor by tensor."""
    return {
        name: (1 - share) * tensor + share * torch.stack([other[name] for other in past]).mean(dim=0)
        for name, tensor in state.items()
    }
