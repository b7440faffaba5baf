"""`treelora`: TreeLoRA (Qian et al., ICML 2025, arXiv 2506.10355), whose axes are all options.

At every step an arm, that is a past task (or several, merged under a budget), is chosen for each layer by the memory
(tree and bandit), and the layer's adapter is pulled towards it (Eq. 3). The memory answers one call a step, asked for a
step ahead, so that its latency hides behind the arithmetic.

Shapes: L layers, N arms, K sketch numbers a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from treelora.adapters import AdapterState, fresh_tensor, layer_names, layer_of, mean_adapter
from treelora.engine import Engine
from treelora.memory_records import Groups, Past
from treelora.methods.base import StepMetrics, TaskContext
from treelora.methods.extra_gradient import flatten, leaf_vector
from treelora.methods.remembering import Memory, Remembering
from treelora.methods.treelora_pull import Losses, Scalars, arm_adapter, correct, pull_gradients, pulled
from treelora.methods.treelora_signature import SignatureSource, pack_past, unpack_past
from treelora.objective import answer_loss
from treelora.options.tree import TreeLoRAOptions
from treelora.sketch import residual

S = TypeVar("S")


class TreeLoRA(Remembering):
    """TreeLoRA; `memory` is used on rank 0 only and may be None elsewhere."""

    name = "treelora"
    preparation = "measuring its signature"

    def __init__(self, options: TreeLoRAOptions, memory: Memory | None, seed: int = 0):
        self.options, self.memory, self.seed = options, memory, seed
        self.signatures: list[dict[str, Tensor]] = []
        """Full mean gradients of the past tasks, where the penalty needs them."""
        self.past = Past(np.empty((0, 0, 0), np.float32), ())
        self.arms_L: np.ndarray = np.empty(0, np.int64)
        self.lcb_L: np.ndarray = np.empty(0, np.float32)
        self.source: SignatureSource
        self._last = StepMetrics()
        self._resumed: dict[str, Tensor] = {}
        self._step = 0
        self._observation: np.ndarray | None = None
        self._scalars: Scalars = {}

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self._open(task, engine, bank)
        self.source.measure(task)
        self._start_adapter()
        if engine.rank == 0 and self.past.groups:
            assert self.memory
            self.memory.submit(1, None)

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self._open(task, engine, bank)
        self.source.load_state_dict(self._resumed)
        if engine.rank == 0 and self.past.groups:
            step = int(self._resumed["step"])
            observation = self._resumed.get("observation")
            assert self.memory
            self.memory.submit(step + 1, None if observation is None else observation.numpy())

    def before_step(self, step: int) -> None:
        """See `Method`."""
        self._step, self._observation, self._scalars = step, None, {}
        if not self.past.groups:
            return
        self.arms_L, self.lcb_L = self._agreed(self.memory.collect() if self.memory else None)
        if self.source.known_before_step:
            self._observe(self._residuals(self.source.of_step(step)))

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        gradients = self.source.after_backward(engine) if self.source.reads_gradients else {}
        if self.corrects:
            self._before_D = leaf_vector(engine)
        if not self.past.groups or not self.source.seen_finite:
            return  # where they aren't finite the engine won't step, and `step_skipped` follows
        asked: dict[str, Tensor] = {}
        if self.options.signature == "query":
            asked = self._query()
        elif not self.source.known_before_step:
            self._observe(self._residuals(self.source.of_step(self._step)))
        if self.options.penalty in ("soft", "sign", "exact"):
            anchors = asked or self._past_gradients(gradients)
            anchors = {name: anchors[name] for name in gradients if ".lora_B." in name}
            penalty, strength = self.options.penalty, self.options.strength
            self._scalars = pull_gradients(engine, penalty, gradients, anchors, strength, self._losses())

    def after_step(self, engine: Engine, lr: float) -> None:
        """See `Method`."""
        if self.corrects:
            told = correct(engine, self._before_D, partial(self.corrected, lr=lr))
            self._scalars |= {key: self._scalars.get(key, 0.0) + value for key, value in told.items()}
        arms: tuple[int, ...] | None = None
        if self.past.groups:
            arms = tuple(self.past.groups[arm][0] for arm in self.arms_L)
            if np.isfinite(self.lcb_L).all():  # the first pulls of an arm have no bound yet
                self._scalars["lcb_mean"] = float(self.lcb_L.mean())
        if self._observation is not None:
            self._scalars["observation_mean"] = float(self._observation.mean())
        self._last = StepMetrics(self._scalars, arms)

    @property
    def corrects(self) -> bool:
        """Whether the adapter is changed once more after the optimizer's step."""
        return bool(self.past.groups) and self.options.penalty == "prox"

    def corrected(self, stepped_D: Tensor, lr: float) -> tuple[Tensor, Scalars]:
        """The adapter that has just stepped, `flatten`ed, as it shall be; and what is recorded of that."""
        anchor_D = flatten(arm_adapter(self._anchors, self._arm_of))
        return pulled(stepped_D, anchor_D, lr, self.options.strength)

    def step_skipped(self) -> None:
        """See `Method`."""
        if self.memory and self.past.groups and not self.source.known_before_step:
            self.memory.submit(self._step + 1, None)
        self._last = StepMetrics()

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        sketch_LK, full = self.source.finish(engine)
        self.signatures.append(full)
        groups: Groups = ()
        if self.memory:
            if self.past.groups:
                self.memory.collect()  # the answer for the step that doesn't come
            groups = self.memory.end_task(self.task.name, sketch_LK.numpy(), float(self.task.sizes[-1]))
        self._groups = engine.broadcast(groups)

    def merge_bank(self, bank: list[AdapterState]) -> None:
        """Let tasks of one arm share one adapter and one signature: the means, weighted by rows."""
        share(bank, self._groups, self.task.sizes, mean_adapter)
        share(self.signatures, self._groups, self.task.sizes, _mean_tensors)

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
        self.task, self.engine = task, engine
        self._step = 0
        self._observation = None
        self._last = StepMetrics()
        self._names = list(engine.adapter_tensors())
        layers = layer_names(self._names)
        self._layer_index = {name: layers.index(layer_of(name)) for name in self._names}
        self.source = SignatureSource(self.options, engine, self.seed)
        past = self.memory.begin_task(task.name, task.steps) if self.memory else self.past
        self.past = engine.broadcast(past)
        self._anchors = [
            {name: bank[group[0]][name].to(engine.device) for name in self._names} for group in self.past.groups
        ]

    def _start_adapter(self) -> None:
        if self.options.start == "continue" or self.task.index == 0:
            return
        if self.options.start == "tree_node" and self.past.tree is not None:
            distances_NL = residual(self.source.sketch, torch.from_numpy(self.past.sketches))
            arms = self.past.tree.tasks_below(self.past.tree.home(distances_NL.mean(dim=-1).numpy()))
            weights = [float(sum(self.task.sizes[task] for task in self.past.groups[arm])) for arm in arms]
            self.engine.write_adapter(mean_adapter([self._anchors[arm] for arm in arms], weights))
            return
        shapes = {name: tensor.shape for name, tensor in self.engine.adapter_tensors().items()}
        self.engine.write_adapter({name: fresh_tensor(name, shape, self.seed) for name, shape in shapes.items()})

    def _agreed(self, answer: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
        """Rank 0's answer on every rank: a sum in which the others have zeros is one message; an object is two."""
        both_2L = np.zeros((2, len(self.source.names)), np.float32)
        if answer is not None:
            both_2L[:] = answer  # numbers of arms are exact far beyond what there will be of them
        arms_L, lcb_L = self.engine.all_reduce(torch.from_numpy(both_2L).to(self.engine.device)).cpu().numpy()
        return arms_L.astype(np.int64), lcb_L

    def _residuals(self, sketch_LK: Tensor) -> Tensor:
        """The residuals of Eq. 2, in the sketch space: of the chosen arms, or of all where the search is `full`."""
        arms_L = None if self.options.search == "full" else torch.from_numpy(np.array(self.arms_L))
        return residual(sketch_LK, torch.from_numpy(self.past.sketches), arms_L)

    def _observe(self, residuals: Tensor) -> None:
        if self.engine.rank == 0:
            self._observation = residuals.cpu().numpy()
            assert self.memory
            self.memory.submit(self._step + 1, self._observation)

    def _query(self) -> dict[str, Tensor]:
        """A pull as the paper has it: the gradient on this step's rows at the arm's adapter; full: one for each arm."""
        seen_LK = self.source.of_step(self._step)
        full = self.options.search == "full"
        choices = [partial(_same_arm, arm) for arm in range(len(self.past.groups))] if full else [self._arm_of]
        asked = [self.source.ask(arm_adapter(self._anchors, arm_of), self._losses()) for arm_of in choices]
        rows = torch.stack([residual(seen_LK, sketch_LK[None])[0] for _, sketch_LK in asked])
        self._observe(rows if full else rows[0])
        if not full:
            return asked[0][0]
        return {name: asked[self._arm_of(name)][0][name] for name in self._names}

    def _losses(self) -> Losses:
        batches, normaliser = self.task.micro_batches(self._step - 1), self.task.normaliser(self._step - 1)
        return [partial(answer_loss, self.engine.module, batch, normaliser) for batch in batches]

    def _past_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        anchors = {}
        for name, gradient in gradients.items():
            if ".lora_B." in name:
                task = self.past.groups[self._arm_of(name)][0]
                anchors[name] = self.signatures[task][layer_of(name)].to(gradient).reshape(gradient.shape)
        return anchors

    def _arm_of(self, name: str) -> int:
        return int(self.arms_L[self._layer_index[name]])


def share(entries: list[S], groups: Groups, masses: Sequence[int], merge: Any) -> None:
    """Give all tasks of a group one entry, by reference: the merge of its distinct entries, weighted by mass."""
    for group in groups:
        distinct = {id(entries[task]): entries[task] for task in group}
        if len(distinct) > 1:
            weights = [
                float(sum(masses[task] for task in group if entries[task] is entry)) for entry in distinct.values()
            ]
            merged = merge(list(distinct.values()), weights)
            for task in group:
                entries[task] = merged


def _mean_tensors(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    shares = [weight / sum(weights) for weight in weights]
    return {
        name: torch.stack([share * state[name] for share, state in zip(shares, states, strict=True)]).sum(0)
        for name in states[0]
    }


def _same_arm(arm: int, name: str) -> int:
    return arm
