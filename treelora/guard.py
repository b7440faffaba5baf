"""What past tasks' losses depend on, and what it costs to change it: a quadratic penalty on the layers' outputs.

A change D of a layer's weights [O, d] changes its outputs by D x. How much past task t minds a change along a direction
of the inputs is told by M_t (`treelora.input_space`), its loss's Fisher information summed over the outputs. With

    C = sum over past tasks of M_t / m_t,        m_t: the mean of tr M_t over the layers
    penalty = strength / 2 * sum over layers of tr(D C D^T) / O,        D = s (B A - B* A*)

where B* A* is the adapter as the task found it. That is a Laplace approximation with Kronecker factors, the outputs'
factor being taken for the identity (Ritter et al., NeurIPS 2018, arXiv 1805.07810, has both, layer by layer;
Kirkpatrick et al., arXiv 1612.00796, the diagonal, weight by weight). Here D isn't the change of a weight but of the
product that the layer computes with, so A and B may move in any way that leaves it alone.

Of C a layer keeps H [d, p] with C = H H^T, its leading eigenvectors times the roots of their eigenvalues, at most
`DIRECTIONS`: what is kept doesn't grow with the number of tasks.

Shapes: d inputs and O outputs of a layer, p directions, r rank, K columns of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from treelora.input_space import NEGLIGIBLE, Spectrum, left_singular

DIRECTIONS = 64
"""Most that are kept of a layer."""


def take_in(half_dp: Tensor | None, spectrum: Spectrum, unit: float) -> Tensor:
    """H with one more task's C = M / unit: [d, p] float32."""
    vectors_dK, values_K, _ = spectrum
    new_dK = vectors_dK * (values_K / (unit or 1.0)).sqrt()
    both = new_dK if half_dp is None else torch.cat([half_dp.double(), new_dK], dim=1)
    u_dn, values_n = left_singular(both)
    known = min(DIRECTIONS, int((values_n > NEGLIGIBLE * values_n.sum()).sum()))
    return (u_dn * values_n.sqrt())[:, :known].float().contiguous()


def guard_bytes(width: int) -> int:
    """The most that a layer with so many inputs keeps."""
    return 4 * width * min(width, DIRECTIONS)


class HeldOutputs:
    """One layer's s B* A* H, and what it costs to leave it."""

    def __init__(self, half_dp: Tensor, a_rd: Tensor, b_Or: Tensor, scale: float) -> None:
        self.half_dp, self.scale = half_dp, scale
        self.products_Op = b_Or @ (a_rd @ half_dp)

    def cost(self, a_rd: Tensor, b_Or: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tr(D C D^T) / O, and its gradients by A and by B: autograd takes twice as long."""
        entered_rp, unit = a_rd @ self.half_dp, self.scale**2 / len(b_Or)
        moved_Op = torch.addmm(self.products_Op, b_Or, entered_rp, beta=-1)
        by_a_rd = 2 * unit * (b_Or.T @ moved_Op) @ self.half_dp.T
        return unit * moved_Op.square().sum(), by_a_rd, 2 * unit * moved_Op @ entered_rp.T


def factors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by layer."""
    return {
        name.removesuffix(".lora_A.weight"): (a_rd, tensors[name.replace("lora_A", "lora_B")])
        for name, a_rd in tensors.items()
        if ".lora_A." in name
    }
