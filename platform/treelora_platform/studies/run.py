"""Running what a study lacks: one job after the other in one Ray session, with a log of what came of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape

from treelora.errors import DataError
from treelora_platform.config import ExperimentConfig
from treelora_platform.jsonl import JsonLog
from treelora_platform.prepare import run_folder
from treelora_platform.run import run_experiment
from treelora_platform.run_tables import read_run_json
from treelora_platform.studies.spec import Job
from treelora_platform.summary import format_seconds, summarise

Run = Callable[[ExperimentConfig, Console], object]


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


def is_complete(config: ExperimentConfig) -> bool:
    """Whether the run is there, whole, and of this very configuration."""
    record = read_run_json(run_folder(config))
    return record.get("status") == "FINISHED" and record.get("config_hash") == config.digest()


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """One job a run: variants may amount to the same configuration."""
    return list({job.config.name: job for job in reversed(jobs)}.values())[::-1]


def missing(jobs: Sequence[Job]) -> list[Job]:
    """The distinct jobs that are not complete, in order."""
    return [job for job in distinct(jobs) if not is_complete(job.config)]


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


def run_jobs(jobs: Sequence[Job], log: Log, console: Console, run: Run = run_experiment) -> list[Job]:
    """Run what is missing, in order; a run that fails is logged and shown, and the others go on.

    Stop it whenever you like: the next call begins where it was, within the run too.

    Returns:
        The jobs that failed.
    """
    left = missing(jobs)
    total, failed = len(distinct(jobs)), []
    for number, job in enumerate(left, start=total - len(left) + 1):
        console.print(f"\\[{number}/{total}] {escape(job.label)}  [dim]{job.config.name}[/]", highlight=False)
        begin = time.monotonic()
        try:
            run(job.config, console)
            if not is_complete(job.config):
                raise DataError(f"{run_folder(job.config)}: the run ended, but it isn't complete")
            status, said = "done", _scores(job)
        # one broken run, for whatever reason, must not cost the night; the log and the exit code tell of it
        except Exception as error:  # noqa: BLE001
            status, said = "failed", str(error) or type(error).__name__
            failed.append(job)
        seconds = time.monotonic() - begin
        message = said if status == "failed" else ""
        log.add(Entry(job.config.name, job.variant, work(job), status, seconds, message, time.time()))  # type: ignore[arg-type]
        rest = estimate(left[left.index(job) + 1 :], log.entries())
        left_text = "" if rest is None else f"; {format_seconds(rest)} left" if rest else "; none left"
        colour = "red" if failed and failed[-1] is job else "green"
        console.print(f"  [{colour}]{status}[/]: {escape(said)}  {format_seconds(seconds)}{left_text}", highlight=False)
    return failed


def _scores(job: Job) -> str:
    modes = summarise(run_folder(job.config)).modes
    return "OP " + ", ".join(f"{mode} {found.op:.1f}" for mode, found in modes.items() if found.op is not None)
