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
from torch import Tensor, nn

from treelora.input_space import NEGLIGIBLE, Spectrum, left_singular

DIRECTIONS = 64
"""Most that are kept of a layer."""
Pair = tuple[Tensor, Tensor]
"""A and B, of a layer or of several."""


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
    """s B* A* H of all layers of one shape, and the way back to it after a step.

    It has rank r and is kept as its factors B* and A* H, so that only A meets H itself, once there and once back.

    Shapes: L layers.
    """

    def __init__(self, halves: Mapping[str, Tensor], found: Mapping[str, Pair], scale: float) -> None:
        """With H of each of the layers, not all of which need have as many columns, and their A* and B*."""
        self.layers, self.scale = tuple(halves), scale
        most = max(half_dp.shape[1] for half_dp in halves.values())
        padded = [nn.functional.pad(half_dp, (0, most - half_dp.shape[1])) for half_dp in halves.values()]
        self.half_Ldp = torch.stack(padded)
        self.squares_Lp = self.half_Ldp.square().sum(1)
        """Of H's columns, which are orthogonal."""
        a_Lrd, self.b_LOr = self.stacked(found)
        self.entered_Lrp = a_Lrd @ self.half_Ldp

    def stacked(self, pairs: Mapping[str, Pair]) -> Pair:
        """A [L, r, d] and B [L, O, r] of the layers."""
        a_Lrd, b_LOr = (torch.stack([pairs[layer][side] for layer in self.layers]) for side in range(2))
        return a_Lrd, b_LOr

    def near(self, a_Lrd: Tensor, b_LOr: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """First B, then A, each where weight / 2 x cost + 1/2 x squared distance from what is given is least.

        The minima are found, not stepped towards: however strong the guard is, nothing overshoots.

        Returns:
            A, B, and the cost that is left: the sum over the layers of tr(D C D^T) / O.
        """
        unit = self.scale**2 / b_LOr.shape[1]
        k = weight * unit
        entered_Lrp = a_Lrd @ self.half_Ldp
        # B (I + k P P^T) = B' + k B* P* P^T with P = A H and P* = A* H
        left_Lrr = torch.eye(a_Lrd.shape[1]).to(a_Lrd) + k * entered_Lrp @ entered_Lrp.mT
        inverse_Lrr = torch.linalg.inv_ex(left_Lrr).inverse  # of r x r; to solve for O right sides takes longer
        b_LOr = torch.baddbmm(b_LOr, self.b_LOr, self.entered_Lrp @ entered_Lrp.mT, alpha=k) @ inverse_Lrr
        # A = A' + Z H^T; in the eigenvectors of B^T B each number of Z stands alone, because H's columns are orthogonal
        squared_Lrr = b_LOr.mT @ b_LOr
        values_Lr, q_Lrr = torch.linalg.eigh(squared_Lrr)
        held_Lrp = (b_LOr.mT @ self.b_LOr) @ self.entered_Lrp
        pull_Lrp = k * q_Lrr.mT @ (held_Lrp - squared_Lrr @ entered_Lrp)
        z_Lrp = q_Lrr @ (pull_Lrp / (1 + k * values_Lr.clamp_min(0)[:, :, None] * self.squares_Lp[:, None]))
        entered_Lrp = entered_Lrp + z_Lrp * self.squares_Lp[:, None]
        return torch.baddbmm(a_Lrd, z_Lrp, self.half_Ldp.mT), b_LOr, unit * self._moved(b_LOr, entered_Lrp)

    def _moved(self, b_LOr: Tensor, entered_Lrp: Tensor) -> Tensor:
        """The squared norm of B P - B* P*, by the differences of the factors: those of the products would cancel."""
        left = torch.cat([b_LOr - self.b_LOr, self.b_LOr], dim=2)
        right = torch.cat([entered_Lrp, entered_Lrp - self.entered_Lrp], dim=1)
        return ((left.mT @ left) * (right @ right.mT)).sum().clamp_min(0)


def factors(tensors: Mapping[str, Tensor]) -> dict[str, Pair]:
    """A and B by layer."""
    return {
        name.removesuffix(".lora_A.weight"): (a_rd, tensors[name.replace("lora_A", "lora_B")])
        for name, a_rd in tensors.items()
        if ".lora_A." in name
    }
