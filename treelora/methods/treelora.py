"""`treelora`: TreeLoRA (Qian et al., ICML 2025, arXiv 2506.10355), whose axes are all options.

At every step an arm, that is a past task, is chosen for each layer by the memory (tree and bandit), and the layer's
adapter is pulled towards that task (Eq. 3). The memory answers one call a step, asked for a step ahead, so that its
latency hides behind the arithmetic.

Shapes: L layers, N past tasks, K sketch numbers a layer, P probe batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from treelora.adapters import AdapterState, fresh_tensor, layer_names, layer_of
from treelora.engine import Engine
from treelora.methods.base import Method, StepMetrics, TaskContext
from treelora.methods.treelora_signature import SignatureSource, pack_past, unpack_past
from treelora.penalty import prox, sign_gradient, soft_gradient
from treelora.sketch import residual


@dataclass(frozen=True)
class TreeLoRAOptions:
    """The method's own axes; those of tree and search belong to the memory."""

    signature: Literal["probe_b", "gradient", "adapter_value"] = "probe_b"
    penalty: Literal["none", "prox", "soft", "sign"] = "prox"
    strength: float = 0.5
    start: Literal["continue", "fresh", "tree_node"] = "continue"
    search: str = "tree_lcb"
    sketch_size: int = 64
    probe_batches: int = 4
    seed: int = 0


class Memory(Protocol):
    """The shared memory as a worker's rank 0 sees it: `TaskMemory` in process, or a client of the tree actor."""

    def begin_task(self, task: str, horizon: int) -> np.ndarray:
        """Sketches of the past tasks, float32 [N, L, K]."""
        ...

    def submit(self, step: int, observation: np.ndarray | None) -> None:
        """Ask for the arms of a step, and tell the losses seen with the arms of the step before."""
        ...

    def collect(self) -> tuple[np.ndarray, np.ndarray]:
        """Answer of the last `submit`: arms int64 [L] and their bounds float32 [L]."""
        ...

    def describe(self) -> dict[str, Any]:
        """Tree, pulls and bounds as JSON values, for logs and pictures."""
        ...

    def end_task(self, task: str, sketch: np.ndarray) -> None:
        """Record the signature of the task, float32 [L, K]."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go back to `state_dict`."""
        ...


