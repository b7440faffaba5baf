"""What a study has to do, and what it has found so far: plan, tables, figures, one Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from treelora.data.files import write_bytes_atomically
from treelora_platform.sheets import Sheet, markdown, render, write_sheets, write_table
from treelora_platform.studies.analysis import ablation, against_champion, differences, standings
from treelora_platform.studies.figures import save_study_figures
from treelora_platform.studies.quality import KINDS, champion_quality, equal_quality
from treelora_platform.studies.rows import Row, at_equal_steps, collect, rows_table
from treelora_platform.studies.run import Log, distinct, missing
from treelora_platform.studies.spec import Bench, Job
from treelora_platform.studies.tables import (
    ablation_sheet,
    differences_sheet,
    quality_sheet,
    standings_sheet,
    tuning_sheet,
)
from treelora_platform.studies.tuning import Tuned, settings_for, settings_of, tuning_jobs


@dataclass(frozen=True)
class Plan:
    """All jobs of some variants, by phase."""

    tune: list[Job]
    run: list[Job]
    quality: list[Job]
    lacking: dict[str, str]
    """Variants that can't be run yet, and why."""

    @property
    def jobs(self) -> list[Job]:
        """Of all phases."""
        return [*self.tune, *self.run, *self.quality]


def make_plan(bench: Bench, variants: Iterable[str], tuned: dict[str, Tuned], guess: bool = False) -> Plan:
    """The jobs of these variants, in the study's order.

    Args:
        guess: Take the first value of the grid where a variant isn't tuned, so that its runs can be counted.

    Raises:
        ConfigError: a variant's configuration can't be run.
    """
    asked = set(variants)
    names = [name for name in bench.study.variants if name in asked]
    sources = dict.fromkeys(bench.study.variants[name].tuned_as or name for name in names)
    settings, lacking = settings_for(bench, names, tuned)
    if guess:
        for name in lacking:
            settings[name] = settings_of(bench.study, bench.study.variants[name].tuned_as or name)[0]
    ready = [name for name in names if name in settings]
    return Plan(
        tune=tuning_jobs(bench, sources),
        run=bench.compared(ready, settings),
        quality=bench.quality(ready, settings),
        lacking=lacking,
    )


def write_results(bench: Bench, tuned: dict[str, Tuned], log: Log, out: Path, console: Console) -> None:
    """Show all that the finished runs say, and write it to `out`: Parquet, CSV, `comparison.md`, PNG.

    Raises:
        DataError: a table of a run is damaged.
    """
    study = bench.study
    plan = make_plan(bench, study.variants, tuned)
    rows = collect(study, [*plan.run, *plan.quality])
    full = at_equal_steps(rows, plan.run)
    if not full:
        console.print("no run of the comparison is complete yet: no tables")
        return
    sheets = [standings_sheet(study, standings(study, full)), differences_sheet(study, differences(study, full))]
    if study.champion:
        sheets.append(differences_sheet(study, against_champion(study, full), champion=True))
    if study.ablation:
        sheets.append(ablation_sheet(study, ablation(study, full)))
    if len(study.steps) > 1:
        reach = [found for kind in KINDS for found in equal_quality(study, rows, full, kind)]
        reach += [found for kind in KINDS for found in champion_quality(study, rows, full, kind)]
        sheets.append(quality_sheet(study, reach))
    shown = {name: found for name, found in tuned.items() if name in study.variants and study.tuning}
    if shown:
        sheets.append(tuning_sheet(study, shown))
    remarks = _remarks(plan, rows, log, tuned=bool(study.tuning))
    for sheet in sheets:
        console.print(render(sheet))
    for remark in remarks:
        console.print(f"- {remark}", markup=False, highlight=False)
    paths = write_table(out, "rows", rows_table(rows)) + write_sheets(out, sheets)
    paths += [_write_page(out, study.name, sheets, remarks), *save_study_figures(study, rows, full, out / "figures")]
    console.print(f"wrote {len(paths)} files to {out}, comparison.md among them", highlight=False)


def _remarks(plan: Plan, rows: Sequence[Row], log: Log, tuned: bool) -> list[str]:
    """What a reader must know beside the tables: what is missing, and what was not alike."""
    remarks = []
    jobs = [*plan.run, *plan.quality]
    if left := len(missing(jobs)):
        remarks.append(f"Not complete: {left} of {len(distinct(jobs))} runs are missing; see the column `runs`.")
    remarks += [f"{variant} has no runs: {reason}." for variant, reason in plan.lacking.items()]
    remarks += [f"Failed: {job.label}: {message}" for job, message in log.failures([*plan.tune, *jobs])]
    if not tuned:
        remarks.append("Nothing was tuned: the recipe's and the variants' own values were used.")
    commits = sorted({row.commit for row in rows})
    if len(commits) > 1:
        remarks.append(f"The runs were made with {len(commits)} states of the source: {', '.join(commits)}.")
    return remarks


def _write_page(out: Path, heading: str, sheets: Sequence[Sheet], remarks: Sequence[str]) -> Path:
    path = out / "comparison.md"
    write_bytes_atomically(path, markdown(sheets, heading, remarks).encode())
    return path
