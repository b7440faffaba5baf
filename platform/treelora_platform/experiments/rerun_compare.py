"""Two folders of one experiment, number by number: scores, losses, arms and trees, to the last digit."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_platform.run_tables import TreeSnapshot, read_scores, read_steps, read_trees


@dataclass(frozen=True)
class Equality:
    """What was compared, and what isn't equal."""

    compared: Mapping[str, int]
    """How many scores, losses, trees ... both runs have."""
    differences: tuple[str, ...]
    notes: tuple[str, ...]
    """What couldn't be compared."""


def compare_runs(original: Path, again: Path) -> Equality:
    """Hold a run against one that should equal it.

    Args:
        original: A run's folder, or what MLflow has of it. It may have ended earlier than the other.
        again: The folder of the run that was made again.

    Raises:
        DataError: a table is damaged.
    """
    differences: list[str] = []
    notes: list[str] = []
    compared: dict[str, int] = {}
    for what, one, other, describe in (
        ("scores", _scores(original), _scores(again), _score_difference),
        ("losses", _losses(original), _losses(again), _loss_difference),
        ("arms", _arms(original), _arms(again), _arm_difference),
        ("trees", _trees(original), _trees(again), _tree_difference),
    ):
        common = {key: (value, other[key]) for key, value in one.items() if key in other}
        compared[what] = len(common)
        if lost := len(one) - len(common):
            differences.append(f"{what}: {lost} of {len(one)} are missing now")
        if more := len(other) - len(common):
            notes.append(f"{what}: {more} more now, which the run had not or MLflow has not")
        unequal = {key: pair for key, pair in common.items() if not _equal(*pair)}
        if unequal:
            differences.append(f"{what}: {len(unequal)} of {len(common)} differ, {describe(unequal)}")
    return Equality(compared, tuple(differences), tuple(notes))


def _equal(one: Any, other: Any) -> bool:
    return one == other or (one != one and other != other)  # NaN is what it was


Pairs = Mapping[Any, tuple[Any, Any]]


def _scores(run_dir: Path) -> dict[Hashable, Any]:
    return {(r["mode"], r["task"], r["after_task"] or ""): r["score"] for r in read_scores(run_dir).to_pylist()}


def _losses(run_dir: Path) -> dict[Hashable, Any]:
    return {row["global_step"]: row["loss"] for row in read_steps(run_dir, columns=["loss"]).to_pylist()}


def _arms(run_dir: Path) -> dict[Hashable, Any]:
    rows = read_steps(run_dir, columns=["arms"]).to_pylist()
    return {row["global_step"]: row["arms"] for row in rows if row["arms"] is not None}


def _trees(run_dir: Path) -> dict[Hashable, Any]:
    return {tree.after_index: tree for tree in read_trees(run_dir)}


def _gap(pair: tuple[float, float]) -> float:
    gap = abs(pair[0] - pair[1])
    return gap if math.isfinite(gap) else math.inf


def _score_difference(unequal: Pairs) -> str:
    key, pair = max(unequal.items(), key=lambda item: _gap(item[1]))
    mode, task, after = key
    when = f"after {after}" if after else "before training"
    return f"at most by {_gap(pair):.4g} points ({mode}, {task} {when}: {pair[0]:.6g} -> {pair[1]:.6g})"


def _loss_difference(unequal: Pairs) -> str:
    step, pair = max(unequal.items(), key=lambda item: _gap(item[1]))
    return f"at most by {_gap(pair):.3g} (step {step}), the first at step {min(unequal)}"


def _arm_difference(unequal: Pairs) -> str:
    return f"the first at step {min(unequal)}"


def _tree_difference(unequal: Pairs) -> str:
    after = min(unequal)
    one, other = unequal[after]
    return f"the first after {one.names[-1]}: {_tree_gap(one, other)}"


def _tree_gap(one: TreeSnapshot, other: TreeSnapshot) -> str:
    shape = [(tree.names, tree.left, tree.right, tree.task) for tree in (one, other)]
    if shape[0] != shape[1]:
        return "another shape"
    gap = max(abs(a - b) for a, b in zip(one.delta, other.delta, strict=True))
    return f"the same shape, diameters differ at most by {gap:.3g}"
