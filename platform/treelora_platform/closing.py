"""The end of a run, good or bad: pictures, report, and MLflow's copy of them."""

from __future__ import annotations

from pathlib import Path

from treelora_platform.config import ExperimentConfig
from treelora_platform.tracking import FinishReport, finish_run
from treelora_platform.tracking_state import Status


def close_run(run_dir: Path, config: ExperimentConfig, run_id: str | None, status: Status) -> FinishReport:
    """Draw what there is to draw, then close the MLflow run."""
    artifacts = [run_dir / "config.yaml", run_dir / "run.json", run_dir / "tables", run_dir / "tree"]
    if (run_dir / "tables" / "scores.parquet").exists():
        from treelora_platform.figures import save_figures
        from treelora_platform.report import write_report

        save_figures(run_dir, run_dir / "figures")
        artifacts += [run_dir / "figures", write_report(run_dir)]
    return finish_run(run_dir, config.tracking.uri, run_id, status, [path for path in artifacts if path.exists()])
