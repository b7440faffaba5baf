"""What a task reads of its layers' inputs, and the room that this leaves for other tasks.

A linear layer's gradient sum_t g_t x_t^T, over tokens t with inputs x_t and gradients g_t at the layer's output, lies
in the span of the inputs; a change of weights that sends these to zero changes nothing for the task (gradient
projection memory, arXiv 2103.09762). How much a task minds a change along some direction of the inputs is told by

    M = sum_t |g_t|^2 x_t x_t^T

which is the empirical Fisher information of the layer's weights, each token for itself, summed over the outputs. Few of
its eigenvalues are large, fewer than of the inputs' covariance sum_t x_t x_t^T.

Either is kept as M Omega, a product with K columns of random signs, which adds up over tokens, steps and workers; it
gives K approximate eigenvectors (Nystroem's method; arXiv 1706.05736, algorithm 3), exact ones where K is all of d.

Shapes: L layers, d inputs of a layer, K columns, p protected directions, r rank, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor

from treelora.engine import Engine
from treelora.errors import DataError
from treelora.sketch import keyed_bits

PURPOSE_INPUTS = 11
NEGLIGIBLE = 1e-6
"""Eigenvalues of a sketch in float32 below this share of the largest are rounding."""
Spaces = dict[str, Tensor]
"""Layers' protected directions, orthonormal [d, p] float32, on the CPU."""
Spectrum = tuple[Tensor, Tensor, float]
"""Eigenvectors [d, K] and eigenvalues [K] of M, the largest first, float64; and M's trace."""


class InputMoments:
    """The layers' sketches and traces as tokens come in; the same columns in every worker and session."""

    def __init__(self, widths: Mapping[str, int], size: int, seed: int, device: torch.device) -> None:
        """Layers by name with their numbers of inputs. K is `size`, or d where that is less."""
        self.layers = tuple(widths)
        # the same for all layers of a width, so that one product does for those that read the same input (q and v)
        columns = {width: _signs(width, min(size, width), seed).to(device) for width in widths.values()}
        self._omegas = [columns[width] for width in widths.values()]
        self._places: list[slice] = []
        start = 0
        for omega_dK in self._omegas:
            self._places.append(slice(start, start + omega_dK.numel() + 1))
            start += omega_dK.numel() + 1
        self.sums = torch.zeros(start, device=device)
        """Of all workers: a layer's sketch, then its trace, then the next layer's."""
        self._new = torch.zeros_like(self.sums)
        self._last = (self.sums[:0], self.sums[:0], self.sums[:0])

    def add(self, layer: int, x_Td: Tensor, weights_T: Tensor) -> None:
        """Take in this worker's tokens of a layer, each as often as its weight says; they count from `keep` on."""
        x_Td, omega_dK = x_Td.float(), self._omegas[layer]
        if x_Td.data_ptr() != self._last[0].data_ptr() or x_Td.shape != self._last[0].shape:
            # the input is kept too, so that its address means itself
            self._last = (x_Td, x_Td @ omega_dK, x_Td.square().sum(1))
        _, products_TK, squares_T = self._last
        weights_T = weights_T.float()
        new = self._new[self._places[layer]]
        new[:-1].view(omega_dK.shape).addmm_(x_Td.T, products_TK * weights_T[:, None])
        new[-1] += (squares_T * weights_T).sum()

    def keep(self, engine: Engine) -> None:
        """What all workers took in since the last `keep` or `drop` counts. Collective.

        At each step and not in the end, so that sums are rounded alike wherever a run was interrupted.
        """
        self.sums += engine.all_reduce(self._new)
        self.drop()

    def drop(self) -> None:
        """What was taken in since the last `keep` or `drop` doesn't count."""
        self._new.zero_()
        self._last = (self.sums[:0], self.sums[:0], self.sums[:0])

    def another(self) -> InputMoments:
        """Empty ones with the same columns."""
        other = copy(self)
        other.sums, other._new = torch.zeros_like(self.sums), torch.zeros_like(self.sums)
        return other

    def mean_trace(self) -> float:
        """The mean of the layers' traces."""
        return float(torch.stack([self.sums[place][-1] for place in self._places]).mean())

    def spectra(self, engine: Engine) -> dict[str, Spectrum]:
        """Of this worker's share of the layers."""
        sums = self.sums.cpu()
        layers = list(zip(self.layers, self._places, self._omegas, strict=True))
        return {
            layer: (
                *eigen(sums[place][:-1].view(omega_dK.shape).double(), omega_dK.cpu().double()),
                float(sums[place][-1]),
            )
            for layer, place, omega_dK in layers[engine.rank :: engine.world_size]
        }


