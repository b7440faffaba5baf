"""The end of a run, good or bad: pictures, report, and MLflow's copy of them."""

from __future__ import annotations

import logging
from pathlib import Path

from treelora.errors import DataError
from treelora_platform.config import ExperimentConfig
from treelora_platform.tracking import FinishReport, finish_run
from treelora_platform.tracking_state import Status

log = logging.getLogger(__name__)


def close_run(run_dir: Path, config: ExperimentConfig, run_id: str | None, status: Status) -> FinishReport:
    """Draw what there is to draw, then close the MLflow run."""
    artifacts = [run_dir / name for name in ("config.yaml", "run.json", "tables", "tree", "figures", "report.html")]
    if (run_dir / "tables" / "scores.parquet").exists():
        from treelora_platform.figures import save_figures
        from treelora_platform.report import write_report

        try:
            save_figures(run_dir)
            write_report(run_dir)
        except DataError as error:  # a damaged table must not keep the MLflow run open
            log.warning("no report of %s: %s", run_dir, error)
    return finish_run(run_dir, config.tracking.uri, run_id, status, [path for path in artifacts if path.exists()])
