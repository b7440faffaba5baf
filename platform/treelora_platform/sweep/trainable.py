"""A trial as Ray Tune sees it: it starts the experiment, tells of each task learnt, and ends what it started."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from treelora_platform.prepare import run_folder
from treelora_platform.run_tables import read_run_json, read_scores, read_tasks
from treelora_platform.study_run import is_complete
from treelora_platform.summary import summarise_mode
from treelora_platform.sweep.journal import Journal
from treelora_platform.sweep.space import decode
from treelora_platform.sweep.spec import parse_sweep, trial_config

POLL_S = 0.3
END_S = 30.0
"""Time for a trial to close its run before it is killed."""
RESOURCES: dict[str, float] = {"CPU": 0, "memory": 1}
"""Of this actor alone: a byte, because Tune wants something. The workers' share is asked for by the trial's own job."""


class Trial(Trainable):
    """An iteration is a task of the stream."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start the experiment, or go on with it where its last commit is."""
        spec = parse_sweep(config["spec"])
        self.values = decode(spec, config["values"])
        self.config_of_run = trial_config(config["base"], self.values, config["output_dir"])
        self.run_dir = run_folder(self.config_of_run)
        self.reported = 0
        settings = self.config_of_run.model_dump(mode="json")
        settings["tracking"] |= {"uri": config["tracking_uri"]}
        settings["tracking"]["tags"] |= {"treelora.sweep": spec.name, "treelora.trial": self.config_of_run.name}
        self.mode = spec.mode or self.config_of_run.treelora.inference
        sweep_dir = Path(config["sweep_dir"])
        known = Journal(sweep_dir / "trials.jsonl").latest().get(self.config_of_run.name)
        self.stopped_at = known.tasks if known and known.status == "stopped" else None
        self.process: subprocess.Popen[bytes] | None = None
        if self.stopped_at is None and not is_complete(self.config_of_run):
            self._start(settings, sweep_dir / "jobs", config["parent_run_id"])

    def _start(self, settings: dict[str, Any], folder: Path, parent_run_id: str | None) -> None:
        import ray

        folder.mkdir(parents=True, exist_ok=True)
        job, self.log = folder / f"{self.trial_id}.json", folder / f"{self.trial_id}.log"
        job.write_text(
            json.dumps(
                {
                    "config": settings,
                    "values": self.values,
                    "parent_run_id": parent_run_id,
                    "parent": os.getpid(),
                }
            ),
            encoding="utf-8",
        )
        environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "treelora_platform.sweep.trial", str(job)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C in a terminal reaches it through us alone
            )

    def step(self) -> dict[str, Any]:
        """Wait for the next task; a score is that after as many tasks as `tasks` says.

        Raises:
            RuntimeError: the experiment failed; its last words.
        """
        while True:
            code = self.process.poll() if self.process else 0
            judged = self._judged()
            # the last task is told of when the run is closed, so that what counts as done is done
            if self.reported < judged - (code is None and judged == self._length()):
                self.reported += 1
                return self._result(done=code == 0 and self.reported == judged)
            if code == 0:
                return self._result(done=True)
            if code is not None:
                raise RuntimeError(f"{self.config_of_run.name}: {last_words(self.log)}")
            time.sleep(POLL_S)

    def cleanup(self) -> None:
        """End the experiment, gently first."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing but the count: the run's own commits are the checkpoint."""
        return {"reported": self.reported}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Go on telling after the tasks already told of."""
        self.reported = (checkpoint or {}).get("reported", 0)

    def _judged(self) -> int:
        count = read_tasks(self.run_dir).num_rows if self.run_dir.exists() else 0
        return count if self.stopped_at is None else min(count, self.stopped_at)

    def _length(self) -> int:
        return len(read_run_json(self.run_dir).get("tasks", ()))

    def _result(self, done: bool) -> dict[str, Any]:
        count = self.reported
        tasks = read_tasks(self.run_dir).slice(0, count).to_pylist()
        scores = read_scores(self.run_dir)
        known = scores.filter([0 <= after < count for after in scores["after_index"].to_pylist()])
        found = summarise_mode(known, self.mode) if known.num_rows else None
        seconds = sum(row["train_seconds"] or 0.0 for row in tasks)
        tokens = sum(row["tokens"] or 0 for row in tasks)
        last = tasks[-1] if tasks else {}
        return {
            "tasks": count,
            "op": _number(found.op if found else None),
            "bwt": _number(found.bwt if found else None),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "stored_bytes": sum(last.get(part) or 0 for part in ("adapter_bytes", "state_bytes", "memory_bytes")),
            "run": self.config_of_run.name,
            "mlflow_run_id": read_run_json(self.run_dir).get("mlflow_run_id") or "",
            "done": done,
        }


def _number(score: float | None) -> float:
    return math.nan if score is None else score


def last_words(log: Path) -> str:
    """The error that a trial ended with."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")]
    return (said[-1].removeprefix("error: ") if said else " / ".join(lines[-3:])) or f"ended without a word ({log})"
