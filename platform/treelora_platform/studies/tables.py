"""A study's tables.

Every number is a mean over (order, seed); brackets hold a 95 % bootstrap interval unless a heading says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from treelora_platform.sheets import Cells, Sheet, in_blocks, show_ends, show_interval
from treelora_platform.statistics import smallest_p
from treelora_platform.studies.analysis import Ablated, Difference, Standing
from treelora_platform.studies.quality import Reach
from treelora_platform.studies.spec import Study
from treelora_platform.studies.tuning import Tuned
from treelora_platform.summary import NOT_MEASURED, format_bytes

BRACKETS = "mean over (order, seed), 95 % bootstrap interval in brackets"


def standings_sheet(study: Study, found: Sequence[Standing]) -> Sheet:
    """The main table, a group a way of inference."""

    def cells(one: Standing) -> Cells:
        name = f"{one.variant} *" if one.own else one.variant
        scores = [show_interval(value) for value in (one.op, one.bwt, one.fwt)]
        costs = [show_interval(one.seconds, 0), show_interval(one.passes_per_step, 2, ends=False)]
        stored = format_bytes(one.stored_bytes)
        return (name, one.mode, one.given, str(one.runs), *scores, *costs, f"{one.tokens:,.0f}", stored)

    return Sheet(
        "standings",
        f"{study.name}: all variants at equal steps",
        ("variant", "inference", "given", "runs", "OP (%)", "BWT (points)", "FWT (points)", "training (s)",
         "passes/step", "tokens", "stored"),
        in_blocks(found, lambda one: one.mode, cells),
        found,
        (
            BRACKETS,
            "OP, FWT: larger is better; BWT: what was forgotten, smaller is better, negative where old tasks gained",
            "*: the variant's own way of inference, which it was tuned by; compare within one way of inference",
            "given: `past rows` are seen again (all others are replay-free); `router`: adapters chosen by the router, "
            "the same for every method; `all rows at once` and `the task` are bounds, not competitors",
            "passes/step: forward passes a micro-batch, 1 for plain training; independent of what else the machine did",
        ),
        texts=3,
    )  # fmt: skip


def differences_sheet(study: Study, found: Sequence[Difference], champion: bool = False) -> Sheet:
    """Every variant against the reference; or against the champion, each in its own way of inference."""

    def cells(one: Difference) -> Cells:
        pair = one.found
        needed = NOT_MEASURED if pair.pairs_needed is None else f"{pair.pairs_needed:,}"
        return (
            one.variant, one.mode, one.metric.upper(), str(pair.pairs), show_interval(pair.bootstrap, sign=True),
            show_ends(pair.t), f"{pair.p:.3g}", f"{pair.smallest_p:.3g}", f"{one.corrected_p:.3g}", needed,
        )  # fmt: skip

    notes = [
        f"variant less {study.champion}, paired by (order, seed), each in its own way of inference"
        if champion
        else f"variant less {study.reference}, paired by (order, seed), in the same way of inference",
        "p: exact sign-flip test, two-sided; Holm: corrected over all variants of a group",
        "pairs needed: (2.8 sd / difference)^2 + 2, for 80 % power at 5 %, were this the true difference",
    ]
    for pairs, family in sorted({(one.found.pairs, one.family) for one in found}):
        least = smallest_p(pairs)
        enough = next(n for n in range(1, 99) if family * smallest_p(n) <= 0.05)
        notes.append(
            f"with n = {pairs} pairs the smallest attainable p is 2/2^{pairs} = {least:.3g}, after Holm over {family} "
            f"comparisons {min(1.0, family * least):.3g}; for one to get below 0.05 it takes {enough} pairs at least"
        )
    return Sheet(
        "champion" if champion else "differences",
        f"{study.name}: differences from {study.champion if champion else study.reference}",
        ("variant", "inference", "score", "pairs", "difference", "95 % t interval", "p", "least p", "p (Holm)",
         "pairs needed"),
        in_blocks(found, lambda one: ("" if champion else one.mode, one.metric), cells),
        found,
        tuple(notes),
        texts=3,
    )  # fmt: skip


def ablation_sheet(study: Study, found: Sequence[Ablated]) -> Sheet:
    """The components of the method, one after the other, a group a way of inference."""

    def cells(one: Ablated) -> Cells:
        change = show_interval(one.change.bootstrap if one.change else None, sign=True)
        p = f"{one.change.p:.3g}" if one.change else NOT_MEASURED
        scores = [show_interval(one.op), show_interval(one.bwt), show_interval(one.seconds, 0)]
        return (one.label, one.variant, one.mode, *scores, change, p)

    return Sheet(
        "ablation",
        f"{study.name}: ablation",
        ("components", "variant", "inference", "OP (%)", "BWT (points)", "training (s)", "OP less the first's", "p"),
        in_blocks(found, lambda one: one.mode, cells),
        found,
        (BRACKETS, "first row: of the same way of inference; p: exact sign-flip test against it, not corrected"),
        texts=3,
    )


def quality_sheet(study: Study, found: Sequence[Reach]) -> Sheet:
    """Cost until the best replay-free peer's final OP is reached."""

    def cells(one: Reach) -> Cells:
        cost = "not reached" if one.cost is None else f"{'≤ ' if one.at_most else ''}{one.cost:,.0f}"
        return (
            one.variant, one.mode, one.kind, one.peer if one.peer_mode == one.mode else f"{one.peer} ({one.peer_mode})",
            f"{one.target:.1f}", cost, f"{one.peer_cost:,.0f}",
            NOT_MEASURED if one.ratio is None or one.cost is None else show_interval(one.ratio, 2),
            f"{100 * one.reached:.0f} %", str(one.pairs),
        )  # fmt: skip

    return Sheet(
        "quality",
        f"{study.name}: cost at equal quality",
        ("variant", "inference", "cost in", "best replay-free peer", "its OP (%)", "cost to reach it",
         "the peer's own", "times cheaper", "reached in", "pairs"),
        in_blocks(found, lambda one: (one.mode, one.kind, one.peer_mode), cells),
        found,
        (
            f"steps a task: {', '.join(map(str, study.steps)) or 'one number only'}; each number is a run of its own, "
            "costs between them are interpolated on the means",
            "≤: reached with the fewest steps already; times cheaper: the peer's cost over the variant's, with a 95 % "
            "bootstrap interval in which `not reached` counts as 0; reached in: share of the resamples",
            "best replay-free peer: in the same way of inference; the champion also against those meant for another",
            "seconds depend on what else the machine did, passes don't (but a pass is not always as dear)",
        ),
        texts=4,
    )  # fmt: skip


def tuning_sheet(study: Study, tuned: Mapping[str, Tuned]) -> Sheet:
    """What was chosen, and on which side of the grid it lies."""
    cells = []
    for name, found in tuned.items():
        chosen = ", ".join(f"{key} {value:g}" for key, value in found.setting.items())
        failed = sum(trial.op is None for trial in found.trials)
        cells.append(
            (name, found.mode, chosen, ", ".join(found.at_edge), f"{found.op:.1f}",
             ", ".join(NOT_MEASURED if t.op is None else f"{t.op:.1f}" for t in found.trials), str(failed))
        )  # fmt: skip
    return Sheet(
        "tuning",
        f"{study.name}: what tuning chose",
        ("variant", "inference", "chosen", "at the edge", "OP (%)", "all OPs, in the grid's order", "failed"),
        tuple(cells),
        [{"variant": name, "mode": found.mode, "op": found.op, "setting": str(found.setting)}
         for name, found in tuned.items()],
        ("by OP in the variant's own way of inference, on orders and seeds that aren't compared on; of equals the "
         "smaller value", "at the edge: the smallest or largest value tried; a wider grid might do better"),
        texts=4,
    )  # fmt: skip
