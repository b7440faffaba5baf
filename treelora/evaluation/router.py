"""Which task does a prompt come from? Gaussian prototypes with a shared covariance on frozen features (LDA).

The router is extra state beside the adapters and needs no task id at test time; results that use it must say
so, and peers must be given the same router.

Shapes: n rows, F features, K tasks added so far.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from treelora.errors import CheckpointError, ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Routes:
    """What the router takes n prompts for; tasks are places in its `names`."""

    best_n: np.ndarray
    """int64; ties go to the task added first."""
    second_n: np.ndarray
    """The runner-up, int64; -1 while there is one task."""
    margin_n: np.ndarray
    """Log-likelihood of the best less that of the runner-up, float64; infinite while there is one task."""


class GaussianRouter:
    """Task inference by linear discriminant analysis with equal priors.

    Each task is a Gaussian around the mean of its features; all share the pooled within-task covariance S
    (divided by the number of rows), shrunk to (1 - s) S + s tr(S)/F I: `sklearn`
    LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s) on balanced classes. Only counts, means and the
    scatter are kept, in float64, so adding tasks one by one gives what a batch over all rows would give (to
    rounding), in any order.

    Raises:
        ConfigError: shrinkage is not in (0, 1]; without it fewer rows than features leave S singular.
    """

    def __init__(self, shrinkage: float = 0.1) -> None:
        if not 0.0 < shrinkage <= 1.0:
            raise ConfigError(f"router shrinkage is {shrinkage}; it must be above 0 and at most 1")
        self.shrinkage = float(shrinkage)
        self.names: list[str] = []
        self._counts_K = torch.zeros(0, dtype=torch.float64)
        self._means_KF = torch.zeros(0, 0, dtype=torch.float64)
        self._scatter_FF = torch.zeros(0, 0, dtype=torch.float64)
        self._discriminant: tuple[Tensor, Tensor] | None = None

    def add_task(self, name: str, features_nF: Tensor) -> None:
        """Add one task from the features [n, F] of its training prompts; n >= 1.

        Raises:
            DataError: a name already added, a wrong shape, or features that are not finite.
        """
        if name in self.names:
            raise DataError(f"the router already knows task {name!r}; every task is added once")
        x_nF = self._checked(features_nF)
        if len(x_nF) == 0:
            raise DataError(f"task {name!r} has no feature rows; give at least one")
        mean_F = x_nF.mean(dim=0)
        centred_nF = x_nF - mean_F
        scatter_FF = centred_nF.T @ centred_nF
        self.names.append(name)
        self._counts_K = torch.cat([self._counts_K, torch.tensor([len(x_nF)], dtype=torch.float64)])
        first = len(self.names) == 1
        self._means_KF = mean_F[None] if first else torch.cat([self._means_KF, mean_F[None]])
        self._scatter_FF = scatter_FF if first else self._scatter_FF + scatter_FF
        self._discriminant = None

    def log_likelihoods(self, features_nF: Tensor) -> Tensor:
        """log p(x | task) [n, K] float64, up to a term that all tasks of a row share.

        Raises:
            DataError: no task added yet, a wrong shape, or features that are not finite.
        """
        if not self.names:
            raise DataError("the router knows no task yet; call add_task first")
        x_nF = self._checked(features_nF)
        if self._discriminant is None:
            self._discriminant = self._solve()
        weights_FK, bias_K = self._discriminant
        return (x_nF - self._centre()) @ weights_FK + bias_K

    def predict(self, features_nF: Tensor) -> tuple[Tensor, Tensor]:
        """Most likely task and how clearly.

        Returns:
            indices [n] int64 into `names`, and margins [n] float64: log-likelihood of the best task minus
            that of the second best (infinite while there is one task). Ties go to the task added first.

        Raises:
            DataError: as for `log_likelihoods`.
        """
        routes = self.routes(features_nF)
        return torch.from_numpy(routes.best_n), torch.from_numpy(routes.margin_n)

    def routes(self, features_nF: Tensor) -> Routes:
        """The two likeliest tasks of each row [n, F] and how far they are apart. Raises as `log_likelihoods`."""
        scores_nK = self.log_likelihoods(features_nF)
        best_n, value_n = _first_largest(scores_nK)
        if len(self.names) == 1:
            second_n, margin_n = torch.full_like(best_n, -1), torch.full_like(value_n, torch.inf)
        else:
            second_n, other_n = _first_largest(scores_nK.scatter(1, best_n[:, None], -torch.inf))
            margin_n = value_n - other_n
        return Routes(best_n.numpy(), second_n.numpy(), margin_n.numpy())

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that safetensors can store; the names are the UTF-8 bytes of a JSON list."""
        text = json.dumps(self.names, ensure_ascii=False).encode()
        return {
            "counts": self._counts_K.clone(),
            "means": self._means_KF.clone(),
            "scatter": self._scatter_FF.clone(),
            "shrinkage": torch.tensor(self.shrinkage, dtype=torch.float64),
            "names": torch.tensor(list(text), dtype=torch.uint8),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> GaussianRouter:
        """The router that `state_dict` described.

        Raises:
            CheckpointError: an entry is missing or the shapes disagree.
        """
        missing = {"counts", "means", "scatter", "shrinkage", "names"} - set(state)
        if missing:
            raise CheckpointError(f"the router's state lacks {sorted(missing)}; use a complete checkpoint")
        router = cls(float(state["shrinkage"]))
        try:
            router.names = [str(name) for name in json.loads(bytes(state["names"].tolist()))]
        except ValueError as error:
            raise CheckpointError(f"the router's names can't be read ({error}); the checkpoint is damaged") from error
        router._counts_K = state["counts"].to(torch.float64).clone()
        router._means_KF = state["means"].to(torch.float64).clone()
        router._scatter_FF = state["scatter"].to(torch.float64).clone()
        k, f = len(router.names), router._scatter_FF.shape[0]
        shapes = tuple(router._counts_K.shape), tuple(router._means_KF.shape), tuple(router._scatter_FF.shape)
        if shapes != ((k,), (k, f), (f, f)):
            raise CheckpointError(f"the router's state has {k} names but shapes {shapes}; the checkpoint is damaged")
        return router

    def _centre(self) -> Tensor:
        # Distances don't change when all means and rows shift together; near the origin they lose fewer
        # digits.
        return self._means_KF.mean(dim=0)

    def _solve(self) -> tuple[Tensor, Tensor]:
        """Linear discriminant: weights S^-1 m_k [F, K] and bias -m_k S^-1 m_k / 2 [K], means m_k centred."""
        f = self._scatter_FF.shape[0]
        covariance_FF = self._scatter_FF / self._counts_K.sum()
        scale = float(covariance_FF.diagonal().mean())
        # Without any spread within tasks (one row each, or identical rows) all directions count alike.
        shrunk_FF = (1.0 - self.shrinkage) * covariance_FF
        shrunk_FF.diagonal().add_(self.shrinkage * scale if scale > 0.0 else 1.0)
        means_KF = self._means_KF - self._centre()
        cholesky_FF, failed = torch.linalg.cholesky_ex(shrunk_FF)
        if int(failed):
            raise DataError(f"the router's covariance of {f} features is singular; raise shrinkage {self.shrinkage}")
        weights_FK = torch.cholesky_solve(means_KF.T.contiguous(), cholesky_FF)
        return weights_FK, -0.5 * (means_KF.T * weights_FK).sum(dim=0)

    def _checked(self, features_nF: Tensor) -> Tensor:
        if features_nF.ndim != 2 or features_nF.shape[1] == 0:
            raise DataError(f"features have shape {tuple(features_nF.shape)}; expected [rows, features]")
        if self.names and features_nF.shape[1] != self._means_KF.shape[1]:
            raise DataError(
                f"rows have {features_nF.shape[1]} features, but the router was built with {self._means_KF.shape[1]}"
            )
        x_nF = features_nF.detach().to(device="cpu", dtype=torch.float64)
        bad = torch.nonzero(~torch.isfinite(x_nF).all(dim=1))
        if len(bad):
            raise DataError(f"feature row {int(bad[0])} has a value that is not finite; check the model's output")
        return x_nF


def _first_largest(scores_nK: Tensor) -> tuple[Tensor, Tensor]:
    """Place [n] of each row's first largest value, and the value [n]."""
    value_n = scores_nK.max(dim=1).values
    return (scores_nK == value_n[:, None]).to(torch.int8).argmax(dim=1), value_n
