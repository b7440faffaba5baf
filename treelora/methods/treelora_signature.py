"""Where TreeLoRA's signatures come from, while a task is learnt: the `signature` axis.

Shapes: L layers, K sketch numbers a layer, P probe batches, D_l numbers of a layer's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from treelora.adapters import layer_names
from treelora.engine import Engine
from treelora.methods.base import TaskContext
from treelora.methods.extra_gradient import adapter_gradient
from treelora.methods.treelora_pull import Losses
from treelora.objective import answer_loss
from treelora.options.tree import TreeLoRAOptions
from treelora.signature import GradientProbe, adapter_value_vectors, gradient_vectors
from treelora.sketch import CountSketch, normalise

STEPS_A_PROBE, MOST_PROBES = 25, 4


class SignatureSource:
    """Signature of the current task, and what is observed of it at each step.

    `probe_b` measures P global batches before training, on the base weights, and observes them in turn: P passes a
    task, none a step. `gradient` takes the gradients that training computes anyway, at weights that move.
    `query` takes the same gradients, and compares them with what the arm's adapter gives on the same rows (`ask`).
    `adapter_value` takes the values of A, as the released code does.
    """

    def __init__(self, options: TreeLoRAOptions, engine: Engine, seed: int, rank: int | None = None):
        """With the rank of the probes; None: the adapter's."""
        self.kind, self.engine = options.signature, engine
        self.probe_batches = options.probe_batches
        self.shares_its_cost = options.guard is not None or options.protect is not None
        """Whether what a task's loss reads is measured too: then a part of a batch has to do."""
        self.keeps_full = self.kind == "gradient" and options.penalty in ("soft", "sign", "exact")
        self.names = layer_names(list(engine.adapter_tensors()))
        if self.kind == "probe_b":
            shapes = (tensor.shape for name, tensor in engine.adapter_tensors().items() if ".lora_A." in name)
            self._probe = GradientProbe(engine.module, rank or next(shapes)[0], seed)
            dims = self._probe.layer_dims
        else:
            dims = [vector.numel() for vector in self._vectors(engine.adapter_tensors())]
        self._count_sketch = CountSketch(dims, options.sketch_size, seed)
        self._per_batch_PLK = torch.zeros(0, len(dims), options.sketch_size)
        self._sum_LK = torch.zeros(len(dims), options.sketch_size)
        self._full_sum: dict[str, Tensor] = {}
        self._steps = 0
        self.seen_finite = True
        """Whether the last step's gradients can be used; else nothing was taken in."""

    @property
    def reads_gradients(self) -> bool:
        """Whether every step's gradients are needed."""
        return self.kind in ("gradient", "query")

    @property
    def known_before_step(self) -> bool:
        """Whether a step's observation exists before its backward pass."""
        return not self.reads_gradients

    @property
    def sketch(self) -> Tensor:
        """The task's signature so far: unit length per layer, zero where nothing was seen."""
        return normalise(self._sum_LK)

    def measure(self, task: TaskContext) -> None:
        """Before training. Collective."""
        if self.kind != "probe_b":
            return
        if self.probe_batches is None and self.shares_its_cost:
            self._take([self._measure_rows(task)])
            return
        wanted = self.probe_batches or min(max(1, task.steps // STEPS_A_PROBE), MOST_PROBES)
        count = min(wanted, task.steps)
        self._take([self._measure_batch(task, round(i * task.steps / count)) for i in range(count)])

    def _take(self, batches: Sequence[Tensor]) -> None:
        raw_PLK = self.engine.all_reduce(torch.stack(list(batches)), mean=True).cpu()
        self._per_batch_PLK = torch.stack([normalise(batch_LK) for batch_LK in raw_PLK])
        self._sum_LK = raw_PLK.sum(0)

    def _measure_rows(self, task: TaskContext) -> Tensor:
        """On a quarter of a global batch, from all over the task."""
        world = self.engine.world_size
        count = math.ceil(max(2, task.global_batch // 4) / world) * world
        rows = [(task.index, i * task.sizes[-1] // count) for i in range(count)]
        own = rows[self.engine.rank :: world]
        gradients = self._probe.measure(partial(answer_loss, self.engine.module, task.fetch(own), len(own)))
        return self._count_sketch.sketch(gradients)

    def _measure_batch(self, task: TaskContext, step: int) -> Tensor:
        total = torch.zeros_like(self._sum_LK, device=self.engine.device)
        for batch in task.micro_batches(step):
            normaliser = task.normaliser(step)
            gradients = self._probe.measure(partial(answer_loss, self.engine.module, batch, normaliser))
            total += self._count_sketch.sketch(gradients)
        return total

    def of_step(self, step: int) -> Tensor:
        """What is observed at a step (from 1): unit length per layer, [L, K] on the CPU."""
        if self.kind == "probe_b":
            return self._per_batch_PLK[(step - 1) % len(self._per_batch_PLK)]
        if self.kind == "adapter_value":
            return normalise(self._count_sketch.sketch(self._vectors(self.engine.adapter_tensors())).cpu())
        return normalise(self._seen_LK)

    def after_backward(self, engine: Engine) -> dict[str, Tensor]:
        """Take in a step's gradients, and return them. Collective."""
        gradients = engine.adapter_gradients()
        self._seen_LK = self._count_sketch.sketch(self._vectors(gradients)).cpu()
        self.seen_finite = bool(self._seen_LK.isfinite().all())
        if not self.seen_finite:
            return gradients
        self._sum_LK += self._seen_LK
        self._steps += 1
        if self.keeps_full:
            for name, vector in zip(self.names, self._vectors(gradients), strict=True):
                self._full_sum[name] = self._full_sum[name] + vector if name in self._full_sum else vector.clone()
        return gradients

    def ask(self, adapter: Mapping[str, Tensor], losses: Losses) -> tuple[dict[str, Tensor], Tensor]:
        """The gradient at another adapter, and its sketch of unit length per layer, [L, K] on the CPU. Collective."""
        with self.engine.using_adapter(adapter):
            gradients = adapter_gradient(self.engine, losses)
        return gradients, normalise(self._count_sketch.sketch(self._vectors(gradients)).cpu())

    def finish(self, engine: Engine) -> tuple[Tensor, dict[str, Tensor]]:
        """The task's signature [L, K], and the full mean gradient of each layer where the penalty needs it."""
        if self.kind == "adapter_value":
            self._sum_LK = self._count_sketch.sketch(self._vectors(engine.adapter_tensors())).cpu()
        full = {name: (vector / max(1, self._steps)).cpu() for name, vector in self._full_sum.items()}
        return self.sketch, full

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` needs within a task."""
        state = {
            "per_batch": self._per_batch_PLK,
            "sum": self._sum_LK,
            "seen_steps": torch.tensor(self._steps),
        }
        return state | {f"full/{name}": vector.cpu() for name, vector in self._full_sum.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`."""
        self._per_batch_PLK, self._sum_LK = state["per_batch"], state["sum"].clone()
        self._steps = int(state["seen_steps"])
        self._full_sum = {
            key.removeprefix("full/"): value.to(self.engine.device)
            for key, value in state.items()
            if key.startswith("full/")
        }

    def _vectors(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        select = adapter_value_vectors if self.kind == "adapter_value" else gradient_vectors
        return select(tensors, self.names)


def pack_past(signatures: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Full signatures of past tasks as one flat dict of tensors; what several tasks share is kept once."""
    first = [next(i for i, other in enumerate(signatures) if other is past) for past in signatures]
    packed = {f"past/{i}/{name}": vector for i in set(first) for name, vector in signatures[i].items()}
    return packed | {"past_tasks": torch.tensor(first, dtype=torch.int64)}


def unpack_past(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Inverse of `pack_past`."""
    first = state["past_tasks"].tolist()
    own = {
        i: {key.removeprefix(f"past/{i}/"): value for key, value in state.items() if key.startswith(f"past/{i}/")}
        for i in set(first)
    }
    return [own[i] for i in first]
