"""TreeLoRA as its released code (GitHub ZinYY/TreeLoRA) computes it: search, tree and penalty `official`.

Kept so that people can compare; it is not what the paper describes. `docs/released-code.md` derives the formulas,
names the files and functions they were read in, and says where they leave the paper.

Notation: L adapted modules (layers), N past tasks (arms), D numbers of a layer's LoRA A, R calls of an epoch (one a
micro-batch), i = 0 .. R-1 the call, a_i [L, D] the values of A at call i, c_k what task k left behind.

    accumulator   c <- c + L a_i / R, as L additions; it starts at 0 in every epoch, and the last epoch's is kept
    scores        s_kl = mean distance seen of (k, l), 0 where none + sqrt(log(2 R (i+1) (i+2)) / (2 n_kl + e))
                  s_kl <- s_kl + min over all k, l of s
    tree          a first arm f is drawn from softmax_k(sum_l s_kl); if the root is split and v is its child with f:
                  s_kl <- s_kl min(median_v, 3/2) for the tasks k under v; no factor where v is a leaf
    arms          P(arm of l is k) = softmax_k(s_kl / (max s - min s + e))
    observation   n_kl grows by 1, the distances seen by |c_l - c_kl|_1, with c as it is by then, a part of a sum
    penalty       Q = sum_l <a_l, c_(k_l)l>,  w_i = w i / R;   loss <- loss - w_i stop(loss) Q / (stop(Q) - e)

with e = 1e-5 (EPSILON). All shapes carry N, L, D in that order; a call takes its random numbers as an argument.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from treelora.errors import CheckpointError, ConfigError, DataError
from treelora.official_tree import OfficialTree

EPSILON = 1e-5


def within_depth(layers: Sequence[str], depth: int) -> list[str]:
    """The modules that the released option `lora_depth` adapts: the first `depth` in model order; all if not above 0.

    It counts modules (q of block 0, v of block 0, q of block 1, ...), not blocks, and is no depth of the tree.
    """
    return list(layers[:depth] if depth > 0 else layers)


def epoch_place(step: int, steps: int, epochs: int) -> tuple[int, int]:
    """Call i (from 0) and number of calls R of the epoch that a step (from 1) lies in.

    `steps` are dealt to `epochs` evenly, so that no epoch is cut short. Raises: ConfigError if an epoch were empty.
    """
    if not 1 <= epochs <= steps:
        raise ConfigError(f"epochs = {epochs} of {steps} steps: need from 1 to {steps}")
    epoch = (step - 1) * epochs // steps
    first, end = -(-epoch * steps // epochs), -(-(epoch + 1) * steps // epochs)
    return step - 1 - first, end - first


def ramp(strength: float, call: int, calls: int) -> float:
    """w_i = strength i / R: 0 at an epoch's first call, strength (R - 1) / R at its last."""
    return strength * call / calls


def official_penalty(
    values: Sequence[Tensor], anchors: Sequence[Tensor], loss: float | Tensor, weight: float
) -> tuple[Tensor, list[Tensor]]:
    """What is added to the loss, and its gradient with respect to each layer's A.

    The gradient is -weight loss c_(k_l) / (Q - e), that is -weight loss grad log|Q| but for e: it grows |Q|, whatever
    Q's sign. The value is -weight loss Q / (Q - e), so nearly constant. Infinite or NaN where Q = e, as released.

    Args:
        values: Current A of each layer, any shapes.
        anchors: c_(k_l) of each layer's arm, as many numbers as A has.
        loss: Of the same batch, without penalty.
        weight: w_i of `ramp`.
    """
    anchors = [anchor.reshape(value.shape) for value, anchor in zip(values, anchors, strict=True)]
    overlap = torch.stack([(a.detach() * c).sum() for a, c in zip(values, anchors, strict=True)]).sum()
    rate = -weight * torch.as_tensor(loss, device=overlap.device).detach() / (overlap - EPSILON)
    return rate * overlap, [rate * anchor for anchor in anchors]


class Accumulator:
    """c of the running epoch. In bfloat16 it stalls at 256 to 512 times the first addend, as released."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype, self.calls = dtype, 1
        self.sum_LD: Tensor | None = None

    def begin_epoch(self, calls: int) -> None:
        """Forget the sum; `calls` is R."""
        self.calls, self.sum_LD = calls, None

    def add(self, values_LD: Tensor) -> Tensor:
        """Take a call's values of A; returns c, which the next call changes. After an epoch: L times their mean."""
        values_LD = values_LD.detach().to(self.dtype)
        additions = len(values_LD)
        if self.sum_LD is None:
            self.sum_LD = values_LD / self.calls
            additions -= 1
        share_LD = values_LD * (1 / self.calls)
        for _ in range(additions):  # one product would be cheaper, and wouldn't stall
            self.sum_LD += share_LD
        return self.sum_LD

    def state_dict(self) -> dict[str, np.ndarray]:
        """To go on within an epoch: `calls` [], and `sum` float32 [L, D] (exact for bfloat16) if there is one."""
        state = {"calls": np.array(self.calls)}
        return state if self.sum_LD is None else state | {"sum": self.sum_LD.float().cpu().numpy().copy()}

    def load_state_dict(self, state: Mapping[str, np.ndarray], device: torch.device | None = None) -> None:
        """Continue from `state_dict`. Raises: CheckpointError where it is none."""
        if "calls" not in state or ("sum" in state and state["sum"].ndim != 2):
            raise CheckpointError(f"accumulator state {_shapes(state)}: need calls, and sum as [layers, values]")
        self.calls = int(state["calls"])
        kept = state.get("sum")
        self.sum_LD = None if kept is None else torch.tensor(kept, dtype=self.dtype, device=device)


