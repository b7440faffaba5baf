"""CountSketch of per-layer gradient vectors, and the one distance that tree and bandit share.

Shapes: L layers, D_l numbers of layer l (out_l * r), K sketch numbers a layer, N past tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from treelora.errors import ConfigError, DataError
from treelora.sketch_numpy import (
    PURPOSE_ARMS,
    PURPOSE_OFFICIAL,
    PURPOSE_PROBE,
    PURPOSE_SKETCH,
    keyed_bits,
    layer_distances,
)

__all__ = [
    "PURPOSE_ARMS",
    "PURPOSE_OFFICIAL",
    "PURPOSE_PROBE",
    "PURPOSE_SKETCH",
    "CountSketch",
    "keyed_bits",
    "layer_distances",
    "normalise",
    "residual",
]


class CountSketch:
    """Linear sketch of each layer's flat vector to `size` numbers (Charikar et al. 2002), float32.

    Each coordinate gets a random sign and a bucket; a bucket holds the signed sum of its coordinates, so
    inner products and squared L2 distances are kept in expectation, with relative error about sqrt(2 / size).
    The buckets are balanced: a keyed permutation lays the coordinates out in ceil(D / size) rows of `size`,
    and the rows are added up. That is a scatter to distinct places and a plain sum, which is deterministic on
    a GPU as well, where scattered addition is not. Where size >= D the sketch is an isometry.

    Every rank and every later session with the same (layer_dims, size, seed) builds the same sketch. Memory
    is O(D): 5 bytes a coordinate, made on first use for each layer and device.

    Raises: ConfigError for a size or dimension below 1 or a seed outside [0, 2**64).
    """

    def __init__(self, layer_dims: Sequence[int], size: int, seed: int) -> None:
        if size < 1:
            raise ConfigError(f"sketch size = {size}: must be at least 1; 256 to 512 serve well")
        if not layer_dims or min(layer_dims) < 1:
            raise ConfigError(f"layer_dims = {list(layer_dims)}: every layer needs at least one number")
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed = {seed}: must lie in [0, 2**64)")
        self.layer_dims = tuple(int(dim) for dim in layer_dims)
        self.size = int(size)
        self.seed = int(seed)
        self._tables: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def sketch(self, vectors: Sequence[Tensor], offset: int | Sequence[int] = 0) -> Tensor:
        """Sketch one vector a layer: [L, K] float32 on the vectors' device.

        A shard passes its slice of each layer's flat vector and where the slice starts (`offset`: one number,
        or one a layer); the sketches of all shards add up to the sketch of the whole. An empty slice gives 0.

        Raises: DataError for a wrong number of vectors or a slice that leaves its layer.
        """
        layers = len(self.layer_dims)
        if len(vectors) != layers:
            raise DataError(f"{len(vectors)} vectors for {layers} layers: pass one vector a layer")
        offsets = [offset] * layers if isinstance(offset, int) else list(offset)
        if len(offsets) != layers:
            raise DataError(f"{len(offsets)} offsets for {layers} layers: pass one offset a layer, or one number")
        rows = [self._layer(layer, vectors[layer], offsets[layer]) for layer in range(layers)]
        return torch.stack(rows)

    def _layer(self, layer: int, vector: Tensor, start: int) -> Tensor:
        flat_D = vector.detach().reshape(-1).to(torch.float32)
        dim, stop = self.layer_dims[layer], start + flat_D.numel()
        if start < 0 or stop > dim:
            raise DataError(f"layer {layer}: slice [{start}, {stop}) leaves the layer's {dim} numbers")
        place_D, sign_D = self._table(layer, flat_D.device)
        rows = math.ceil(dim / self.size)
        laid_out = flat_D.new_zeros(rows * self.size)
        laid_out[place_D[start:stop].long()] = flat_D * sign_D[start:stop]
        return laid_out.view(rows, self.size).sum(0)

    def _table(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (layer, str(device))
        if key not in self._tables:
            dim = self.layer_dims[layer]
            bits = keyed_bits(self.seed, layer, 2 * dim, purpose=PURPOSE_SKETCH)
            # Ranks of random numbers are a random permutation; a stable sort settles the (rare) equal ones.
            place = np.empty(dim, dtype=np.int32)
            place[np.argsort(bits[:dim], kind="stable")] = np.arange(dim, dtype=np.int32)
            sign = ((bits[dim:] >> np.uint64(63)).astype(np.int8) * 2 - 1).astype(np.int8)
            self._tables[key] = (torch.from_numpy(place).to(device), torch.from_numpy(sign).to(device))
        return self._tables[key]


def normalise(sketch_LK: Tensor) -> Tensor:
    """Scale each layer's sketch to unit L2 norm, float32; a zero row stays zero.

    Only the direction says which task it is: norms differ by layer by orders of magnitude and shrink as
    training goes on. Raises: DataError naming the layer that holds NaN or infinity.
    """
    sketch_LK = sketch_LK.detach().to(torch.float32)
    bad_L = ~torch.isfinite(sketch_LK).all(dim=1)
    if bool(bad_L.any()):
        layer = int(bad_L.nonzero()[0, 0])
        raise DataError(f"layer {layer}: the sketch holds NaN or infinity; drop the step whose loss overflowed")
    # Dividing by the largest entry first keeps the squares of tiny and of huge gradients representable.
    peak_L1 = sketch_LK.abs().amax(dim=1, keepdim=True)
    scaled_LK = sketch_LK / torch.where(peak_L1 > 0, peak_L1, 1.0)
    norm_L1 = scaled_LK.norm(dim=1, keepdim=True)
    return scaled_LK / torch.where(norm_L1 > 0, norm_L1, 1.0)


def residual(sketch_LK: Tensor, signatures_NLK: Tensor, arms_L: Tensor | None = None) -> Tensor:
    """xi = ||g - g_k||_1 / sqrt(K) for each layer: the bandit's loss (L1: section "What happens", step 2).

    With arms_L: [L], the residual to each layer's own arm. Without: [N, L], to every past task (search
    "full"). For vectors of unit L2 norm ||.||_1 <= sqrt(K) ||.||_2, so the residual lies in [0, 2] whatever K
    is. It is a
    metric: it obeys the triangle inequality that makes the tree's diameters true bounds.
    """
    if arms_L is not None:
        layers = torch.arange(sketch_LK.shape[0], device=signatures_NLK.device)
        signatures_NLK = signatures_NLK[arms_L.to(signatures_NLK.device), layers]
    difference = signatures_NLK.to(sketch_LK) - sketch_LK
    return difference.abs().sum(-1) / math.sqrt(sketch_LK.shape[-1])
