"""`tasl`: Task Skill Localization and Consolidation (Feng et al., arXiv 2408.05200; ACL 2024, arXiv 2408.09857).

Training is plain. At a task's end every *skill unit*, a matrix A or B of the adapter, is kept, replaced or averaged
with what it was before the task, by how important it was for the task and for those before.

    I_t    = |w * gradient|                               of every number at step t: what leaving it out would cost
    S_t    = alpha S_(t-1) + (1 - alpha) I_t              smoothed sensitivity
    U_t    = alpha U_(t-1) + (1 - alpha) |I_t - S_t|      uncertainty
    I(u)   = mean over the unit of S * U, scaled over units to [0, 1]
    past   = scale( beta * past + (1 - beta) * I )        importance for all tasks so far; after task 1 it is I

A unit counts as important above the (1 - top) quantile of all units. With w_p the adapter before the task:

    important before and now    w <- gamma w_p + (1 - gamma) w
    only before                 w <- w_p
    only now                    w
    neither                     w <- (w_p + w) / 2

This is the static consolidation of the paper's first version and of the authors' code, alpha .85, beta and gamma .7,
top 20 %; later versions split units by rank and weigh them by a softmax. Where A and B of a module fall into different
classes the module's update mixes two tasks; `unit: module` keeps them together.
Cost beside plain training: none in passes. Kept: a number a unit; within a task, twice the adapter's size.

Shapes: U units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from treelora.adapters import AdapterState, layer_of
from treelora.engine import Engine
from treelora.methods.base import Method, TaskContext
from treelora.options.peers import TaSLOptions


def scale(scores_U: np.ndarray) -> np.ndarray:
    """To [0, 1], the least to 0 and the largest to 1; all 0 where they are equal."""
    spread = scores_U.max() - scores_U.min()
    return np.asarray((scores_U - scores_U.min()) / (spread if spread > 0 else 1.0))


def old_share(past_U: np.ndarray, now_U: np.ndarray, top: float, gamma: float) -> np.ndarray:
    """Share of each unit's old values in what it becomes, float64 [U]: gamma, 1, 0 or 1/2."""
    before, now = past_U > np.quantile(past_U, 1 - top), now_U > np.quantile(now_U, 1 - top)
    return np.where(before, np.where(now, gamma, 1.0), np.where(now, 0.0, 0.5))


class TaSL(Method):
    """TaSL: averaging with the last adapter, unit by unit, at the end of a task."""

    name = "tasl"

    def __init__(self, options: TaSLOptions | None = None, seed: int = 0):
        super().__init__(options, seed)
        self.options = options or TaSLOptions()
        self.past_U: np.ndarray | None = None
        self._sensitivity: AdapterState = {}
        self._uncertainty: AdapterState = {}

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        zeros = {name: torch.zeros_like(tensor) for name, tensor in engine.adapter_tensors().items()}
        self._sensitivity, self._uncertainty = zeros, {name: tensor.clone() for name, tensor in zeros.items()}
        self.resume_task(task, engine, bank)

    def resume_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self._old = bank[-1] if bank else None
        for kept in (self._sensitivity, self._uncertainty):
            kept.update({name: tensor.to(engine.device) for name, tensor in kept.items()})

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        gradients = engine.adapter_gradients()
        self._seen = {name: (w * gradients[name]).abs() for name, w in engine.adapter_tensors().items()}

    def after_step(self, engine: Engine, lr: float) -> None:
        """Take in what `after_backward` saw, now that the step is known to be finite."""
        alpha = self.options.smoothing
        for name, seen in self._seen.items():
            sensitivity = self._sensitivity[name].lerp_(seen, 1 - alpha)
            self._uncertainty[name].lerp_((seen - sensitivity).abs(), 1 - alpha)

    def importance(self) -> dict[str, float]:
        """I(u) of every unit before it is scaled, in the order of the adapter's tensors."""
        total: dict[str, float] = {}
        count: dict[str, int] = {}
        for name, sensitivity in self._sensitivity.items():
            unit = self.unit_of(name)
            total[unit] = total.get(unit, 0.0) + float((sensitivity * self._uncertainty[name]).double().sum())
            count[unit] = count.get(unit, 0) + sensitivity.numel()
        return {unit: value / count[unit] for unit, value in total.items()}

    def unit_of(self, name: str) -> str:
        """The skill unit that a tensor of the adapter belongs to."""
        return name if self.options.unit == "matrix" else layer_of(name)

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        options, importance = self.options, self.importance()
        now_U = scale(np.array(list(importance.values())))
        if self._old is None or self.past_U is None:
            self.past_U = now_U
        else:
            shares_U = old_share(self.past_U, now_U, options.top, options.past_weights)
            shares = dict(zip(importance, shares_U.tolist(), strict=True))
            engine.write_adapter(
                {
                    name: w.lerp(self._old[name].to(w), shares[self.unit_of(name)])
                    for name, w in engine.adapter_tensors().items()
                }
            )
            beta = options.past_importance
            self.past_U = scale(beta * self.past_U + (1 - beta) * now_U)
        self._sensitivity, self._uncertainty = {}, {}

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        state = {f"sensitivity/{name}": tensor.cpu() for name, tensor in self._sensitivity.items()}
        state |= {f"uncertainty/{name}": tensor.cpu() for name, tensor in self._uncertainty.items()}
        return state | ({} if self.past_U is None else {"past": torch.from_numpy(self.past_U)})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""

        def part(prefix: str) -> AdapterState:
            return {key.removeprefix(prefix): value.clone() for key, value in state.items() if key.startswith(prefix)}

        self._sensitivity, self._uncertainty = part("sensitivity/"), part("uncertainty/")
        self.past_U = state["past"].numpy() if "past" in state else None
