"""Tables of an experiment's comparison: for the terminal, Markdown, Parquet and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pyarrow as pa

from treelora.simulation.statistics import Interval
from treelora_platform.experiments.analysis import (
    Difference,
    ExperimentComparison,
    Mean,
    Standing,
    fields_of,
)
from treelora_platform.sheets import Cells, Sheet, in_blocks, show_ends, show_interval
from treelora_platform.statistics import smallest_p
from treelora_platform.summary import NOT_MEASURED, format_bytes, format_number

HEADINGS = {"op": "OP (%)", "bwt": "BWT (points)", "fwt": "FWT (points)", "seconds": "training (s)"}
BETTER = {"op": max, "bwt": min, "fwt": max}
LEVEL_P = 0.05


def sheets_of(comparison: ExperimentComparison) -> list[Sheet]:
    """All tables that there is something for."""
    found = [standings_sheet(comparison)]
    if comparison.differences:
        found.append(differences_sheet(comparison))
    if comparison.common:
        found.append(common_sheet(comparison))
    return found


def standings_sheet(comparison: ExperimentComparison) -> Sheet:
    """The main table, a block a way of inference."""
    found = comparison.standings
    scores = [score for score in ("op", "bwt", "fwt") if any(getattr(one, score) for one in found)]
    cells = in_blocks(found, lambda one: one.mode, lambda one: _standing_cells(one, scores))
    notes = [
        "mean over runs, 95 % bootstrap interval in brackets, which is too narrow for a handful of runs: the files "
        "have Student's interval too",
        "OP, FWT: larger is better; BWT: what was forgotten, smaller is better, negative where old tasks gained",
    ]
    if any(one.bound for one in found):
        notes.append("(bound): learns all tasks at once, or none; no competitor")
    return Sheet(
        "standings",
        f"{comparison.experiment}: means by {', '.join(comparison.by)}",
        ("group", "inference", "runs", *(HEADINGS[score] for score in scores), HEADINGS["seconds"], "tokens/s",
         "stored"),
        cells,
        found,
        tuple(notes),
        texts=2,
        spare=("stored", "tokens/s", HEADINGS["seconds"]),
    )  # fmt: skip


def _standing_cells(one: Standing, scores: Sequence[str]) -> Cells:
    return (
        f"{one.group} (bound)" if one.bound else one.group,
        one.mode,
        str(one.runs),
        *(show_mean(getattr(one, score)) for score in scores),
        show_mean(one.seconds, 0),
        format_number(one.tokens_per_second.value if one.tokens_per_second else None),
        format_bytes(one.stored_bytes.value) if one.stored_bytes else NOT_MEASURED,
    )


def differences_sheet(comparison: ExperimentComparison) -> Sheet:
    """Every group against the reference, a block a way of inference and score."""
    found = comparison.differences
    cells = in_blocks(found, lambda one: (one.mode, one.metric), _difference_cells)
    return Sheet(
        "differences",
        f"{comparison.experiment}: differences from {comparison.reference}",
        ("group", "inference", "score", "pairs", "difference", "95 % t interval", "p", "least p", "p (Holm)",
         "pairs needed"),
        cells,
        found,
        (
            f"group less {comparison.reference} over pairs of runs, 95 % bootstrap interval in brackets",
            "p: sign-flip test, two-sided, exact up to 20 pairs; Holm: corrected over all groups of a block",
            "pairs needed: (2.8 sd / difference)^2 + 2, for 80 % power at 5 %, were this the true difference",
            *_attainable(found),
        ),
        texts=3,
        spare=("least p", "pairs needed", "95 % t interval", "p"),
    )  # fmt: skip


def _difference_cells(one: Difference) -> Cells:
    pair, digits = one.found, 0 if one.metric == "seconds" else 1
    needed = NOT_MEASURED if pair.pairs_needed is None else f"{pair.pairs_needed:,}"
    score = "training (s)" if one.metric == "seconds" else one.metric.upper()
    return (
        one.group,
        one.mode,
        score,
        str(pair.pairs),
        show_interval(pair.bootstrap, digits, sign=True),
        show_ends(pair.t, digits),
        show_p(pair.p),
        show_p(pair.smallest_p),
        show_p(one.corrected_p),
        needed,
    )


def _attainable(found: Sequence[Difference]) -> list[str]:
    """Where so few pairs can't give a small p at all."""
    notes = []
    for pairs, family in sorted({(one.found.pairs, one.family) for one in found}):
        if (least := min(1.0, family * smallest_p(pairs))) > LEVEL_P:
            enough = next(n for n in range(1, 99) if family * smallest_p(n) <= LEVEL_P)
            notes.append(
                f"with {pairs} pair{'s' if pairs > 1 else ''} and {family} comparison{'s' if family > 1 else ''} no p "
                f"(Holm) can be below {least:.3g}; it takes {enough} pairs at least to get to {LEVEL_P}"
            )
    return notes


