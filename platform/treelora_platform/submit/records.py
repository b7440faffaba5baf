"""A job as it is remembered by the cluster, and what two jobs of one name mean for each other."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from treelora.data.names import slugify
from treelora.errors import ConfigError
from treelora_platform.submit.submission import Submission

KILLED_BY_SIGNAL, INTERRUPTED = 128, 130
MOST_SETTINGS = 8000
"""Characters of the settings that are kept with a job, to say what differs from the next one."""
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """One submission, as the Jobs API tells of it."""

    id: str
    status: str
    metadata: dict[str, str] = field(default_factory=dict)
    begun_ms: int | None = None
    ended_ms: int | None = None
    message: str = ""
    driver_exit_code: int | None = None

    @property
    def kind(self) -> str:
        """experiment, sweep, comparison or probe; empty for a job of somebody else."""
        return self.metadata.get("treelora.kind", "")

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in _ENDED

    @property
    def exit_code(self) -> int:
        """What the command on the cluster ended with, and nothing that it didn't: 1 where Ray knows no code."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return INTERRUPTED
        code = self.driver_exit_code
        return KILLED_BY_SIGNAL - code if code is not None and code < 0 else code or 1

    def seconds(self) -> float:
        """How long it has been there, or was."""
        begun = self.begun_ms or 0
        return max(0.0, ((self.ended_ms or time.time() * 1000) - begun) / 1000) if begun else 0.0

    def said(self) -> str:
        """The last error in Ray's message, or its first line."""
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        if errors:
            return f"exit {self.exit_code}, {errors[-1]}"
        if self.status == "FAILED" and self.driver_exit_code is not None:
            return f"exit {self.exit_code}" + (f", {lines[-1]}" if len(lines) > 1 else "")
        return lines[0] if lines else ""


def metadata_of(submission: Submission, package_digest: str, versions: dict[str, str], attempt: int) -> dict[str, str]:
    """What is kept with a job: who it is, and what it was made from."""
    settings = json.dumps(submission.settings, sort_keys=True)
    return {
        "treelora.kind": submission.kind,
        "treelora.name": submission.name,
        "treelora.attempt": str(attempt),
        "treelora.config_hash": submission.digest,
        "treelora.package_hash": package_digest,
        "treelora.version": versions.get("treelora", ""),
        "treelora.commit": versions.get("commit", ""),
        "treelora.output_dir": submission.needs.output_dir,
        **({"treelora.settings": settings} if len(settings) <= MOST_SETTINGS else {}),
    }


def submission_id(name: str, attempt: int) -> str:
    """The id of a job: it is in addresses and file names."""
    return f"{slugify(name)}-{attempt}"


def next_attempt(jobs: Sequence[Job], submission: Submission, anew: bool, here: str) -> int:
    """The number of this submission among those of its name.

    Args:
        jobs: All that the cluster remembers.
        submission: The one to come.
        anew: Another configuration than before is what the user wants (`--force`, `--fresh`).
        here: The options that name the cluster, for the commands in messages.

    Raises:
        ConfigError: one of that name is live, or the last one was of another configuration.
    """
    before = same_name(jobs, submission.name)
    for job in before:
        if not job.ended:
            raise ConfigError(
                f"{submission.name!r} is {job.status.lower()} as {job.id}{_otherwise(job, submission)}; "
                f"`treelora jobs logs {job.id} --follow{here}` follows it, `treelora jobs stop {job.id}{here}` stops it"
            )
    # code 2: it was refused before it had begun, so there is nothing to be kept apart from
    worked = [job for job in before if not (job.status == "FAILED" and job.driver_exit_code == 2)]
    if worked and not anew and submission.kind != "comparison":
        last = worked[-1]
        if last.kind != submission.kind:
            raise ConfigError(f"{submission.name!r} was a {last.kind} ({last.id}); choose another name")
        if last.metadata.get("treelora.config_hash") != submission.digest:
            raise ConfigError(
                f"{submission.name!r} was submitted before{_otherwise(last, submission)}; choose another name, "
                "--fresh to begin anew" + (", or --force to go on all the same" if last.kind == "experiment" else "")
            )
    return max([_attempt(job) for job in before], default=0) + 1


def same_name(jobs: Sequence[Job], name: str) -> list[Job]:
    """The jobs whose ids that name leads to, the newest last."""
    slug = slugify(name)
    own = [job for job in jobs if job.kind and re.fullmatch(rf"{re.escape(slug)}-\d+", job.id)]
    return sorted(own, key=_attempt)


def _attempt(job: Job) -> int:
    return int(job.id.rpartition("-")[2])


def _otherwise(job: Job, submission: Submission) -> str:
    """How the configuration of a job differs; empty where it doesn't."""
    before = job.metadata.get("treelora.config_hash", "unknown")
    if before == submission.digest:
        return ""
    hashes = f" with another configuration ({before[:12]}, now {submission.digest[:12]})"
    try:
        old: dict[str, Any] = json.loads(job.metadata.get("treelora.settings", "{}"))
    except ValueError:
        old = {}
    new = json.loads(json.dumps(submission.settings))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if not old or not keys or job.kind != submission.kind:
        return hashes
    shown = [f"{key}: {_shown(old, key)} -> {_shown(new, key)}" for key in keys[:5]]
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{hashes}: {', '.join(shown)}{more}"


def _shown(settings: dict[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "default"
