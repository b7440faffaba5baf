"""`treelora compare`: an experiment's runs from MLflow alone, as tables in the terminal and in files, and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from treelora.data.files import write_bytes_atomically
from treelora.data.names import slugify
from treelora.errors import DataError
from treelora_platform.experiments.analysis import ExperimentComparison, compare_groups
from treelora_platform.experiments.groups import select
from treelora_platform.experiments.latex import latex_page
from treelora_platform.experiments.side_by_side import compare_two, is_run_folder
from treelora_platform.experiments.tables import rows_table, sheets_of
from treelora_platform.sheets import markdown, render, write_sheets, write_table

if TYPE_CHECKING:
    from treelora_platform.tracking_query import History

OUT = Path("comparison")


def compare(
    target: str,
    other: str | None,
    by: Sequence[str],
    filters: Sequence[str],
    reference: str | None,
    out: Path | None,
    tracking_uri: str | None,
    console: Console,
    html: bool = True,
) -> Path:
    """What the command does: an experiment, or two runs if `other` is given; returns the page that was written.

    Raises:
        DataError, TrackingError: in one message, what to do about it.
    """
    from treelora_platform.tracking_query import History

    if other is not None:
        if unused := [
            flag for flag, given in (("--by", by), ("--filter", filters), ("--reference", reference)) if given
        ]:
            raise DataError(f"{unused[0]} is for the runs of an experiment; two runs are compared as they are")
        local = is_run_folder(target) and is_run_folder(other)
        history = None if local else History(tracking_uri)
        name = f"{slugify(Path(target).name)}-{slugify(Path(other).name)}"
        return compare_two(history, target, other, out or OUT / name, console, html)
    if is_run_folder(target):
        raise DataError(f"{target} is one run: give a second one, or see `treelora report {target}`")
    place = out or OUT / slugify(target)
    return compare_experiment(History(tracking_uri), target, by or ["method"], filters, reference, place, console, html)


def compare_experiment(
    history: History,
    experiment: str,
    by: Sequence[str],
    filters: Sequence[str],
    reference: str | None,
    out: Path,
    console: Console,
    html: bool = True,
) -> Path:
    """Compare the runs of an experiment, print tables and remarks, and write them to `out`.

    Args:
        history: MLflow.
        experiment: Its name there.
        by: Fields or tags that make the groups; one text may hold several, with commas.
        filters: Conditions such as `lora.rank=8`; all must hold.
        reference: Group that the others are held against; None: `sequential`, or else the first.
        out: Folder for `rows`, `standings` and `differences` as Parquet and CSV, `comparison.md`, `comparison.tex`
            and `report.html`.
        console: Where tables are printed.
        html: Whether to write the report.

    Returns:
        The report, or else `comparison.md`.

    Raises:
        DataError: there is nothing to compare, or a field, filter or reference is wrong.
        TrackingError: the server can't be reached.
    """
    keys = [key.strip() for text in by for key in text.split(",") if key.strip()] or ["method"]
    with console.status(f"reading {experiment} from MLflow"):
        records = history.runs(experiment)
    comparison = compare_groups(experiment, select(records, keys, filters), reference)
    sheets = sheets_of(comparison)
    for sheet in sheets:
        console.print(render(sheet, console.width))
    console.print(f"{len(comparison.records)} of {len(records)} runs are compared", highlight=False)
    for remark in comparison.remarks:
        console.print(f"- {remark}", markup=False, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    paths = write_table(out, "rows", rows_table(comparison)) + write_sheets(out, sheets)
    paths += write_pages(comparison, out)
    page = out / "comparison.md"
    if html:
        from treelora_platform.experiments.report import write_experiment_report

        page = out / "report.html"
        with console.status("writing the report"):
            write_experiment_report(comparison, history, page, filters)
        paths.append(page)
    console.print(f"wrote {len(paths)} files to {out}; see {page}", highlight=False)
    return page


def write_pages(comparison: ExperimentComparison, out: Path) -> list[Path]:
    """`comparison.md` and `comparison.tex`."""
    pages = {
        "comparison.md": markdown(sheets_of(comparison), comparison.experiment, comparison.remarks),
        "comparison.tex": latex_page(comparison),
    }
    for name, text in pages.items():
        write_bytes_atomically(out / name, text.encode())
    return [out / name for name in pages]
