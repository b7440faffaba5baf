"""What goes into a TaskMemory and what comes out: small frozen records, fit to cross a process border.

Shapes: L layers, K sketch numbers a layer, N arms (past tasks; under a budget, some of them merged).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from treelora.bandit import Bound, Noise, Search
from treelora.errors import ConfigError, TreeLoRAError
from treelora.tree import SignatureTree, TreeKind

Groups = tuple[tuple[int, ...], ...]
"""For each arm the past tasks that it stands for, ascending."""


class ProtocolError(TreeLoRAError):
    """A call out of order: the message says which call was expected."""


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of a TaskMemory. Raises: ConfigError for values that can't work.

    exploration: c of the LCB. noise, bound: see TreeBandit. blocks: layer blocks of the medoid tree. max_arms: beyond
    it the two closest arms are merged (None: never).
    rebuild_limit: while N is at most this, the tree is rebuilt from scratch at each task's end (the best
    tree); beyond it the new task is inserted, since a rebuild costs O(N^3) time and O(L N^2) memory.
    """

    layers: int
    sketch_size: int
    tree: TreeKind = "medoid"
    search: Search = "tree_lcb"
    blocks: int = 1
    exploration: float = 0.25
    bound: Bound = "smooth"
    noise: Noise = "diameter"
    max_arms: int | None = None
    rebuild_limit: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("tree", TreeKind), ("search", Search), ("bound", Bound), ("noise", Noise)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(get_args(choices))}")
        if self.layers < 1 or self.sketch_size < 1 or self.rebuild_limit < 1:
            raise ConfigError(
                f"layers = {self.layers}, sketch_size = {self.sketch_size}, rebuild_limit = "
                f"{self.rebuild_limit}: each must be at least 1"
            )
        if self.max_arms is not None and self.max_arms < 1:
            raise ConfigError(f"max_arms = {self.max_arms}: must be at least 1; raise the budget")
        if not 1 <= self.blocks <= self.layers or (self.blocks > 1 and self.tree != "medoid"):
            raise ConfigError(f"blocks = {self.blocks}: must lie in 1..{self.layers} (layers); 1 unless tree is medoid")
        if not (np.isfinite(self.exploration) and self.exploration >= 0) or not 0 <= self.seed < 2**64:
            raise ConfigError(f"exploration = {self.exploration}, seed = {self.seed}: need c >= 0, seed in [0, 2**64)")


@dataclass(frozen=True, eq=False)
class StepCall:
    """Ask for the arms of `step` (from 1) and report what the step before it saw.

    observation: residuals [L] of step - 1 at the arms of step - 1 (search "full": [N, L], of all arms);
    None at step 1, with no past task, and where step - 1 gave no gradient (skipped after an overflow).
    """

    run: str
    task: str
    step: int
    observation: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Past:
    """What a task is compared with. sketches: [N, L, K] float32. groups: the tasks behind each arm. tree: over arms."""

    sketches: np.ndarray
    groups: Groups
    tree: SignatureTree | None = None


@dataclass(frozen=True, eq=False)
class Selection:
    """arms: [L] int64, an arm a layer (-1: none yet). lcb: [L] float32, -inf where untried."""

    task: str
    step: int
    arms: np.ndarray
    lcb: np.ndarray