class TreeLoRA(Method):
    """TreeLoRA; `memory` is used on rank 0 only and may be None elsewhere."""

    name = "treelora"

    def __init__(self, options: TreeLoRAOptions, memory: Memory | None):
        self.options, self.memory = options, memory
        self.signatures: list[dict[str, Tensor]] = []
        """Full mean gradients of the past tasks, where the penalty needs them."""
        self.past_NLK: np.ndarray = np.empty((0, 0, 0), np.float32)
        self.arms_L: np.ndarray = np.empty(0, np.int64)
        self.lcb_L: np.ndarray = np.empty(0, np.float32)
        self.source: SignatureSource
        self._last = StepMetrics()
        self._resumed: dict[str, Tensor] = {}
        self._step = 0
        self._observation: np.ndarray | None = None

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self._open(task, engine, bank)
        self.source.measure(task)
        self._start_adapter()
        if engine.rank == 0 and self.past_NLK.shape[0]:
            assert self.memory
            self.memory.submit(1, None)

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self._open(task, engine, bank)
        self.source.load_state_dict(self._resumed)
        if engine.rank == 0 and self.past_NLK.shape[0]:
            step = int(self._resumed["step"])
            observation = self._resumed.get("observation")
            assert self.memory
            self.memory.submit(step + 1, None if observation is None else observation.numpy())

    def before_step(self, step: int) -> None:
        """See `Method`."""
        self._step = step
        self._observation = None
        if not self.past_NLK.shape[0]:
            return
        answer = self.memory.collect() if self.memory else None
        self.arms_L, self.lcb_L = self.engine.broadcast(answer)  # type: ignore[misc]
        if self.source.known_before_step:
            self._observe(self.source.of_step(step))

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        gradients = self.source.after_backward(engine) if self.source.reads_gradients else None
        if not self.past_NLK.shape[0] or not self.source.seen_finite:
            return  # where they aren't finite the engine won't step, and `step_skipped` follows
        if not self.source.known_before_step:
            self._observe(self.source.of_step(self._step))
        if self.options.penalty == "prox":
            self._before = {name: tensor.clone() for name, tensor in engine.adapter_tensors().items()}
        if self.options.penalty in ("soft", "sign"):
            self._pull_gradients(gradients or engine.adapter_gradients())

    def after_step(self, engine: Engine, lr: float) -> None:
        """See `Method`."""
        scalars: dict[str, float | Tensor] = {}
        if self.past_NLK.shape[0]:
            if self.options.penalty == "prox":
                scalars |= self._pull_adapter(lr)
            if np.isfinite(self.lcb_L).all():  # the first pulls of an arm have no bound yet
                scalars["lcb_mean"] = float(self.lcb_L.mean())
            if self._observation is not None:
                scalars["observation_mean"] = float(self._observation.mean())
            self._last = StepMetrics(scalars, tuple(int(arm) for arm in self.arms_L))
        else:
            self._last = StepMetrics()

    def step_skipped(self) -> None:
        """See `Method`."""
        if self.memory and self.past_NLK.shape[0] and not self.source.known_before_step:
            self.memory.submit(self._step + 1, None)
        self._last = StepMetrics()

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        sketch_LK, full = self.source.finish(engine)
        self.signatures.append(full)
        if self.memory:
            if self.past_NLK.shape[0]:
                self.memory.collect()  # the answer for the step that doesn't come
            self.memory.end_task(self.task.name, sketch_LK.numpy())

    def metrics(self) -> StepMetrics:
        """See `Method`."""
        return self._last

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        if self._step == 0:  # nothing was learnt since the state was loaded
            return dict(self._resumed)
        state = self.source.state_dict() | pack_past(self.signatures)
        state["step"] = torch.tensor(self._step)
        if self._observation is not None:
            state["observation"] = torch.from_numpy(self._observation)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        self._resumed = state
        self.signatures = unpack_past(state)

    def _open(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        self.task, self.engine, self.bank = task, engine, bank
        self._step = 0
        self._observation = None
        self._last = StepMetrics()
        self._names = list(engine.adapter_tensors())
        layers = layer_names(self._names)
        self._layer_index = {name: layers.index(layer_of(name)) for name in self._names}
        self.source = SignatureSource(self.options, engine)
        past_NLK = self.memory.begin_task(task.name, task.steps) if self.memory else np.empty(0)
        self.past_NLK = engine.broadcast(past_NLK)
        self._anchors = [{name: state[name].to(engine.device) for name in self._names} for state in bank]

    def _start_adapter(self) -> None:
        if self.options.start == "continue" or (self.task.index == 0):
            return
        if self.options.start == "tree_node" and self.past_NLK.shape[0]:
            distances_NL = residual(self.source.sketch, torch.from_numpy(self.past_NLK))
            nearest = int(distances_NL.mean(dim=-1).argmin())
            self.engine.write_adapter(self.bank[nearest])
            return
        shapes = {name: tensor.shape for name, tensor in self.engine.adapter_tensors().items()}
        self.engine.write_adapter(
            {name: fresh_tensor(name, shape, self.options.seed) for name, shape in shapes.items()}
        )

    def _observe(self, sketch_LK: Tensor) -> None:
        """The residuals of Eq. 2, in the sketch space: of the chosen arms, or of all where the search is `full`."""
        if self.engine.rank == 0:
            arms_L = None if self.options.search == "full" else torch.from_numpy(np.array(self.arms_L))
            self._observation = residual(sketch_LK, torch.from_numpy(self.past_NLK), arms_L).numpy()
            assert self.memory
            self.memory.submit(self._step + 1, self._observation)

    def _anchor_of(self, name: str) -> Tensor:
        return self._anchors[int(self.arms_L[self._layer_index[name]])][name]

    def _pull_adapter(self, lr: float) -> dict[str, float | Tensor]:
        pulled, kept, by_penalty, by_loss, total = {}, [], [], [], 0
        for name, stepped in self.engine.adapter_tensors().items():
            pulled[name], equal = prox(stepped, self._anchor_of(name), lr * self.options.strength)
            kept.append(equal)
            by_penalty.append((pulled[name] - stepped).abs().sum())
            by_loss.append((stepped - self._before[name]).abs().sum())
            total += stepped.numel()
        self.engine.write_adapter(pulled)
        ratio = torch.stack(by_penalty).sum() / torch.stack(by_loss).sum().clamp_min(1e-30)
        return {"sparsity": torch.stack(kept).sum() / total, "penalty_ratio": ratio}

    def _pull_gradients(self, gradients: dict[str, Tensor]) -> None:
        function = {"soft": soft_gradient, "sign": sign_gradient}[self.options.penalty]
        pulled = {}
        for name, gradient in gradients.items():
            if ".lora_B." in name:
                arm = int(self.arms_L[self._layer_index[name]])
                anchor = self.signatures[arm][layer_of(name)].to(gradient)
                pulled[name] = function(gradient, anchor.reshape(gradient.shape), self.options.strength)
        self.engine.set_adapter_gradients(pulled)
