"""One run as MLflow remembers it, in plain values: what comparison, report and `best` are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import get_args

from treelora.data.names import slugify
from treelora_platform.config import MethodName
from treelora_platform.tracking_state import tasks_of

SWEEP_TAG, TRIAL_TAG, KIND_TAG = "treelora.sweep", "treelora.trial", "treelora.kind"
PARENT_TAG = "mlflow.parentRunId"
ENDED = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True)
class ModeScores:
    """OP in percent, BWT and FWT in points, of one way of inference; None: not measured."""

    op: float | None = None
    bwt: float | None = None
    fwt: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """A run of an experiment, finished or not; None where MLflow has no such number."""

    run_id: str
    name: str
    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    parent_id: str | None
    start_unix_ms: int
    end_unix_ms: int | None
    params: dict[str, str]
    """Dotted keys of the configuration; a list is JSON text."""
    tags: dict[str, str]
    scores: dict[str, ModeScores]
    """By way of inference: of the end; of a run that has not ended, the newest."""
    seconds: float | None
    tokens: int | None
    tokens_per_second: float | None
    stored_bytes: int | None
    artifact_uri: str
    task_scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """By way of inference and slug of the task: the newest score, in percent."""

    @property
    def method(self) -> str:
        """Name of the method, `unknown` where nobody said."""
        return self.params.get("method") or self.tags.get("method") or "unknown"

    @property
    def seed(self) -> int | None:
        """Seed of the experiment."""
        text = self.params.get("seed") or self.tags.get("seed") or ""
        return int(text) if text.isdecimal() else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in order of learning; of a very long stream only so many as the tag could hold."""
        return tasks_of(self.tags.get("order", ""))

    @cached_property
    def task_set(self) -> frozenset[str]:
        """Slugs of the tasks, whatever their order; all of them, however long the stream."""
        scored = frozenset(slug for scores in self.task_scores.values() for slug in scores)
        return scored | frozenset(slugify(name) for name in self.tasks)

    @property
    def stream_set(self) -> frozenset[str]:
        """What must be the same for two runs to be compared: the tasks, or all classes however they make tasks."""
        return frozenset([self.tags["classes"]]) if "classes" in self.tags else self.task_set

    @property
    def sweep(self) -> str | None:
        """Name of the sweep that the run is of."""
        return self.tags.get(SWEEP_TAG)

    @property
    def is_sweep(self) -> bool:
        """Whether this is the sweep itself, the parent of its trials."""
        return self.tags.get(KIND_TAG) == "sweep"

    @property
    def trial(self) -> str | None:
        """Id of the trial within its sweep."""
        return self.tags.get(TRIAL_TAG)

    @property
    def finished(self) -> bool:
        """Whether the whole stream was learnt."""
        return self.status == "FINISHED"

    def value(self, key: str) -> str | None:
        """A field of the configuration or a tag, as text; `tags.x` is the tag x, whatever fields there are."""
        if key.startswith("tags."):
            return self.tags.get(key.removeprefix("tags."))
        return self.params.get(key, self.tags.get(key))

    def is_idle(self, key: str) -> bool:
        """Whether `key` is a setting of another method than the run's own."""
        section = key.partition(".")[0]
        return "." in key and section in METHOD_SECTIONS and section != self.method


METHOD_SECTIONS = frozenset(get_args(MethodName))


def record_from(
    *,
    run_id: str,
    name: str,
    status: str,
    start_unix_ms: int,
    end_unix_ms: int | None,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
    artifact_uri: str,
) -> RunRecord:
    """A record of what MLflow stores; `metrics` has the newest value of each key."""
    known = {key: value for key, value in metrics.items() if _is_number(value)}

    def final(key: str) -> float | None:
        return known.get(f"final/{key}")

    tokens, stored = final("tokens"), final("stored_bytes")
    return RunRecord(
        run_id=run_id,
        name=name,
        status=status,
        parent_id=tags.get(PARENT_TAG),
        start_unix_ms=start_unix_ms,
        end_unix_ms=end_unix_ms,
        params=dict(params),
        tags={key: value for key, value in tags.items() if key == PARENT_TAG or not key.startswith("mlflow.")},
        scores=_mode_scores(known, ended=status in ENDED),
        seconds=final("seconds"),
        tokens=None if tokens is None else round(tokens),
        tokens_per_second=final("tokens_per_second"),
        stored_bytes=None if stored is None else round(stored),
        artifact_uri=artifact_uri,
        task_scores=_task_scores(known),
    )


def _is_number(value: float) -> bool:
    return math.isfinite(value) and abs(value) < 1e300  # databases keep infinity as the largest number


def _mode_scores(metrics: Mapping[str, float], ended: bool) -> dict[str, ModeScores]:
    # a run that was extended still has the final numbers of its first end while it goes on
    prefixes = ("final/", "") if ended else ("", "final/")
    found: dict[str, dict[str, float]] = {}
    for prefix in reversed(prefixes):
        for key, value in metrics.items():
            score, slash, mode = key.removeprefix(prefix).partition("/")
            if key.startswith(prefix) and slash and mode and score in ("op", "bwt", "fwt"):
                found.setdefault(mode, {})[score] = value
    return {mode: ModeScores(**found[mode]) for mode in sorted(found)}


def _task_scores(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for key, value in sorted(metrics.items()):
        kind, _, rest = key.partition("/")
        mode, slash, task = rest.partition("/")
        if kind == "score" and slash:
            found.setdefault(mode, {})[task] = value
    return found
