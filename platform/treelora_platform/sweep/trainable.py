"""A trial as Ray Tune sees it: it starts the experiment, tells of each task learnt, and ends what it started."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import ray
from ray.tune import Trainable

from treelora_platform.prepare import run_folder
from treelora_platform.run_record import finished_record
from treelora_platform.sweep.child import Child, last_words
from treelora_platform.sweep.journal import Journal
from treelora_platform.sweep.scoreboard import Scoreboard
from treelora_platform.sweep.space import decode
from treelora_platform.sweep.spec import parse_sweep, trial_config

POLL_S = 0.3
HEARTBEAT_S = 2.0
"""How long Tune may have to wait before it can tell this actor to stop: it is deaf while it waits for a task."""
END_S = 30.0
"""Time for a trial to close its run before it is killed."""
RESOURCES: dict[str, float] = {"CPU": 0, "memory": 1}
"""Of this actor alone: a byte, because Tune wants something. The workers' share is asked for by the trial's own job."""


class Trial(Trainable):
    """It reports every few seconds; `tasks` in a report says how many have been learnt."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start the experiment, or go on with it where its last commit is."""
        spec = parse_sweep(config["spec"])
        self.values = decode(spec, config["values"])
        self.config_of_run = trial_config(config["base"], self.values, config["output_dir"])
        self.reported = 0
        settings = self.config_of_run.model_dump(mode="json")
        settings["tracking"] |= {"uri": config["tracking_uri"]}
        settings["tracking"]["tags"] |= {"treelora.sweep": spec.name, "treelora.trial": self.config_of_run.name}
        mode = spec.mode or self.config_of_run.treelora.inference
        self.board = Scoreboard(run_folder(self.config_of_run), mode)
        sweep_dir = Path(config["sweep_dir"])
        known = Journal(sweep_dir / "trials.jsonl").latest().get(self.config_of_run.name)
        self.stopped_at = known.tasks if known and known.status == "stopped" else None
        self.child: Child | None = None
        if self.stopped_at is None and not finished_record(self.config_of_run):
            job = {"config": settings, "values": self.values, "parent_run_id": config["parent_run_id"]}
            environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
            self.child = Child(sweep_dir / "jobs" / f"{self.trial_id}.json", job, environment)

    def step(self) -> dict[str, Any]:
        """What there is after the next task, or after a few seconds; scores are those after `tasks` tasks.

        Raises:
            RuntimeError: the experiment failed; its last words.
        """
        end = time.monotonic() + HEARTBEAT_S
        while True:
            code = self.child.poll() if self.child else 0
            judged = self._judged()
            # the last task is told of when the run is closed, so that what counts as done is done
            if self.reported < judged - (code is None and judged == self.board.length()):
                self.reported += 1
                return self._result(done=code == 0 and self.reported == judged)
            if code == 0:
                return self._result(done=True)
            if code is not None:
                assert self.child
                raise RuntimeError(f"{self.config_of_run.name}: {last_words(self.child.log)}")
            if time.monotonic() > end:
                return self._result(done=False)
            time.sleep(POLL_S)

    def cleanup(self) -> None:
        """End the experiment, gently first."""
        if self.child:
            self.child.end(END_S)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing but the count: the run's own commits are the checkpoint."""
        return {"reported": self.reported}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Go on telling after the tasks already told of."""
        self.reported = (checkpoint or {}).get("reported", 0)

    def _judged(self) -> int:
        count = self.board.judged()
        return count if self.stopped_at is None else min(count, self.stopped_at)

    def _result(self, done: bool) -> dict[str, Any]:
        return {**self.board.after(self.reported), "run": self.config_of_run.name, "done": done}