def stack_values(values: Sequence[Tensor]) -> Tensor:
    """a [L, D] of the layers' A. Raises: ConfigError where they differ in size: the released code can't stack them."""
    sizes = {value.numel() for value in values}
    if len(sizes) != 1:
        raise ConfigError(
            f"lora.target_modules: A has {sorted(sizes)} numbers in different layers; 'official' needs modules with "
            "equally many inputs, such as q_proj and v_proj"
        )
    return torch.stack([value.detach().reshape(-1) for value in values])


class OfficialSearch:
    """The arms of an epoch's calls: at each call `select`, then `observe`, once each.

    Arithmetic is float64 where the released code has float32; distances are in the dtype of `past_NLD`.
    """

    def __init__(self, past_NLD: Tensor, tree: OfficialTree, calls: int):
        if len(tree.members[0]) != len(past_NLD):
            raise DataError(f"the tree holds {len(tree.members[0])} tasks, the past {len(past_NLD)}: build it again")
        self.past_NLD, self.tree = past_NLD, tree
        self.begin_epoch(calls)

    def begin_epoch(self, calls: int) -> None:
        """Forget all counts and distances; `calls` is R. Raises: ConfigError for R below 1."""
        if calls < 1:
            raise ConfigError(f"an epoch of {calls} calls: need at least 1")
        self.calls, self.call = calls, 0
        self.counts_NL = np.zeros(self.past_NLD.shape[:2], dtype=np.int64)
        self.sums_NL = np.zeros(self.past_NLD.shape[:2])

    def scores(self) -> np.ndarray:
        """s [N, L] before the tree's factor: high for tasks that are far or were seldom drawn."""
        mean_NL = self.sums_NL / np.maximum(self.counts_NL, 1)
        log_calls = math.log(2 * self.calls * (self.call + 1) * (self.call + 2))
        scores_NL = mean_NL + np.sqrt(log_calls / (2 * self.counts_NL + EPSILON))
        return scores_NL + scores_NL.min()

    def first_probabilities(self) -> np.ndarray:
        """[N]: with what probability each task is the first arm."""
        return _softmax(self.scores().sum(axis=1))

    def probabilities(self, first: int) -> np.ndarray:
        """[N, L]: with what probability each task is a layer's arm, given the first arm.

        Within a layer no two differ by more than the factor exp(1).
        """
        scores_NL = self.scores()
        boosted, factor = self.tree.boost(first)
        scores_NL[boosted] *= factor
        return _softmax(scores_NL / (np.ptp(scores_NL) + EPSILON))

    def select(self, draws: np.ndarray) -> np.ndarray:
        """Arms int64 [L], from uniform numbers in [0, 1): `draws[0]` is the first arm's, the other L the layers'.

        Changes nothing. An arm is the first k whose cumulative probability exceeds its number.
        Raises: DataError for a wrong shape or a number outside [0, 1).
        """
        draws = np.asarray(draws, dtype=np.float64)
        if draws.shape != (self.past_NLD.shape[1] + 1,) or not ((draws >= 0) & (draws < 1)).all():
            raise DataError(f"draws {draws.shape}: need {self.past_NLD.shape[1] + 1} numbers in [0, 1)")
        first = int(_invert(self.first_probabilities()[:, None], draws[:1])[0])
        return _invert(self.probabilities(first), draws[1:])

    def observe(self, arms_L: np.ndarray, accumulated_LD: Tensor) -> np.ndarray:
        """Record the distances from c, this call's values included, to the arms'; returns them, [L]. The call is over.

        Raises: DataError for a distance that is NaN or infinite.
        """
        layers = np.arange(self.past_NLD.shape[1])
        arm_LD = self.past_NLD[torch.from_numpy(arms_L), torch.from_numpy(layers)]
        distances_L = (accumulated_LD.to(arm_LD) - arm_LD).abs().sum(dim=-1).double().cpu().numpy()
        if not np.isfinite(distances_L).all():
            raise DataError("values of LoRA A aren't finite: lower train.learning_rate")
        self.counts_NL[arms_L, layers] += 1
        self.sums_NL[arms_L, layers] += distances_L
        self.call += 1
        return distances_L

    def state_dict(self) -> dict[str, np.ndarray]:
        """What changes within an epoch; the past and the tree are the caller's to keep."""
        numbers = {"call": np.array(self.call), "calls": np.array(self.calls)}
        return {"counts": self.counts_NL.copy(), "sums": self.sums_NL.copy(), **numbers}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue bit for bit from `state_dict`. Raises: CheckpointError where it doesn't fit."""
        shapes = {"counts": self.counts_NL.shape, "sums": self.sums_NL.shape, "call": (), "calls": ()}
        if _shapes(state) != {name: tuple(shape) for name, shape in shapes.items()}:
            raise CheckpointError(f"official search state {_shapes(state)}: need {shapes}")
        if not (state["counts"] >= 0).all() or not np.isfinite(state["sums"]).all():
            raise CheckpointError("official search state: counts must not be negative, sums must be finite")
        self.counts_NL, self.sums_NL = state["counts"].astype(np.int64), state["sums"].astype(np.float64)
        self.call, self.calls = int(state["call"]), int(state["calls"])


def _softmax(x: np.ndarray) -> np.ndarray:
    """Over axis 0."""
    power = np.exp(x - x.max(axis=0))
    return power / power.sum(axis=0)


def _invert(probabilities_NL: np.ndarray, draws_L: np.ndarray) -> np.ndarray:
    above_NL = probabilities_NL.cumsum(axis=0)[:-1] <= draws_L  # the last one's sum may round to below 1
    return above_NL.sum(axis=0).astype(np.int64)


def _shapes(state: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(value) for name, value in state.items()}
