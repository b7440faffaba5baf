"""Running what a study lacks, with a log of what came of each run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape

from treelora_platform.jsonl import JsonLog
from treelora_platform.prepare import run_folder
from treelora_platform.run import run_experiment
from treelora_platform.studies.finished import Finished, finished, keep
from treelora_platform.studies.lanes import Run, run_in_lanes, run_in_turn
from treelora_platform.studies.spec import Job
from treelora_platform.summary import format_seconds


@dataclass(frozen=True)
class Entry:
    """A line of the log: what came of one run."""

    run: str
    variant: str
    work: int
    """Steps of the whole stream, or its tasks where the recipe says how long each is trained."""
    status: Literal["done", "failed"]
    seconds: float
    message: str
    time: float
    """Seconds since 1970."""


class Log(JsonLog[Entry]):
    """What was run, so that a study that was stopped knows how long runs take."""

    kind = Entry
    what = "a study's log"

    def failures(self, jobs: Sequence[Job]) -> list[tuple[Job, str]]:
        """The jobs whose last attempt failed, and why."""
        last = {entry.run: entry for entry in self.entries()}
        return [
            (job, entry.message)
            for job in missing(jobs)
            if (entry := last.get(job.config.name)) and entry.status == "failed"
        ]


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """One job a run: variants may amount to the same configuration."""
    return list({job.config.name: job for job in reversed(jobs)}.values())[::-1]


def missing(jobs: Sequence[Job]) -> list[Job]:
    """The distinct jobs that are not complete, in order."""
    return [job for job in distinct(jobs) if not finished(job.config)]


def work(job: Job) -> int:
    """What a job's time grows with: see `Entry.work`."""
    return len(job.config.stream.order) * (job.steps or 1)


def estimate(jobs: Sequence[Job], entries: Sequence[Entry]) -> float | None:
    """Seconds that these jobs will take, from those that are done: of the same variant, else of all. None: none is."""
    done = [entry for entry in entries if entry.status == "done"]
    if jobs and not done:
        return None
    total = 0.0
    for job in jobs:
        known = [entry for entry in done if entry.variant == job.variant] or done
        total += work(job) * sum(entry.seconds for entry in known) / sum(entry.work for entry in known)
    return total


def run_jobs(jobs: Sequence[Job], log: Log, console: Console, run: Run = run_experiment, lanes: int = 1) -> list[Job]:
    """Run what is missing, in order; a run that fails is logged and shown, and the others go on.

    Stop it whenever you like: the next call begins where it was, within the run too.

    Args:
        lanes: Runs at the same time, each in a process of its own.

    Returns:
        The jobs that failed.
    """
    left = missing(jobs)
    total, failed, waiting = len(distinct(jobs)), [], list(left)
    carry_out = run_in_lanes if lanes > 1 else run_in_turn
    for job, (error, seconds) in carry_out(left, run, console, lanes):
        waiting.remove(job)
        found = None if error else keep(job.config)
        if not error and not found:
            error = f"{run_folder(job.config)}: the run ended, but it isn't complete"
        if error:
            failed.append(job)
        said, status = (error, "failed") if error or not found else (_scores(found), "done")
        log.add(Entry(job.config.name, job.variant, work(job), status, seconds, error, time.time()))  # type: ignore[arg-type]
        rest = estimate(waiting, log.entries())
        left_text = "" if rest is None else f"; {format_seconds(rest / lanes)} left" if rest else "; none left"
        console.print(
            f"\\[{total - len(waiting)}/{total}] {escape(job.label)}  [dim]{job.config.name}[/]\n"
            f"  [{'red' if error else 'green'}]{status}[/]: {escape(said)}  {format_seconds(seconds)}{left_text}",
            highlight=False,
        )
    return failed


def _scores(found: Finished) -> str:
    return "OP " + ", ".join(f"{mode} {scores.op:.1f}" for mode, scores in found.modes.items() if scores.op is not None)