def eigen(sketch_dK: Tensor, omega_dK: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors [d, K] and eigenvalues [K] of M from M Omega, the largest first; float64.

    Raises: DataError for NaN and infinity.
    """
    size = float(sketch_dK.norm())
    if size == 0:
        return torch.zeros_like(sketch_dK), torch.zeros(sketch_dK.shape[1], dtype=sketch_dK.dtype)
    if not math.isfinite(size):
        raise DataError("what a task's loss reads holds NaN or infinity; lower train.learning_rate")
    shift = NEGLIGIBLE * size / math.sqrt(len(sketch_dK))
    while True:
        # What rounding left negative has no root: it is shifted above zero, by more where the sums are coarser (TF32).
        shifted_dK = sketch_dK + shift * omega_dK
        core_KK = omega_dK.T @ shifted_dK
        root_KK, failed = torch.linalg.cholesky_ex((core_KK + core_KK.T) / 2)
        if not failed:
            break
        shift *= 10
    half_dK = torch.linalg.solve_triangular(root_KK, shifted_dK.T, upper=False).T
    u_dK, values_K = left_singular(half_dK)
    return u_dK, (values_K - shift).clamp_min(0)


def design(spectrum: Spectrum, space_dp: Tensor | None, rank: int) -> Tensor:
    """The A of a task whose inputs have this spectrum: [r, d] float32, orthogonal to what is protected.

    Its rows are the main directions of the inputs in what is free; rows of zero where fewer directions are free.
    """
    main_dK, values_K = _free(spectrum, space_dp)
    known_K = values_K > NEGLIGIBLE * spectrum[2]
    return rows_along((main_dK * known_K)[:, :rank], rank)


def rows_along(q_dk: Tensor, rank: int) -> Tensor:
    """An A whose first rows point along orthonormal columns, or are zero as these; the others are zero: [r, d] float32.

    They are 1/sqrt(3) long, as those of an ordinary A are in the mean, and their largest entry is positive, for an
    eigenvector's sign is arbitrary.
    """
    peaks_k = q_dk.gather(0, q_dk.abs().argmax(0, keepdim=True)).squeeze(0)
    a_rd = q_dk.new_zeros(rank, len(q_dk))
    a_rd[: q_dk.shape[1]] = (q_dk * peaks_k.sign()).T / math.sqrt(3)
    return a_rd.float()


def protect(spectrum: Spectrum, space_dp: Tensor | None, share: float) -> Tensor:
    """The protected directions and as few more as leave at most 1 - share of M's trace free: [d, p] float32.

    Never more than the K that M is known by.
    """
    main_dK, values_K = _free(spectrum, space_dp)
    trace = spectrum[2]
    free = trace - float(spectrum[1].sum() - values_K.sum())  # what the sketch doesn't know of is taken for free
    left_K = free - values_K.cumsum(0)
    more = 0 if free <= (1 - share) * trace else 1 + int((left_K > (1 - share) * trace).sum())
    known = int((values_K > NEGLIGIBLE * trace).sum())
    new_dp = main_dK[:, : min(more, known)].float()
    return new_dp if space_dp is None else torch.cat([space_dp, new_dp], dim=1)


def _free(spectrum: Spectrum, space_dp: Tensor | None) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of M between the directions that aren't protected."""
    vectors_dK, values_K, _ = spectrum
    if space_dp is None:
        return vectors_dK, values_K
    scaled_dK = vectors_dK * values_K.sqrt()
    space_dp = space_dp.double()
    for _ in range(2):  # once leaves rounding of the large directions in the small ones
        scaled_dK = scaled_dK - space_dp @ (space_dp.T @ scaled_dK)
    return left_singular(scaled_dK)


def left_singular(half_dK: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and squared singular values, the largest first.

    By the K x K product, which is quicker than an SVD and whose rounding is far below `NEGLIGIBLE`. Vectors whose value
    is rounding are zero.
    """
    values_K, turn_KK = torch.linalg.eigh(half_dK.T @ half_dK)
    values_K, turn_KK = values_K.flip(0).clamp_min(0), turn_KK.flip(1)
    known_K = values_K > 1e-12 * values_K.max()
    roots_K = torch.where(known_K, values_K, 1.0).sqrt()
    return half_dK @ turn_KK / roots_K * known_K, values_K


def _signs(width: int, size: int, seed: int) -> Tensor:
    if size == width:
        return torch.eye(width)
    bits = keyed_bits(seed, width, width * size, purpose=PURPOSE_INPUTS) >> 63
    return torch.from_numpy(bits.astype("float32").reshape(width, size)) * 2 - 1
