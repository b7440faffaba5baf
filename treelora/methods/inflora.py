"""`inflora`: InfLoRA (Liang and Li, CVPR 2024, arXiv 2404.00228): A is designed so that old inputs don't pass it.

A linear layer's gradient lies in the span of its inputs x. Before task t their covariance C = E[x x^T] is measured.
With F an orthonormal basis of what past tasks leave free in the layer's input space (everything at first),

    A_t = Q^T / sqrt(3),    Q = F times the r leading eigenvectors of F^T C F

so the rows of A_t span the task's main inputs outside the past tasks' gradient space, and A_t x is about 0 for an old
input x; 1 / sqrt(3) is the norm of an ordinary A's rows. A stays, B is trained. After the task C is measured again, and
F loses leading eigenvectors of F^T C F until what is protected holds the share eps_t of E ||x||^2, with
eps_t = energy + (final_energy - energy) t / N, t from 0. Like DualGPM we store the smaller of F and its complement.

These are the paper's equations. Its authors' code decomposes C where the paper has the inputs, so the energies come
squared: on SmolLM2-135M a share of 0.95 then protects at most 2 of 576 dimensions, against up to 53. `batches` global
batches stand for the whole training set, padding left out. Layers that read the same input (q and v) share C and A.

Shapes: d inputs of a layer, f free dimensions, r rank, B rows, T tokens, S tokens that are no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from treelora.adapters import AdapterState, layer_of
from treelora.engine import Engine
from treelora.input_space import rows_along
from treelora.methods.base import TaskContext
from treelora.methods.slices import Accumulating
from treelora.objective import answer_logits
from treelora.options.peers import InfLoRAOptions
from treelora.signature import adapted_modules


class Space(NamedTuple):
    """A subspace of a layer's inputs, by an orthonormal basis of itself or of its complement."""

    basis: Tensor
    """[d, k], float32, on the CPU."""
    protects: bool
    """Whether the basis spans what is protected, or else what is free."""


