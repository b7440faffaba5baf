"""The comparison as LaTeX: `tabular` environments with booktabs, to be taken in by `\\input`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from treelora_platform.experiments.analysis import Difference, ExperimentComparison, Mean, Standing
from treelora_platform.experiments.tables import BETTER, half_width, show_p

MISSING = "--"
_SCORES = ("op", "bwt", "fwt")
_HEADS = {"op": "OP (\\%)", "bwt": "BWT", "fwt": "FWT"}
_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "–": "--", "…": r"\dots{}",
}  # fmt: skip


def escape(text: str) -> str:
    """Text that LaTeX sets as it stands; line breaks and other control characters become spaces."""
    return "".join(_ESCAPES.get(sign, sign if sign.isprintable() else " ") for sign in text)


def latex_page(comparison: ExperimentComparison) -> str:
    """Both tables with a line on what they show."""
    parts = [
        "% Needs \\usepackage{booktabs}. Mean +- half of Student's 95 % interval over runs; the best in bold.",
        f"% Experiment: {_comment(comparison.experiment)}; by {_comment(', '.join(comparison.by))}.",
        *(f"% {_comment(remark)}" for remark in comparison.remarks),
        standings_tabular(comparison.standings),
    ]
    if comparison.differences:
        parts += [
            f"% Group less {_comment(comparison.reference or '')} over pairs of runs, with Student's 95 % interval; "
            "p of the sign-flip test, and Holm's.",
            differences_tabular(comparison.differences),
        ]
    return "\n".join(parts) + "\n"


def standings_tabular(standings: Sequence[Standing]) -> str:
    """A row a group, a block of columns a way of inference, then training time; the best score of each column bold.

    Bounds are never bold: they don't compete.
    """
    modes = list(dict.fromkeys(one.mode for one in standings))
    scores = {mode: [s for s in _SCORES if any(getattr(o, s) for o in standings if o.mode == mode)] for mode in modes}
    found = {(one.group, one.mode): one for one in standings}
    groups = list(dict.fromkeys(one.group for one in standings))
    bold = {(mode, score): _best(standings, mode, score) for mode in modes for score in scores[mode]}
    rows = []
    for group in groups:
        cells = [escape(group)]
        for mode in modes:
            one = found.get((group, mode))
            for score in scores[mode]:
                mean = getattr(one, score) if one else None
                cells.append(show(mean, 1, bold=one is not None and not one.bound and _text(mean) in bold[mode, score]))
        any_mode = next(one for one in standings if one.group == group)
        rows.append([*cells, str(any_mode.runs), show(any_mode.seconds, 0)])
    spans = ["", *(f"\\multicolumn{{{len(scores[mode])}}}{{c}}{{{escape(mode)}}}" for mode in modes), "", ""]
    heads = ["", *(_HEADS[score] for mode in modes for score in scores[mode]), "runs", "time (s)"]
    return _tabular("l" + "r" * (len(heads) - 1), [spans, heads], rows, _rules([len(scores[mode]) for mode in modes]))


def differences_tabular(differences: Sequence[Difference]) -> str:
    """A row a group, way of inference and score."""
    rows: list[list[str]] = []
    for i, one in enumerate(differences):
        if i and (differences[i - 1].mode, differences[i - 1].metric) != (one.mode, one.metric):
            rows.append([])
        digits, t = 0 if one.metric == "seconds" else 1, one.found.t
        ends = MISSING if t.low != t.low else f"$[{t.low:.{digits}f}, {t.high:.{digits}f}]$"
        metric = "time (s)" if one.metric == "seconds" else one.metric.upper()
        rows.append(
            [escape(one.group), escape(one.mode), metric, str(one.found.pairs), f"${t.value:+.{digits}f}$", ends,
             _p(one.found.p), _p(one.corrected_p)]
        )  # fmt: skip
    heads = ["", "inference", "score", "pairs", "difference", "95\\,\\% interval", "$p$", "$p$ (Holm)"]
    return _tabular("lll" + "r" * 5, [heads], rows, "")


def show(found: Mean | None, digits: int = 1, bold: bool = False) -> str:
    r"""`$45.3 \pm 2.1$`; the mean alone where there is one run."""
    if found is None:
        return MISSING
    half = half_width(found.t)
    value = _number(found.value, digits)
    value = f"\\mathbf{{{value}}}" if bold else value
    return f"${value}$" if half is None else f"${value} \\pm {half:.{digits}f}$"


def _number(value: float, digits: int = 1) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # never -0.0


def _text(found: Mean | None) -> str:
    return MISSING if found is None else _number(found.value)


def _best(standings: Sequence[Standing], mode: str, score: str) -> set[str]:
    """The text of the best mean, so that what looks equal is a tie; empty where there is nothing to be better than."""
    better: Callable[..., float] = BETTER[score]
    means = [getattr(one, score) for one in standings if one.mode == mode and not one.bound]
    values = [mean.value for mean in means if mean is not None]
    return {_number(better(values))} if len(set(map(_number, values))) > 1 else set()


def _p(p: float) -> str:
    return f"${show_p(p).replace(' ', '')}$"


def _rules(widths: Sequence[int]) -> str:
    first, rules = 2, []
    for width in widths:
        rules.append(f"\\cmidrule(lr){{{first}-{first + width - 1}}}")
        first += width
    return "".join(rules)


def _tabular(columns: str, heads: Sequence[Sequence[str]], rows: Sequence[Sequence[str]], rules: str) -> str:
    lines = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule"]
    for i, head in enumerate(heads):
        lines.append(" & ".join(head) + " \\\\")
        if rules and i < len(heads) - 1:
            lines.append(rules)
    lines.append("\\midrule")
    for row in rows:
        # a bracket or a star after the end of a row would be taken for an option of it
        guard = "{}" if row and row[0].startswith(("[", "*")) else ""
        lines.append(guard + " & ".join(row) + " \\\\" if row else "\\midrule")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def _comment(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)
