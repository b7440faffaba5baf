"""What the commands do, step by step: check, ship, submit, follow, list, stop."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treelora.errors import ConfigError
from treelora_platform.cli_support import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED, fail
from treelora_platform.provenance import versions
from treelora_platform.submit.address import LostContactError, resolve_address
from treelora_platform.submit.follow import Follower, wait_until_ended
from treelora_platform.submit.judge import Check
from treelora_platform.submit.preflight import cluster_checks, connect, entrypoint, package_check, ray_check
from treelora_platform.submit.records import Job, metadata_of, next_attempt, same_name, submission_id
from treelora_platform.submit.shipping import (
    STOP_WAIT_S,
    Package,
    runtime_env,
    stage_files,
    stage_package,
    travelling_tracking_uri,
)
from treelora_platform.submit.submission import Submission

if TYPE_CHECKING:
    from rich.console import Console

    from treelora_platform.submit.client import Jobs

TRIES = 5
"""At a free number for a submission, should others submit the same name at this very moment."""
_STYLES = {"ok": "green", "note": "yellow", "failed": "bold red"}


@dataclass(frozen=True)
class Wishes:
    """Options of `treelora submit`."""

    anew: bool = False
    check: bool = False
    no_wait: bool = False
    stop_on_interrupt: bool = False


def submit_job(submission: Submission, address: str | None, wishes: Wishes, console: Console) -> int:
    """Check, submit and follow; the exit code.

    Raises:
        TreeLoRAError: it was refused.
    """
    here = f" --address {shlex.quote(address)}" if address else ""
    there = resolve_address(address)
    shown: list[Check] = []

    def show(check: Check) -> None:
        shown.append(check)
        console.print(f"[{_STYLES[check.state]}]{check.state:6}[/] {check.name:11}", end="")
        console.print(check.text, markup=False, highlight=False)

    uri, remark = travelling_tracking_uri()
    with tempfile.TemporaryDirectory(prefix="treelora-submit-") as scratch:
        package = stage_package(Path(scratch, "package"))
        source = versions()
        env = runtime_env(package, stage_files(Path(scratch, "job"), submission.files), uri, source["commit"])
        show(Check(submission.kind, "ok", f"{submission.name}, {submission.digest[:12]}: valid"))
        if remark:
            show(Check("MLflow", "note", remark))
        show(package_check(package))
        jobs = connect(there, show)
        show(_name_check(jobs, submission, wishes, here))
        show(ray_check(jobs))
        if not wishes.check:
            _refuse_if_failed(shown)
        python = jobs.head_python()
        with console.status("looking around on the cluster"):
            found = cluster_checks(jobs, env, submission.needs, python)
        for check in found:
            show(check)
        _refuse_if_failed(shown)
        if wishes.check:
            console.print("all is ready; without --check it would be submitted now")
            return 0
        with console.status("submitting"):
            command = entrypoint(python, list(submission.command))
            job_id = _submit(jobs, submission, wishes, here, package, source, env, command)
    console.print(f"submitted [bold]{job_id}[/]", highlight=False)
    if wishes.no_wait:
        console.print(_how_to(job_id, here), highlight=False, markup=False)
        return 0
    return _follow(jobs, job_id, here, console, stop_on_interrupt=wishes.stop_on_interrupt)


def list_jobs(address: str | None, all_jobs: bool, console: Console) -> None:
    """A table of the cluster's jobs."""
    from rich.table import Table

    found = [job for job in _connected(address).all() if all_jobs or job.kind in ("experiment", "sweep", "comparison")]
    if not found:
        console.print("no jobs" if all_jobs else "no jobs of treelora; --all shows those of others")
        return
    table = Table("job", "kind", "status", "begun", "duration", "message", box=None, pad_edge=False)
    for job in found:
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.begun_ms or 0) / 1000))
        table.add_row(job.id, job.kind or "-", job.status, begun, _duration(job.seconds()), _escaped(job.said()))
    if console.is_terminal:
        console.print(table)
        return
    console.width = 10_000  # a log's lines are neither folded nor filled up
    with console.capture() as captured:
        console.print(table)
    _write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def show_logs(text: str, address: str | None, follow: bool, console: Console) -> int:
    """Print a job's log; with `follow` until it ends, and its exit code."""
    jobs = _connected(address)
    job = _find(jobs, text)
    if follow:
        return _follow(jobs, job.id, f" --address {shlex.quote(address)}" if address else "", console)
    _write(jobs.logs(job.id))
    return 0


