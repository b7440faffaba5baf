"""`sdlora`: SD-LoRA (Wu et al., ICLR 2025, arXiv 2501.13198): past directions stay, their magnitudes are learnt on.

With D_k = B_k A_k / ||B_k A_k||_F the direction that task k ended with and s = alpha / r, a weight changes in task t by

    s (sum over k < t of a_k D_k + B_t A_t)

where B_t, A_t and all magnitudes a_k are trained, the latter by an AdamW of their own from

    d loss / d a_k = <d loss / d (a_k B_k / ||B_k A_k||_F),  B_k / ||B_k A_k||_F>

of which each worker sums up its own part, so that a step costs one message of L t numbers.

Where we leave the authors: each layer has magnitudes of its own (in their code all layers share them); a_k goes on
where the last task left it, at first at ||B_k A_k||_F, so that a task starts from the function that the last one ended
with (they set all to a constant again); the current task's magnitude is that of B_t A_t (one factor more would be
redundant). The variants that cut ranks or merge directions aren't here.

Shapes: L layers, t past tasks, r rank of a task, P = t r, O outputs, A [R, in], B [O, R].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from treelora.adapters import AdapterState, layer_names
from treelora.engine import MOMENTS, Engine
from treelora.methods.base import TaskContext
from treelora.methods.slices import Accumulating, Slices, cut, fresh_rows
from treelora.options.peers import SDLoRAOptions
from treelora.sliced import sliced_factors


class SDLoRA(Accumulating):
    """SD-LoRA."""

    name = "sdlora"

    def __init__(self, options: SDLoRAOptions | None = None, seed: int = 0, *, rank: int) -> None:
        super().__init__(options, seed, rank=rank)
        self.options = options or SDLoRAOptions()
        self.magnitudes_Lt = torch.zeros(0, 0)
        self._adam: torch.optim.AdamW | None = None
        self._moments: dict[str, Tensor] = {}
        self._directions: dict[str, Tensor] = {}
        self._past: dict[str, Tensor] = {}

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        self._moments = {}
        super().begin_task(task, engine, bank)

    def start_a(self, name: str, part: Tensor) -> Tensor:
        """See `Accumulating`."""
        return fresh_rows(name, part.shape, self.slices.index, self.seed)

    def open(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Accumulating`."""
        super().open(task, engine, bank)
        layers = layer_names(list(engine.adapter_tensors()))
        self._directions = {}
        for layer in layers if bank else []:
            ends = [direction(state, layer, Slices(self.rank, k)) for k, state in enumerate(bank)]
            self._directions[f"{layer}.lora_B.weight"] = torch.cat(ends, dim=1).to(engine.device)
        factors, tensors = sliced_factors(engine.module), engine.adapter_tensors()
        self._past = {}
        for name in self._directions:
            self._past[name] = factors[name].past = cut(name, tensors[name], self.slices.past).clone().requires_grad_()
        self.magnitudes_Lt = self.magnitudes_Lt.to(engine.device)
        self._adam = torch.optim.AdamW([self.magnitudes_Lt], weight_decay=0.0)
        if self._moments:
            moments = {name: self._moments[name].to(engine.device) for name in MOMENTS}
            self._adam.state[self.magnitudes_Lt] = moments | {"step": self._moments["step"].clone()}

    def before_step(self, step: int) -> None:
        """See `Method`."""
        for past_OP in self._past.values():
            past_OP.grad = None

    def after_backward(self, engine: Engine) -> None:
        """See `Method`."""
        if self._directions:
            products = [(self._gradient(name) * d_OP).sum(0) for name, d_OP in self._directions.items()]
            sums_Lt = torch.stack([products_P.view(-1, self.rank).sum(1) for products_P in products])
            gradient_Lt = engine.all_reduce(sums_Lt, mean=True)
            # the engine's norm doesn't see these numbers, so it can't refuse a step for their sake
            self.magnitudes_Lt.grad = torch.where(gradient_Lt.isfinite(), gradient_Lt, 0)

    def after_step(self, engine: Engine, lr: float) -> None:
        """See `Method`."""
        if self._adam and self._directions:
            self._adam.param_groups[0]["lr"] = lr * self.options.magnitude_rate
            self._adam.step()
            scales = self.magnitudes_Lt.repeat_interleave(self.rank, dim=1)
            for scale_P, (name, d_OP) in zip(scales, self._directions.items(), strict=True):
                self._past[name].data.copy_(scale_P * d_OP)

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        super().end_task(engine)
        tensors = engine.adapter_tensors()
        reached_L = torch.stack([size(tensors, layer, self.slices) for layer in layer_names(list(tensors))])
        known_Lt = self.magnitudes_Lt.reshape(len(reached_L), -1)
        self.magnitudes_Lt = torch.cat([known_Lt, reached_L[:, None]], dim=1)
        self._adam, self._past = None, {}

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`."""
        if not self.magnitudes_Lt.numel():
            return {}
        moments = self._adam.state.get(self.magnitudes_Lt, {}) if self._adam else {}
        return {"magnitudes": self.magnitudes_Lt.cpu()} | {name: tensor.cpu() for name, tensor in moments.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        self.magnitudes_Lt = state["magnitudes"].clone()
        self._moments = {name: tensor for name, tensor in state.items() if name != "magnitudes"}

    def _gradient(self, name: str) -> Tensor:
        gradient = self._past[name].grad
        assert gradient is not None
        return gradient


def size(state: Mapping[str, Tensor], layer: str, part: Slices) -> Tensor:
    """||B_k A_k||_F of one slice, by two r x r products."""
    a_rd, b_dr = state[f"{layer}.lora_A.weight"][part.own], state[f"{layer}.lora_B.weight"][:, part.own]
    return ((b_dr.T @ b_dr) * (a_rd @ a_rd.T)).sum().clamp_min(0).sqrt()


def direction(state: Mapping[str, Tensor], layer: str, part: Slices) -> Tensor:
    """B_k / ||B_k A_k||_F, [out, r]; zero where task k learnt nothing."""
    b_dr, norm = state[f"{layer}.lora_B.weight"][:, part.own], size(state, layer, part)
    return torch.where(norm > 0, b_dr / norm, 0)
