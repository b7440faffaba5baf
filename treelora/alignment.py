"""Head alignment: after each task the head learns all seen classes anew, from features drawn from Gaussians.

Under local cross-entropy the rows of the head for one task's classes have never been weighed against another's. HiDe-
Prompt (Wang et al., NeurIPS 2023, arXiv 2310.07234, "task-adaptive prediction") and its LoRA form, HiDe-LoRA, mend
that without old images: each class leaves the mean and covariance of its features, as the adapter of its own task makes
them; the head alone is then trained, with cross-entropy over all seen classes, on features drawn from these.

Where this leaves them: the classes of a task share one covariance, so that a stream of many classes stays small (F^2
numbers a task), and Adam takes the place of SGD. What it brings is one switch away: `vision.align`.

Shapes: n rows, F features, C classes of the head, G Gaussians (one for each task and class).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from treelora.options.vision import VisionOptions

BATCH_ROWS = 128
RIDGE = 1e-4
"""Of the mean variance, added to the diagonal: a task with fewer rows than features has a singular covariance."""


class HeadAlignment:
    """Keeps the Gaussians of a stream's classes, and trains the head on them. Lives on every rank, equal on all."""

    def __init__(self, options: VisionOptions, seed: int = 0):
        self.options, self.seed = options, seed
        self._gaussians: list[tuple[int, int, Tensor]] = []
        """(task, place in the head, mean [F])."""
        self._factors: dict[int, Tensor] = {}
        """Cholesky factor [F, F] of each task's covariance."""

    def learn_task(self, task: int, features_nF: Tensor, classes_n: Tensor) -> None:
        """Keep what a task's classes look like; features are those of its own adapter, classes places in the head."""
        x_nF = features_nF.double()
        scatter_FF = torch.zeros(x_nF.shape[1], x_nF.shape[1], dtype=torch.float64)
        for place in classes_n.unique().tolist():
            rows_mF = x_nF[classes_n == place]
            mean_F = rows_mF.mean(dim=0)
            scatter_FF += (rows_mF - mean_F).T @ (rows_mF - mean_F)
            self._gaussians.append((task, place, mean_F.float()))
        covariance_FF = scatter_FF / len(x_nF)
        covariance_FF.diagonal().add_(max(RIDGE * float(covariance_FF.diagonal().mean()), 1e-12))
        self._factors[task] = torch.linalg.cholesky(covariance_FF).float()

    def means(self) -> Tensor | None:
        """Of the features of all classes learnt so far, [G, F]; None before the first."""
        return torch.stack([mean_F for _, _, mean_F in self._gaussians]) if self._gaussians else None

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`rows` features of every Gaussian [G * rows, F], and their classes [G * rows]."""
        parts = [
            mean_F + torch.randn(rows, len(mean_F), generator=generator) @ self._factors[task].T
            for task, _, mean_F in self._gaussians
        ]
        places = torch.tensor([place for _, place, _ in self._gaussians])
        return torch.cat(parts), places.repeat_interleave(rows)

    def aligned(self, head: Mapping[str, Tensor], task: int) -> dict[str, Tensor]:
        """The head after training on drawn features: a pure function of its arguments and what was learnt."""
        options = self.options
        names = sorted(head, key=lambda name: head[name].ndim)  # bias, weight
        trained = [head[name].detach().float().cpu().clone().requires_grad_() for name in names]
        weight_CF, bias_C = trained[-1], trained[0] if len(trained) > 1 else None
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + task) % 2**63)
        unseen_C = torch.ones(len(weight_CF), dtype=torch.bool)
        unseen_C[[place for _, place, _ in self._gaussians]] = False
        optimizer = torch.optim.Adam(trained, lr=options.align_learning_rate)
        steps = -(-len(self._gaussians) * options.align_rows // BATCH_ROWS) * options.align_epochs
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with torch.enable_grad():
            for _ in range(options.align_epochs):
                x_nF, classes_n = self.draw(options.align_rows, generator)
                for rows in torch.randperm(len(x_nF), generator=generator).split(BATCH_ROWS):
                    logits_nC = F.linear(x_nF[rows], weight_CF, bias_C).masked_fill(unseen_C, -torch.inf)
                    optimizer.zero_grad()
                    F.cross_entropy(logits_nC, classes_n[rows]).backward()
                    optimizer.step()
                    schedule.step()
        return {name: tensor.detach() for name, tensor in zip(names, trained, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """All Gaussians."""
        means = {f"mean/{task}/{place}": mean_F.clone() for task, place, mean_F in self._gaussians}
        return means | {f"factor/{task}": factor_FF.clone() for task, factor_FF in self._factors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to `state_dict`."""
        keys = [(name.split("/"), tensor.clone()) for name, tensor in state.items()]
        means = [(int(key[1]), int(key[2]), tensor) for key, tensor in keys if key[0] == "mean"]
        self._gaussians = sorted(means, key=lambda gaussian: gaussian[:2])
        self._factors = {int(key[1]): tensor for key, tensor in keys if key[0] == "factor"}
