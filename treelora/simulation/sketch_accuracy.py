"""How well a CountSketch keeps the distances between tasks, against the exact ones on the full gradients.

Shapes: N tasks, L layers, D_l numbers of layer l's gradient, K sketch numbers a layer, Q = N (N - 1) / 2 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from treelora.errors import ConfigError
from treelora.simulation.statistics import rank_correlation
from treelora.sketch import CountSketch, normalise
from treelora.tree_build import pairwise_distances

FREEDOM = 3  # degrees of freedom of Student's t: the variance exists, the fourth moment doesn't


@dataclass(frozen=True)
class SketchScore:
    """What K numbers a layer keep, over all pairs of tasks; errors are means of absolute relative errors.

    l2_error: of the L2 distance, a layer at a time. l1_ratio, l2_ratio: median of the sketch's residual over the exact
    ||g - h||_1 / sqrt D, and over the exact ||g - h||_2. l1_error: of the residual against the exact L1 distance, up
    to the median ratio of its layer, which no ranking sees.
    layer_ranking, ranking: Spearman's correlation of the pairs' residuals with the exact L1 ranking, mean over
    layers, and for the mean over layers (what the tree looks at). layer_nearest, nearest: share of tasks whose
    nearest task is the exact one, likewise. shard_difference: largest absolute difference between the sketch
    and the sum of its shards' sketches, over the largest number in the sketch. bytes_task: float32.
    """

    run: int
    sketch_size: int
    l2_error: float
    l1_ratio: float
    l2_ratio: float
    l1_error: float
    layer_ranking: float
    ranking: float
    layer_nearest: float
    nearest: float
    shard_difference: float
    bytes_task: int


def heavy_tailed_gradients(tasks: int, layer_dims: Sequence[int], seed: int) -> list[Tensor]:
    """[N, D_l] float32 a layer: a part that all tasks share, one of a family of four tasks, one of the task.

    Coordinates are Student's t with three degrees of freedom, in rows of eight (the rank) whose sizes are
    lognormal and shared by all tasks: few rows carry most of the gradient. Parts weigh 1, family 0.2 to 1 and
    task 0.2 to 1, so that pairs lie at many distances.
    """
    rng = np.random.default_rng(seed)
    families = -(-tasks // 4)
    family_weight, task_weight = rng.uniform(0.2, 1, size=(families, 1)), rng.uniform(0.2, 1, size=(tasks, 1))
    gradients = []
    for dim in layer_dims:
        size_D = np.repeat(np.exp(rng.normal(size=-(-dim // 8))), 8)[:dim]
        shared, family, own = (rng.standard_t(FREEDOM, size=(count, dim)) for count in (1, families, tasks))
        mixed_ND = shared + (family_weight * family)[np.arange(tasks) // 4] + task_weight * own
        gradients.append(torch.from_numpy((size_D * mixed_ND).astype(np.float32)))
    return gradients


def score_sketches(
    sizes: Sequence[int], layer_dims: Sequence[int], *, tasks: int = 16, shards: int = 7, run: int = 0, seed: int = 0
) -> Iterator[SketchScore]:
    """One score a sketch size, all against the same gradients. Raises: ConfigError."""
    if tasks < 3 or shards < 1 or not 0 <= seed < 2**32:
        raise ConfigError(f"tasks = {tasks}, shards = {shards}, seed = {seed}: need 3 tasks, a shard, a seed < 2**32")
    gradients = heavy_tailed_gradients(tasks, layer_dims, seed * 2**31 + run)
    unit = [layer / layer.norm(dim=1, keepdim=True) for layer in gradients]
    exact_l1_LQ, exact_l2_LQ = (np.stack([_pairs(layer, p) for layer in unit]) for p in (1.0, 2.0))
    exact_l1_LQ = exact_l1_LQ / np.sqrt(np.array(layer_dims))[:, None]
    for size in sizes:
        sketch = CountSketch(layer_dims, size, seed * 2**31 + run)
        raw_NLK = torch.stack([sketch.sketch([layer[task] for layer in unit]) for task in range(tasks)])
        signatures_NLK = torch.stack([normalise(raw_LK) for raw_LK in raw_NLK]).numpy()
        upper = np.triu_indices(tasks, 1)
        residual_LQ = pairwise_distances(signatures_NLK)[:, upper[0], upper[1]]
        # Linear, not normalised: that is what the error of sqrt(2 / K) is about.
        l2_LQ = np.stack([_pairs(raw_NLK[:, layer], 2.0) for layer in range(len(layer_dims))])
        l1_ratio_LQ = residual_LQ / exact_l1_LQ
        yield SketchScore(
            run,
            size,
            l2_error=float(np.abs(l2_LQ / exact_l2_LQ - 1).mean()),
            l1_ratio=float(np.median(l1_ratio_LQ)),
            l2_ratio=float(np.median(residual_LQ / exact_l2_LQ)),
            l1_error=float(np.abs(l1_ratio_LQ / np.median(l1_ratio_LQ, axis=1, keepdims=True) - 1).mean()),
            layer_ranking=float(np.mean([rank_correlation(*ab) for ab in zip(residual_LQ, exact_l1_LQ, strict=True)])),
            ranking=rank_correlation(residual_LQ.mean(axis=0), exact_l1_LQ.mean(axis=0)),
            layer_nearest=float((_nearest(residual_LQ, tasks) == _nearest(exact_l1_LQ, tasks)).mean()),
            nearest=float(
                (_nearest(residual_LQ.mean(axis=0), tasks) == _nearest(exact_l1_LQ.mean(axis=0), tasks)).mean()
            ),
            shard_difference=_shard_difference(sketch, [layer[0] for layer in unit], raw_NLK[0], shards),
            bytes_task=4 * size * len(layer_dims),
        )


def _shard_difference(sketch: CountSketch, vectors: Sequence[Tensor], whole_LK: Tensor, shards: int) -> float:
    """Every layer cut into `shards` contiguous pieces, as ZeRO cuts a flat gradient."""
    total_LK = torch.zeros_like(whole_LK)
    for shard in range(shards):
        starts = [math.floor(len(vector) * shard / shards) for vector in vectors]
        ends = [math.floor(len(vector) * (shard + 1) / shards) for vector in vectors]
        pieces = [vector[start:end] for vector, start, end in zip(vectors, starts, ends, strict=True)]
        total_LK += sketch.sketch(pieces, starts)
    return float((total_LK - whole_LK).abs().max() / whole_LK.abs().max())


def _pairs(vectors_ND: Tensor, norm: float) -> np.ndarray:
    """[Q] float64: the distance of every pair, in the order of `np.triu_indices`."""
    distances: np.ndarray = torch.pdist(vectors_ND.double(), p=norm).numpy()
    return distances


def _nearest(pairs_Q: np.ndarray, tasks: int) -> np.ndarray:
    """[..., N]: each task's nearest other task, from distances of pairs [..., Q]."""
    square = np.full((*pairs_Q.shape[:-1], tasks, tasks), np.inf)
    i, j = np.triu_indices(tasks, 1)
    square[..., i, j] = square[..., j, i] = pairs_Q
    nearest: np.ndarray = square.argmin(axis=-1)
    return nearest