class InfLoRA(Accumulating):
    """InfLoRA."""

    name = "inflora"
    freezes_a = True

    def __init__(self, options: InfLoRAOptions | None = None, seed: int = 0, *, rank: int) -> None:
        super().__init__(options, seed, rank=rank)
        self.options = options or InfLoRAOptions()
        self.spaces: dict[str, Space] = {}
        """What past tasks protect, by layer."""
        self._task: TaskContext
        self._designed: dict[str, Tensor] = {}

    def begin_task(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Method`."""
        covariances = input_covariances(engine, task, self.options.batches)
        self._designed = _on_rank_0(
            engine, covariances, lambda layer, c_dd: design(c_dd, self.spaces.get(layer), self.rank)
        )
        super().begin_task(task, engine, bank)

    def open(self, task: TaskContext, engine: Engine, bank: Sequence[AdapterState]) -> None:
        """See `Accumulating`."""
        super().open(task, engine, bank)
        self._task = task

    def start_a(self, name: str, part: Tensor) -> Tensor:
        """See `Accumulating`."""
        return self._designed[layer_of(name)]

    def end_task(self, engine: Engine) -> None:
        """See `Method`."""
        super().end_task(engine)
        tasks = next(t.shape[0] for name, t in engine.adapter_tensors().items() if ".lora_A." in name) // self.rank
        low, high = self.options.energy, self.options.final_energy
        share = low + (high - low) * self.slices.index / tasks
        covariances = input_covariances(engine, self._task, self.options.batches)
        self.spaces = _on_rank_0(engine, covariances, lambda layer, c_dd: protect(c_dd, self.spaces.get(layer), share))

    def state_dict(self) -> dict[str, Tensor]:
        """See `Method`. A key names all the layers that share a space, so that it is stored once."""
        shared: dict[int, list[str]] = {}
        for layer, space in self.spaces.items():
            shared.setdefault(id(space), []).append(layer)
        spaces = {"+".join(layers): self.spaces[layers[0]] for layers in shared.values()}
        return {f"{'protected' if space.protects else 'free'}/{key}": space.basis for key, space in spaces.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        self.spaces = {}
        for key, basis in state.items():
            kind, _, layers = key.partition("/")
            space = Space(basis, protects=kind == "protected")
            self.spaces |= dict.fromkeys(layers.split("+"), space)


T = TypeVar("T")


def _on_rank_0(engine: Engine, inputs: dict[str, Tensor], compute: Callable[[str, Tensor], T]) -> dict[str, T]:
    """A function of each layer's covariance, once for those that share it; not every machine rounds alike."""
    found: dict[int, T] = {}
    if engine.rank == 0:
        for layer, c_dd in inputs.items():
            if id(c_dd) not in found:
                found[id(c_dd)] = compute(layer, c_dd.cpu().double())
    return engine.broadcast({layer: found[id(c_dd)] for layer, c_dd in inputs.items() if found})


def design(c_dd: Tensor, space: Space | None, rank: int) -> Tensor:
    """A for a task whose inputs have covariance C: [rank, d]; rows of zero where fewer dimensions are free."""
    free_df = free_basis(space, len(c_dd))
    _, vectors_ff = torch.linalg.eigh(free_df.T @ c_dd @ free_df)
    return rows_along((free_df @ vectors_ff).flip(1)[:, :rank], rank)


def protect(c_dd: Tensor, space: Space | None, share: float) -> Space:
    """The protected space, grown by as few dimensions as hold `share` of the energy of a task's inputs."""
    free_df = free_basis(space, len(c_dd))
    energies_f, vectors_ff = torch.linalg.eigh(free_df.T @ c_dd @ free_df)
    left = int((energies_f.cumsum(0) <= (1 - share) * c_dd.trace()).sum())
    free_df = torch.linalg.qr(free_df @ vectors_ff[:, :left]).Q
    protects = 2 * left >= len(c_dd)
    return Space((complement(free_df) if protects else free_df).float().contiguous(), protects)


def free_basis(space: Space | None, width: int) -> Tensor:
    """An orthonormal basis of what is free: [width, f], float64."""
    if space is None:
        return torch.eye(width, dtype=torch.float64)
    basis = space.basis.double()
    return complement(basis) if space.protects else basis


def complement(basis: Tensor) -> Tensor:
    """An orthonormal basis of all that is orthogonal to some columns: [d, d - k]."""
    return torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]


def input_covariances(engine: Engine, task: TaskContext, batches: int) -> dict[str, Tensor]:
    """Sum of x x^T over tokens, [d, d] float32 for each adapted layer; layers of one input share a tensor. Collective.

    Measured on batches spread over the task, at the current weights, without dropout.
    """
    first: dict[str, str] = {}
    sums: dict[str, Tensor] = {}
    last: list[Any] = [torch.empty(0), ""]
    mask_BT: Tensor | None = None  # images have no padding

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_BTd = inputs[0]
            if x_BTd.data_ptr() != last[0].data_ptr():
                last[:] = x_BTd, layer  # kept alive, so that its address means itself
            if first.setdefault(layer, last[1]) == layer:
                x_Sd = (x_BTd.flatten(0, -2) if mask_BT is None else x_BTd[mask_BT]).float()
                sums[layer] = x_Sd.T @ x_Sd + sums.get(layer, 0)

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in adapted_modules(engine.module)]
    was_training = engine.module.training
    engine.module.eval()
    count = min(batches, task.steps)
    with torch.no_grad():
        for i in range(count):
            for batch in task.micro_batches(i * task.steps // count):
                mask_BT = None if "pixel_values" in batch else batch["attention_mask"].bool()
                answer_logits(engine.module, batch)
    engine.module.train(was_training)
    for handle in handles:
        handle.remove()
    flat = engine.all_reduce(torch.cat([c_dd.flatten() for c_dd in sums.values()]))
    parts = flat.split([c_dd.numel() for c_dd in sums.values()])
    summed = {layer: part.view_as(c_dd) for (layer, c_dd), part in zip(sums.items(), parts, strict=True)}
    return {layer: summed[owner] for layer, owner in first.items()}
