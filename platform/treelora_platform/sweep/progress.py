"""A sweep's progress on the terminal: a line for each task that a trial has learnt, and for each trial's end."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from ray.tune import Callback
from rich.console import Console
from rich.markup import escape

from treelora_platform.summary import format_seconds
from treelora_platform.sweep.child import last_words
from treelora_platform.sweep.journal import Entry, Journal, Status
from treelora_platform.sweep.space import decode
from treelora_platform.sweep.spec import BETTER, SweepSpec, trial_config

SAID: dict[Status, str] = {
    "begun": "",
    "done": "[green]done[/]",
    "stopped": "[yellow]stopped early[/]",
    "failed": "[red]failed[/]: ",
}


class SweepProgress(Callback):
    """Prints, and keeps the journal; `tasks` is the length of the stream."""

    def __init__(self, spec: SweepSpec, tasks: int, console: Console, journal: Journal):
        self.spec, self.tasks, self.console, self.journal = spec, tasks, console, journal
        self.total, self.done = spec.count(), 0
        self.known = {run for run, entry in journal.latest().items() if entry.status in ("done", "stopped")}
        self.began: dict[str, float] = {}
        self.told: dict[str, int] = {}
        self.spent: list[float] = []

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into a state of its own, which we never read
        return {"spec": self.spec}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        run, values = self._identify(trial)
        if run not in self.known:
            self.began.setdefault(trial.trial_id, time.monotonic())
            self.journal.add(Entry(run, values, "begun"))
            self._say(trial, "[dim]begins[/]")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """See `ray.tune.Callback`."""
        count = result.get("tasks", 0)
        if trial.trial_id not in self.began:
            return  # it repeats what an earlier call has shown
        if count > self.told.get(trial.trial_id, 0):
            self.told[trial.trial_id] = count
            scores = ", ".join(f"{name} {result[name]:.1f}" for name in self.spec.objectives if name in result)
            self._say(trial, f"{count}/{self.tasks} tasks  {scores}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        early = (trial.last_result or {}).get("tasks", 0) < self.tasks
        self._ended(trial, "stopped" if early else "done")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        self._ended(trial, "failed", reason_of(trial))

    def _ended(self, trial: Any, status: Status, message: str = "") -> None:
        self.done += 1
        if status != "failed" and trial.trial_id not in self.began:
            return
        (run, values), result = self._identify(trial), trial.last_result or {}
        scores = {name: _measured(result.get(name)) for name in BETTER}
        self.journal.add(
            Entry(run, values, status, result.get("tasks", 0), scores, result.get("mlflow_run_id", ""), message)
        )
        if status != "failed":
            self.known.add(run)
        self.spent.append(time.monotonic() - self.began.pop(trial.trial_id, time.monotonic()))
        left = ""
        if self.spent and self.done < self.total:
            rest = sum(self.spent) / len(self.spent) * (self.total - self.done) / (len(self.began) + 1)
            left = f"; about {format_seconds(rest)} left"
        self._say(trial, f"{SAID[status]}{escape(message)}  [dim]{self.done} of {self.total} trials{left}[/]")

    def _identify(self, trial: Any) -> tuple[str, dict[str, Any]]:
        values = decode(self.spec, trial.config["values"])
        return trial_config(trial.config["base"], values).name, values

    def _say(self, trial: Any, what: str) -> None:
        self.console.print(f"  {escape(describe(self.spec, trial.config))}: {what}", highlight=False)


def _measured(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def describe(spec: SweepSpec, config: dict[str, Any]) -> str:
    """The searched values of a trial, short."""
    return "  ".join(f"{key.split('.')[-1]} {show(value)}" for key, value in decode(spec, config["values"]).items())


def show(value: Any) -> str:
    """A value of the configuration, short."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return ">".join(str(item) for item in value) if isinstance(value, list) else str(value)


def reason_of(trial: Any) -> str:
    """Why a trial failed, in a line: what its experiment said last, or else what Tune knows. Nothing is unpickled."""
    log = Path(trial.config["sweep_dir"]) / "jobs" / f"{trial.trial_id}.log"
    if log.exists() and log.stat().st_size:
        return last_words(log)
    known = Path(trial.error_file) if trial.error_file else None
    return last_words(known) if known and known.exists() else "for a reason that Ray Tune doesn't tell"