def stop_job(text: str, address: str | None, console: Console) -> int:
    """Stop a job and wait for its end; 0 where it has ended."""
    jobs = _connected(address)
    job = _find(jobs, text)
    if job.ended:
        console.print(f"{job.id} has ended before: {job.status}", highlight=False)
        return 0
    return _stop(jobs, job.id, console)


def _refuse_if_failed(shown: list[Check]) -> None:
    if failed := sum(check.state == "failed" for check in shown):
        fail(f"{failed} of {len(shown)} checks failed; nothing was submitted", EXIT_REFUSED)


def _name_check(jobs: Jobs, submission: Submission, wishes: Wishes, here: str) -> Check:
    try:
        known = jobs.all()
        attempt = next_attempt(known, submission, wishes.anew, here)
    except ConfigError as error:
        return Check("name", "failed", str(error))
    before = same_name(known, submission.name)
    text = f"{submission_id(submission.name, attempt)}, the first of that name on this cluster"
    if before:
        text = f"{submission_id(submission.name, attempt)}, after {before[-1].id} ({before[-1].status.lower()})"
    return Check("name", "ok", text)


def _submit(
    jobs: Jobs,
    submission: Submission,
    wishes: Wishes,
    here: str,
    package: Package,
    source: dict[str, str],
    env: dict[str, Any],
    command: str,
) -> str:
    """Submit under the next free number; Ray takes each id once, so of two that submit at once, one sees the other."""
    from treelora_platform.submit.client import TakenError

    for _ in range(TRIES):
        attempt = next_attempt(jobs.all(), submission, wishes.anew, here)
        job_id = submission_id(submission.name, attempt)
        try:
            jobs.submit(job_id, command, env, metadata_of(submission, package.digest, source, attempt))
        except TakenError:
            continue
        return job_id
    raise ConfigError(f"{submission.name!r} is being submitted by somebody else at this moment; try again, or rename")


def _follow(jobs: Jobs, job_id: str, here: str, console: Console, *, stop_on_interrupt: bool = False) -> int:
    def say(text: str) -> None:
        console.print(f"[yellow]{_escaped(text)}[/]", highlight=False)

    try:
        job = Follower(jobs, job_id, _write, say).follow()
    except KeyboardInterrupt:
        if stop_on_interrupt:
            _stop(jobs, job_id, console)
        else:
            say(f"no longer following; the job goes on. {_how_to(job_id, here)}")
        return EXIT_INTERRUPTED
    except LostContactError as error:
        fail(f"{error}. {_how_to(job_id, here)}", EXIT_FAILED)
        return EXIT_FAILED
    how = f"{job.id} {job.status.lower()} after {_duration(job.seconds())}"
    if job.status == "FAILED" and job.driver_exit_code is None:
        how += f": {job.said()}"  # it never came to the command, whose own words would be in the log
    console.print(how + (f", exit code {job.exit_code}" if job.exit_code else ""), highlight=False, markup=False)
    return job.exit_code


def _stop(jobs: Jobs, job_id: str, console: Console) -> int:
    begun = time.monotonic()
    with console.status(f"waiting for {job_id} to close its run"):
        jobs.stop(job_id)
        job = wait_until_ended(jobs, job_id, STOP_WAIT_S + 30.0)
    if job is None:
        fail(f"{job_id} doesn't end; `treelora jobs logs {job_id}` may say why", EXIT_FAILED)
        return EXIT_FAILED
    errors = [line for line in jobs.logs(job_id).splitlines() if line.startswith("error: ")]
    seconds = time.monotonic() - begun
    if errors:
        said = errors[-1].removeprefix("error: ")
    else:
        said = "it ended without a word, perhaps before it had begun; if its MLflow run is open, the same submission "
        said += "goes on with it"
    console.print(f"{job_id} {job.status.lower()} after {seconds:.0f} s: {said}", highlight=False, markup=False)
    return 0


def _connected(address: str | None) -> Jobs:
    return connect(resolve_address(address), lambda check: None)


def _find(jobs: Jobs, text: str) -> Job:
    """A job by its id, or the newest of a name."""
    from treelora_platform.submit.client import UnknownJobError

    try:
        return jobs.get(text)
    except UnknownJobError:
        if named := same_name(jobs.all(), text):
            return named[-1]
        raise


def _how_to(job_id: str, here: str) -> str:
    return f"Follow it: treelora jobs logs {job_id} --follow{here}; stop it: treelora jobs stop {job_id}{here}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
