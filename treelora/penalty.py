"""The similarity penalty: what keeps an update near the most similar past task (Eq. 3 of arXiv 2506.10355).

Eq. 3 adds lambda times the gradient of ||g_n - g_k||_1 to the step, so that coordinates where the new task's
gradient agrees with the similar task's are left alone and those in conflict are pulled. That gradient is H
sign(g_n - g_k), H the loss's Hessian: a second derivative, at a scale far from the gradient's own. The
functions here keep the sparsity and drop the Hessian, in three ways. All act coordinate by coordinate on
tensors of one shape, in their own dtype, and leave their arguments alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treelora.errors import ConfigError


def prox(u: Tensor, anchor: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    """anchor + soft(u - anchor, threshold), and how many coordinates are left equal to the anchor.

    The proximal step for threshold * ||w - anchor||_1: u are the weights after the optimizer's step on the
    loss alone, anchor the selected task's (or tree node's) adapter, threshold = learning rate * lambda (a
    number, or one for each coordinate). Coordinates that moved by no more than the threshold return to the
    anchor exactly, so the change from the parent is truly sparse; the others are drawn back by the threshold.

    Returns (w, kept): w in u's dtype, kept a 0-dim int64 tensor on u's device (no synchronisation).
    Raises: ConfigError for a negative threshold given as a number.
    """
    _not_negative("threshold", threshold)
    w = anchor + soft(u - anchor, threshold)
    return w, (w == anchor).sum()


def soft_gradient(g: Tensor, g_k: Tensor, lam: float) -> Tensor:
    """g_k + soft(g - g_k, lam * mean|g - g_k|): the gradient, shrunk towards the similar task's.

    The minimiser over x of 1/2 ||x - g||^2 + threshold * ||x - g_k||_1: coordinates that nearly agree take
    the similar task's value, those in conflict are pulled towards it. The threshold is relative to the mean
    residual,
    for gradients shrink by orders of magnitude in training: lam = 0 gives g, a large lam gives g_k. The
    caller brings g_k to g's scale where the two were measured at different times.
    Raises: ConfigError for a negative lam.
    """
    _not_negative("lam", lam)
    difference = g - g_k
    return g_k + soft(difference, lam * difference.abs().mean())


def sign_gradient(g: Tensor, g_k: Tensor, lam: float) -> Tensor:
    """g + lam * ||g||_2 * s / ||s||_2 with s = sign(g - g_k): Eq. 3 with the Hessian taken for the identity.

    A heuristic, not an approximation: its cosine with the exact gradient H sign(g - g_k) was measured as
    0.04. Rescaled to the norm of g because the exact term's natural scale (559 times the gradient's) is
    unusable. Where g equals g_k everywhere the gradient is returned as it is. Raises: ConfigError for a
    negative lam.
    """
    _not_negative("lam", lam)
    sign = torch.sign(g - g_k)
    return g + lam * g.norm() / sign.norm().clamp(min=1.0) * sign


def soft(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Soft-thresholding: sign(x) * max(|x| - threshold, 0), exactly 0 where |x| <= threshold."""
    return torch.sign(x) * (x.abs() - threshold).clamp(min=0)


def _not_negative(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor) and not value >= 0:
        raise ConfigError(f"{name} = {value}: must not be negative")