def common_sheet(comparison: ExperimentComparison) -> Sheet:
    """Runs on different tasks: last scores on the tasks that all have."""
    found = comparison.common
    tasks = ", ".join(comparison.common_tasks)
    cells = in_blocks(
        found,
        lambda one: one.mode,
        lambda one: (one.group, one.mode, str(one.tasks), str(one.runs), show_mean(one.score)),
    )
    return Sheet(
        "common_tasks",
        f"{comparison.experiment}: last scores on {tasks}",
        ("group", "inference", "tasks learnt", "runs", "mean score (%)"),
        cells,
        found,
        ("all runs, also those that learnt other tasks beside these: more tasks, or another place in the order, make "
         "the same task harder to keep, so compare rows with as many tasks only",),
        texts=2,
    )  # fmt: skip


def rows_table(comparison: ExperimentComparison) -> pa.Table:
    """One row a run and way of inference, for Parquet and CSV: its group, scores, costs, and where it is from."""
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            for mode, scores in run.scores.items():
                own = {
                    "group": group.label,
                    "method": run.method,
                    "mode": mode,
                    "order": ", ".join(run.tasks),
                    "seed": run.seed,
                    "op": scores.op,
                    "bwt": scores.bwt,
                    "fwt": scores.fwt,
                    "seconds": run.seconds,
                    "tokens": run.tokens,
                    "tokens_per_second": run.tokens_per_second,
                    "stored_bytes": run.stored_bytes,
                    "run": run.name,
                    "run_id": run.run_id,
                    "started": datetime.fromtimestamp(run.start_unix_ms / 1000, UTC),
                    "data_hash": run.tags.get("data_hash"),
                    "commit": run.tags.get("version.commit"),
                }
                rows.append(fields_of(run, comparison.by) | own)
    return pa.Table.from_pylist(rows, schema=_schema(comparison.by))


def _schema(by: Sequence[str]) -> pa.Schema:
    own = [
        *((name, pa.string()) for name in ("group", "method", "mode", "order")),
        ("seed", pa.int64()),
        *((name, pa.float64()) for name in ("op", "bwt", "fwt", "seconds")),
        ("tokens", pa.int64()),
        ("tokens_per_second", pa.float64()),
        ("stored_bytes", pa.int64()),
        *((name, pa.string()) for name in ("run", "run_id")),
        ("started", pa.timestamp("ms", "UTC")),
        *((name, pa.string()) for name in ("data_hash", "commit")),
    ]
    known = {name for name, _ in own}
    return pa.schema([*((key, pa.string()) for key in by if key not in known), *own])


def show_mean(found: Mean | None, digits: int = 1) -> str:
    """`45.3 [43.0, 47.9]`; the value alone of one run."""
    return show_interval(None if found is None else found.bootstrap, digits)


def show_p(p: float) -> str:
    """Three digits; what is smaller than a test of drawn patterns can tell is said to be."""
    return "< 0.0001" if p < 1e-4 else f"{p:.3g}"


def half_width(found: Interval) -> float | None:
    """Half the width of an interval, None where its ends aren't known."""
    return None if found.low != found.low else (found.high - found.low) / 2
