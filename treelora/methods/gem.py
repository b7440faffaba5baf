"""`gem`: Gradient Episodic Memory (Lopez-Paz and Ranzato, NeurIPS 2017, arXiv 1706.08840).

A few rows of every past task are kept. At each step their loss' gradient is computed task by task, and the step's
gradient is replaced by the nearest one that increases the loss of none (Eq. 8, 11):

    minimise 1/2 |z - g|^2   subject to   <z, g_k> >= 0 for every past task k

It is solved through the dual, a problem of as many numbers as there are past tasks: z = g + G^T v with v >= margin,
v = margin + u, and u the non-negative least-squares solution. As in the authors' code the margin (their memory
strength, gamma) bounds v from below when any constraint is violated; it draws towards the past tasks further than the
constraints demand, and these still hold, for z stays optimal for the bound.

Where this leaves the paper: the optimizer is AdamW, not SGD, so that the guarantee holds for the gradient that the
optimizer is given; rows of a task are drawn uniformly, where the paper takes the last ones.
Cost beside plain training: a forward and a backward pass on `rows_per_task` rows for every past task at every step, so
it grows with the square of the stream. Kept: row numbers, 24 bytes each.

Shapes: K past tasks, D numbers of the adapter.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from treelora.methods.episodic import ProjectingMethod, memory_gradients
from treelora.options.peers import GEMOptions

BLOCK = 2**20  # numbers of the adapter that are turned into float64 at a time


def project(gradient_D: Tensor, memory_KD: Tensor, margin: float = 0.0) -> Tensor:
    """The gradient itself where no past task objects, else the solution of the quadratic programme.

    Raises:
        RuntimeError: the solver didn't end, which so few variables don't bring about.
    """
    stacked = torch.cat([memory_KD, gradient_D[None]])
    parts = [part.double() @ part.double().T for part in stacked.split(BLOCK, dim=1)]
    gram_NN = torch.stack(parts).sum(0).cpu().numpy()
    product_K = gram_NN[:-1, -1]
    if not np.isfinite(gram_NN).all() or (product_K >= 0).all():
        return gradient_D
    dual_K = solve_dual(gram_NN[:-1, :-1], product_K, margin)
    return gradient_D + torch.from_numpy(dual_K).to(gradient_D) @ memory_KD


def solve_dual(gram_KK: np.ndarray, product_K: np.ndarray, margin: float) -> np.ndarray:
    """The v >= margin that minimises 1/2 v^T P v + q^T v, with P = G G^T and q = G g; float64 [K] (Eq. 11).

    With u = v - margin it is non-negative least squares: P = A^T A from its eigenvectors, min |A u + b|^2 with
    A^T b = q + margin P 1. Rows are scaled to unit length before, so that a task with a small gradient counts in full.
    """
    from scipy.optimize import nnls

    length_K = np.sqrt(np.diag(gram_KK))
    length_K[length_K == 0] = 1.0
    values_K, vectors_KK = np.linalg.eigh(gram_KK / np.outer(length_K, length_K))
    kept = values_K > 1e-12 * values_K.max(initial=0.0)
    root_K, vectors = np.sqrt(values_K[kept]), vectors_KK[:, kept]
    target_K = (product_K + margin * gram_KK.sum(axis=1)) / length_K
    solution_K, _ = nnls(root_K[:, None] * vectors.T, -(vectors.T @ target_K) / root_K)
    return np.asarray(margin + solution_K / length_K)


class GEM(ProjectingMethod):
    """GEM: the step's gradient opposes no past task's."""

    name = "gem"

    def __init__(self, options: GEMOptions | None = None, seed: int = 0):
        super().__init__(options, seed)
        self.options = options or GEMOptions()

    def rows_to_keep(self, rows: int) -> int:
        """See `EpisodicMethod`."""
        return self.options.rows_per_task

    def projected(self, gradient_D: Tensor) -> Tensor:
        """See `ProjectingMethod`."""
        sets = self.memory.of_each_task()
        memory_KD = memory_gradients(self.engine, self.task, sets, self.options.micro_rows)
        return project(gradient_D, memory_KD, self.options.margin)
