"""What a comparison found, in plain sentences, and no more than its numbers carry.

A difference is called beyond chance only if its p is at most 0.05 after Holm's correction over all groups that were
held against the reference in that score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treelora_platform.experiments.analysis import ALL_MODES, Difference, ExperimentComparison, Standing
from treelora_platform.experiments.tables import LEVEL_P, show_p
from treelora_platform.statistics import holm, smallest_p

NAMED = 3  # groups that a sentence names
NO_BREAK = "\u00a0"
HOW_TO_READ = (
    f"Brackets: 95 % t intervals of paired differences. p: sign-flip test, corrected by Holm; beyond chance: {LEVEL_P} "
    "or less."
)
_WORDS = {"op": "OP", "bwt": "BWT", "seconds": "training time"}
_UNITS = {"op": "points", "bwt": "points", "seconds": "s"}


@dataclass(frozen=True)
class Finding:
    """What is seen, and what the tests say of it."""

    lead: str
    tested: tuple[str, ...]


def findings(comparison: ExperimentComparison, modes: Sequence[str]) -> list[Finding]:
    """One a way of inference: OP in all, BWT and training time in the first only, lest the page begin with a wall."""
    found: list[Finding] = []
    for mode in modes:
        if lead := _ranking(comparison, mode):
            scores = [(mode, "op")] if found else [(mode, "op"), (mode, "bwt"), (ALL_MODES, "seconds")]
            found.append(Finding(lead, tuple(_tests(comparison, scores))))
    return found


def beyond_chance(one: Difference) -> bool:
    """Whether it may be said that the groups differ."""
    return one.corrected_p <= LEVEL_P


def _ranking(comparison: ExperimentComparison, mode: str) -> str:
    standings = [one for one in comparison.standings if one.mode == mode and one.op is not None]
    if not standings:
        return ""
    competing = sorted((one for one in standings if not one.bound), key=lambda one: -_op(one))
    if not competing:
        return f"Inference {mode}: all groups are bounds, which learn all tasks at once or none."
    best = competing[0]
    mean = f"{_op(best):.1f} % over {best.runs} run{'' if best.runs == 1 else 's'}"
    if len(competing) == 1:
        return f"Inference {mode}: {best.group} has a mean OP of {mean}, and no other group competes with it."
    level = [one.group for one in competing if f"{_op(one):.1f}" == f"{_op(best):.1f}"]
    if len(level) > 1:
        return f"Inference {mode}: {' and '.join(level[:NAMED])} have the same highest mean OP, {_op(best):.1f} %."
    behind = ", ".join(f"{one.group} {_op(one):.1f} %" for one in competing[1 : NAMED + 1])
    more = f" and {len(competing) - NAMED - 1} more" if len(competing) > NAMED + 1 else ""
    return f"Inference {mode}: {best.group} has the highest mean OP, {mean}; then {behind}{more}."


def _op(one: Standing) -> float:
    return one.op.value if one.op is not None else -math.inf


def _tests(comparison: ExperimentComparison, scores: Sequence[tuple[str, str]]) -> list[str]:
    """What differs from the reference in these scores, what does not, and what so few pairs can't tell."""
    sentences = []
    untold: dict[str, list[Difference]] = {}
    for mode, metric in scores:
        family = [one for one in comparison.differences if (one.mode, one.metric) == (mode, metric)]
        what = f"{_WORDS[metric]} against {comparison.reference}"
        shown = [one for one in family if beyond_chance(one)]
        able = [one for one in family if not beyond_chance(one) and _could(family, one)]
        unable = [one for one in family if one not in shown and one not in able]
        if shown:
            sentences.append(f"Beyond chance in {what}: {_listed(shown)}.")
        if able:
            sentences.append(f"Not beyond chance in {what}: {_listed(able)}. That does not show that they are alike.")
        if unable:
            untold[_WORDS[metric]] = unable
    return [*sentences, _untold(untold)] if untold else sentences


def _untold(found: Mapping[str, Sequence[Difference]]) -> str:
    """One sentence for all scores in which there are too few pairs."""
    counts = [one.found.pairs for unable in found.values() for one in unable]
    pairs = f"{max(counts)} pair{'' if max(counts) == 1 else 's'}"
    if min(counts) < max(counts):
        pairs = f"{min(counts)} to {pairs}"
    family = max(one.family for unable in found.values() for one in unable)
    enough = next(n for n in range(1, 99) if family * smallest_p(n) <= LEVEL_P)
    what, unable = next(iter(found.items()))
    return (
        f"Too few pairs of runs to tell in {', '.join(found)}: with {pairs} no difference, however large, is beyond "
        f"chance here; with {enough} it could be. Seen so far in {what}: {_listed(unable, p=False)}."
    )


def _could(family: Sequence[Difference], one: Difference) -> bool:
    """Whether so many pairs can show anything, the other groups being what they are."""
    least = [other.found.smallest_p if other is one else other.found.p for other in family]
    return holm(least)[family.index(one)] <= LEVEL_P


def _listed(found: Sequence[Difference], *, p: bool = True) -> str:
    largest = sorted(found, key=lambda one: -abs(one.found.t.value))
    more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return "; ".join(_one(one, p) for one in largest[:NAMED]) + more


def _one(one: Difference, p: bool) -> str:
    digits = 0 if one.metric == "seconds" and abs(one.found.t.value) >= 10 else 1
    ends = one.found.t
    interval = "" if math.isnan(ends.low) else f" [{ends.low:z.{digits}f}, {ends.high:z.{digits}f}]"
    text = f"{ends.value:+z.{digits}f}{NO_BREAK}{_UNITS[one.metric]}{interval}".replace("-", "−")
    least = show_p(one.corrected_p)
    chance = f", p{NO_BREAK}{least if least.startswith('<') else f'={NO_BREAK}{least}'}" if p else ""
    return f"{one.group} {text}{chance}"
