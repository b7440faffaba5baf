"""Does the tree find families that it wasn't told? Synthetic tasks with known truth, and controls without any.

Shapes: N tasks, L layers, K sketch numbers a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from treelora.errors import ConfigError
from treelora.simulation.families import FamilyDesign, FamilyTasks, draw_families
from treelora.sketch import layer_distances
from treelora.tree import SignatureTree, TreeKind
from treelora.tree_scores import cut_rand_index, dendrogram_purity, permutation_p_value

Scenario = Literal["families", "shuffled labels", "identical tasks", "pure noise"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
INSERT_ONLY = "insert only"
TREES = (*get_args(TreeKind), INSERT_ONLY)
LABELINGS = ("family", "superfamily", "vocabulary")


@dataclass(frozen=True)
class RecoveryScore:
    """One tree after `tasks` insertions against one labeling. NaN: not defined (all labels equal, or all distinct).

    rand_index: adjusted Rand index of the tree cut into as many clusters as there are labels. purity: dendrogram
    purity. p_value: of the purity, against families dealt out at random.
    """

    scenario: str
    run: int
    tree: str
    tasks: int
    labeling: str
    vocabulary_length: float
    rand_index: float
    purity: float
    p_value: float


def scenario_tasks(scenario: Scenario, design: FamilyDesign, seed: int) -> FamilyTasks:
    """families: as designed. shuffled labels: the same gradients, labels dealt out at random. identical tasks: every
    gradient is the common one, to the bit. pure noise: nothing but each task's own direction and noise."""
    if scenario not in SCENARIOS:
        raise ConfigError(f"scenario = {scenario!r}: choose one of {', '.join(SCENARIOS)}")
    if scenario in ("identical tasks", "pure noise"):
        design = replace(design, superfamily=0.0, family=0.0, vocabulary=0.0)
    if scenario == "identical tasks":
        design = replace(design, common=design.common or 1.0, own=0.0, noise=0.0)
    elif scenario == "pure noise":
        design = replace(design, common=0.0, own=design.own or 1.0)
    tasks = draw_families(design, seed)
    if scenario == "shuffled labels":
        order = np.random.default_rng([seed, 1]).permutation(design.tasks)
        tasks = replace(tasks, labels={name: [labels[i] for i in order] for name, labels in tasks.labels.items()})
    return tasks


def score_stream(
    scenario: Scenario, design: FamilyDesign, run: int, *, seed: int = 0, permutations: int = 99
) -> list[RecoveryScore]:
    """Every kind of tree after every insertion, rebuilt each time; and the tree that only ever inserts."""
    stream = scenario_tasks(scenario, design, _seed(seed, run))
    scores: list[RecoveryScore] = []
    grown = SignatureTree.build(stream.signatures[:1])
    for tasks in range(2, len(stream.signatures) + 1):
        seen = stream.signatures[:tasks]
        grown = grown.insert(seen)
        trees = {kind: SignatureTree.build(seen, kind) for kind in get_args(TreeKind)} | {INSERT_ONLY: grown}
        for name, tree in trees.items():
            for labeling in LABELINGS:
                labels = stream.labels[labeling][:tasks]
                values = _score(tree, labels, permutations if labeling == "family" else 0, run)
                scores.append(RecoveryScore(scenario, run, name, tasks, labeling, design.vocabulary, *values))
    return scores


def score_vocabulary(design: FamilyDesign, lengths: Sequence[float], run: int, *, seed: int = 0) -> list[RecoveryScore]:
    """The trees over all tasks, for answer vocabularies that weigh as much as `lengths` in the gradient."""
    scores: list[RecoveryScore] = []
    for length in lengths:
        stream = draw_families(replace(design, vocabulary=length), _seed(seed, run))
        for kind in get_args(TreeKind):
            tree = SignatureTree.build(stream.signatures, kind)
            for labeling in LABELINGS:
                values = _score(tree, stream.labels[labeling], 0, run)
                scores.append(RecoveryScore("vocabulary", run, kind, tree.tasks, labeling, length, *values))
    return scores


@dataclass(frozen=True)
class Looseness:
    """How much larger a node's delta is than it need be: median over layers of delta over the spread of residuals."""

    run: int
    tasks_below: int
    root: bool
    ratio: float


def delta_looseness(design: FamilyDesign, run: int, *, seed: int = 0) -> list[Looseness]:
    """Every branch of the medoid tree over all tasks but the last, which is the one compared with them.

    delta, a diameter, bounds the differences of residuals whatever the new task is; for a given one they are smaller.
    """
    signatures = draw_families(design, _seed(seed, run)).signatures
    tree, residual_NL = SignatureTree.build(signatures[:-1]), layer_distances(signatures[-1], signatures[:-1])
    found = []
    for node in np.flatnonzero(tree.left >= 0):
        spread_L = np.ptp(residual_NL[tree.tasks_below(int(node))], axis=0)
        if spread_L.all():
            ratio = float(np.median(tree.delta[node] / spread_L))
            found.append(Looseness(run, int(tree.size[node]), bool(node == 0), ratio))
    return found


def _score(tree: SignatureTree, labels: list[int], permutations: int, seed: int) -> tuple[float, float, float]:
    """Adjusted Rand index, purity, p; NaN where labels are all equal or all distinct, for any tree is right then."""
    if not 1 < len(set(labels)) < len(labels):
        return float("nan"), float("nan"), float("nan")
    p_value = float("nan")
    if permutations:
        p_value = permutation_p_value(tree, labels, permutations=permutations, seed=seed)
    return cut_rand_index(tree, labels), dendrogram_purity(tree, labels), p_value


def _seed(seed: int, run: int) -> int:
    if not (0 <= seed < 2**32 and 0 <= run < 2**31):
        raise ConfigError(f"seed = {seed}, run = {run}: need 0 <= seed < 2**32 and 0 <= run < 2**31")
    return seed * 2**31 + run
