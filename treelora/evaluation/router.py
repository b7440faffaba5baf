"""Which task does a row come from? Gaussian prototypes with a shared covariance on frozen features (LDA).

The router is extra state beside the adapters and needs no task id at test time; results that use it must say
so, and peers must be given the same router.

A task is one Gaussian, or one for each of its classes: it is then as likely as its likeliest class, which is how
task-identity inference works in HiDe-Prompt (Wang et al., NeurIPS 2023, arXiv 2310.07234).

Shapes: n rows, F features, K tasks added so far, G >= K Gaussians.
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
    """What the router takes n rows for; tasks are places in its `names`."""

    best_n: np.ndarray
    """int64; ties go to the task added first."""
    second_n: np.ndarray
    """The runner-up, int64; -1 while there is one task."""
    margin_n: np.ndarray
    """Log-likelihood of the best less that of the runner-up, float64; infinite while there is one task."""


class GaussianRouter:
    """Task inference by linear discriminant analysis with equal priors.

    Each Gaussian lies around the mean of its rows' features; all share the pooled covariance S within them (divided by
    the number of rows), shrunk to (1 - s) S + s tr(S)/F I: `sklearn`
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
        self._task_G = torch.zeros(0, dtype=torch.int64)
        self._counts_G = torch.zeros(0, dtype=torch.float64)
        self._means_GF = torch.zeros(0, 0, dtype=torch.float64)
        self._scatter_FF = torch.zeros(0, 0, dtype=torch.float64)
        self._discriminant: tuple[Tensor, Tensor] | None = None

    def add_task(self, name: str, features_nF: Tensor, classes_n: Tensor | None = None) -> None:
        """Add one task from the features [n, F] of its training rows; n >= 1.

        `classes_n`, int64 [n]: the rows of each class make a Gaussian of their own; None: all rows make one.

        Raises:
            DataError: a name already added, a wrong shape, or features that are not finite.
        """
        if name in self.names:
            raise DataError(f"the router already knows task {name!r}; every task is added once")
        x_nF = self._checked(features_nF)
        if len(x_nF) == 0:
            raise DataError(f"task {name!r} has no feature rows; give at least one")
        classes_n = torch.zeros(len(x_nF), dtype=torch.int64) if classes_n is None else classes_n
        means, scatter_FF = [], torch.zeros(x_nF.shape[1], x_nF.shape[1], dtype=torch.float64)
        for label in classes_n.unique():  # in ascending order
            rows_mF = x_nF[classes_n == label]
            means.append(rows_mF.mean(dim=0))
            centred_mF = rows_mF - means[-1]
            scatter_FF += centred_mF.T @ centred_mF
            self._counts_G = torch.cat([self._counts_G, torch.tensor([len(rows_mF)], dtype=torch.float64)])
        self._task_G = torch.cat([self._task_G, torch.full((len(means),), len(self.names), dtype=torch.int64)])
        self.names.append(name)
        first = len(self.names) == 1
        self._means_GF = torch.stack(means) if first else torch.cat([self._means_GF, torch.stack(means)])
        self._scatter_FF = scatter_FF if first else self._scatter_FF + scatter_FF
        self._discriminant = None

    def log_likelihoods(self, features_nF: Tensor) -> Tensor:
        """log p(x | task) [n, K] float64, or that of its likeliest class, up to a term that all tasks of a row share.

        Raises:
            DataError: no task added yet, a wrong shape, or features that are not finite.
        """
        if not self.names:
            raise DataError("the router knows no task yet; call add_task first")
        x_nF = self._checked(features_nF)
        if self._discriminant is None:
            self._discriminant = self._solve()
        weights_FG, bias_G = self._discriminant
        scores_nG = (x_nF - self._centre()) @ weights_FG + bias_G
        if len(self.names) == len(self._task_G):
            return scores_nG
        scores_nK = torch.full((len(x_nF), len(self.names)), -torch.inf, dtype=torch.float64)
        return scores_nK.scatter_reduce(1, self._task_G.expand_as(scores_nG), scores_nG, "amax")

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
            "tasks": self._task_G.clone(),
            "counts": self._counts_G.clone(),
            "means": self._means_GF.clone(),
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
        router._counts_G = state["counts"].to(torch.float64).clone()
        router._means_GF = state["means"].to(torch.float64).clone()
        # of a version that knew one Gaussian a task
        router._task_G = state.get("tasks", torch.arange(len(router.names))).to(torch.int64).clone()
        router._scatter_FF = state["scatter"].to(torch.float64).clone()
        g, f = len(router._task_G), router._scatter_FF.shape[0]
        shapes = tuple(router._counts_G.shape), tuple(router._means_GF.shape), tuple(router._scatter_FF.shape)
        known = router._task_G.unique().tolist() == list(range(len(router.names)))
        if not known or shapes != ((g,), (g, f), (f, f)):
            raise CheckpointError(
                f"the router's state has {len(router.names)} names but shapes {shapes}; the checkpoint is damaged"
            )
        return router

    def _centre(self) -> Tensor:
        # Distances don't change when all means and rows shift together; near the origin they lose fewer
        # digits.
        return self._means_GF.mean(dim=0)

    def _solve(self) -> tuple[Tensor, Tensor]:
        """Linear discriminant: weights S^-1 m_g [F, G] and bias -m_g S^-1 m_g / 2 [G], means m_g centred."""
        f = self._scatter_FF.shape[0]
        covariance_FF = self._scatter_FF / self._counts_G.sum()
        scale = float(covariance_FF.diagonal().mean())
        # Without any spread within tasks (one row each, or identical rows) all directions count alike.
        shrunk_FF = (1.0 - self.shrinkage) * covariance_FF
        shrunk_FF.diagonal().add_(self.shrinkage * scale if scale > 0.0 else 1.0)
        means_GF = self._means_GF - self._centre()
        cholesky_FF, failed = torch.linalg.cholesky_ex(shrunk_FF)
        if int(failed):
            raise DataError(f"the router's covariance of {f} features is singular; raise shrinkage {self.shrinkage}")
        weights_FG = torch.cholesky_solve(means_GF.T.contiguous(), cholesky_FF)
        return weights_FG, -0.5 * (means_GF.T * weights_FG).sum(dim=0)

    def _checked(self, features_nF: Tensor) -> Tensor:
        if features_nF.ndim != 2 or features_nF.shape[1] == 0:
            raise DataError(f"features have shape {tuple(features_nF.shape)}; expected [rows, features]")
        if self.names and features_nF.shape[1] != self._means_GF.shape[1]:
            raise DataError(
                f"rows have {features_nF.shape[1]} features, but the router was built with {self._means_GF.shape[1]}"
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
