"""What a run that is still going on can be judged by, read again only where its files have changed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa

from treelora_platform.run_tables import read_run_json, read_scores, read_tasks
from treelora_platform.summary import summarise_mode


class Scoreboard:
    """The scores of one run after each of its tasks, by one way of inference."""

    def __init__(self, run_dir: Path, mode: str):
        self.run_dir, self.mode = run_dir, mode
        self._seen: int | None = None
        self._tasks: list[dict[str, Any]] = []
        self._judged = 0
        self._length = 0
        self._last: tuple[int, dict[str, Any]] | None = None

    def judged(self) -> int:
        """Tasks that were learnt and scored so far."""
        self._look()
        return self._judged

    def length(self) -> int:
        """Tasks of the stream; 0 while the run hasn't begun."""
        self._look()
        return self._length

    def after(self, count: int) -> dict[str, Any]:
        """Objectives and the like after so many tasks; OP and BWT are NaN where not measured."""
        if self._last is None or self._last[0] != count:
            self._last = (count, self._measure(count))
        return self._last[1]

    def _look(self) -> None:
        path = self.run_dir / "tables" / "tasks.parquet"
        changed = path.stat().st_mtime_ns if path.exists() else None
        if changed != self._seen:
            self._seen, self._last = changed, None
            self._tasks = read_tasks(self.run_dir).to_pylist()
            after = read_scores(self.run_dir)["after_index"].to_pylist() if self._tasks else []
            self._judged = max([len(self._tasks), *(index + 1 for index in after)])  # `joint` learns all tasks as one
            self._length = len(read_run_json(self.run_dir).get("tasks", ()))

    def _measure(self, count: int) -> dict[str, Any]:
        self._look()
        tasks, scores = self._tasks[:count], read_scores(self.run_dir)
        known = scores.filter(pa.array([0 <= after < count for after in scores["after_index"].to_pylist()], pa.bool_()))
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
            "mlflow_run_id": read_run_json(self.run_dir).get("mlflow_run_id") or "",
        }


def _number(score: float | None) -> float:
    return math.nan if score is None else score
