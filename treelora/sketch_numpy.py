"""What of sketches tree and bandit need, without torch: the tree actor starts in a third of the time and memory.

Shapes: L layers, K sketch numbers a layer, N past tasks. The rest is in `treelora.sketch`.
"""

from __future__ import annotations

import math

import numpy as np

from treelora.errors import ConfigError

# One purpose, one stream: a seed that is shared by sketch, probe and random search must not correlate them.
PURPOSE_SKETCH, PURPOSE_PROBE, PURPOSE_ARMS, PURPOSE_OFFICIAL = 1, 2, 3, 4


def keyed_bits(seed: int, stream: int, count: int, *, purpose: int, block: int = 0) -> np.ndarray:
    """uint64 [count] of a counter-based generator (Philox 4x64), a pure function of its arguments.

    NumPy keeps Philox's raw stream fixed between versions and machines (NEP 19), which it doesn't promise for
    the distributions on top of it; so only raw bits are used. `stream` is a layer or a task, `block` a step.
    """
    if not (0 <= seed < 2**64 and 0 <= stream < 2**64):
        raise ConfigError(f"seed={seed}, stream={stream}: both must lie in [0, 2**64); choose another seed")
    counter = np.array([0, 0, block, purpose], dtype=np.uint64)
    key = np.array([seed, stream], dtype=np.uint64)
    return np.asarray(np.random.Philox(counter=counter, key=key).random_raw(count), dtype=np.uint64)


def layer_distances(sketch_LK: np.ndarray, signatures_NLK: np.ndarray) -> np.ndarray:
    """[N, L] float64: `residual` to every task, in numpy, as tree and memory use it."""
    signatures_NLK, sketch_LK = (np.asarray(array, dtype=np.float32) for array in (signatures_NLK, sketch_LK))
    tasks, layers, size = signatures_NLK.shape
    # by blocks, which stay in the processor's cache: at 10,000 tasks three more arrays as large as all sketches didn't.
    # numpy adds up in buffers of 8192 numbers: where blocks end with one, the sums have the same bits as without blocks
    step = 8192 // math.gcd(8192, layers * size)
    step *= max(1, 2**18 // (step * layers * size))
    total_NL = np.empty((tasks, layers))
    for first in range(0, tasks, step):
        difference = signatures_NLK[first : first + step] - sketch_LK
        np.abs(difference, out=difference).sum(axis=-1, dtype=np.float64, out=total_NL[first : first + step])
    total_NL /= math.sqrt(size)
    return total_NL
