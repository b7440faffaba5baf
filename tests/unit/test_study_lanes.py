"""Lanes: all runs are made, a lane that is killed costs one run, and nothing goes on after an interruption."""

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest
import yaml

from tests.support.study_runs import STUDY, lane_run
from tests.support.waiting import wait_for
from treelora.errors import ConfigError
from treelora_platform.studies.finished import finished, log_of
from treelora_platform.studies.run import missing, run_jobs
from treelora_platform.studies.spec import Bench, Study

HERE = {"engine.kind": "torch", "cluster.workers": 0}
PLAIN = yaml.safe_load(STUDY) | {"overrides": HERE}
PLAIN["variants"] = PLAIN["variants"] | {"ewc": {"method": "ewc"}}


@pytest.fixture
def bench(tmp_path):
    return Bench(Study.model_validate(PLAIN), tmp_path / "runs")


def test_all_are_made_and_each_is_written_down(bench, log, console, tmp_path, capfd):
    jobs = bench.compared(["treelora", "sequential"], {})
    assert run_jobs(jobs, log, console, lane_run, lanes=2) == []
    assert {entry.run for entry in log_of(jobs[0].config).entries()} == {job.config.name for job in jobs}
    assert missing(jobs) == []
    assert "[8/8] " in (tmp_path / "console.txt").read_text()
    assert "Traceback" not in capfd.readouterr().err  # the lanes end quietly


def test_failures_and_killed_lanes_cost_one_run_each(bench, log, console):
    jobs = bench.compared(["ewc", "joint", "treelora"], {})
    failed = run_jobs(jobs, log, console, lane_run, lanes=2)
    assert {job.variant for job in failed} == {"ewc", "joint"}
    said = {job.variant: message for job, message in log.failures(jobs)}
    assert said == {"ewc": "the disk is full", "joint": "the process of its lane was killed"}
    assert [job.variant for job in jobs if finished(job.config)] == ["treelora"] * 4


def test_runs_that_would_start_ray_are_refused(tmp_path, log, console):
    bench = Bench(Study.model_validate(PLAIN | {"overrides": {}}), tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"--lanes 2: treelora, order 1.* asks for 2 Ray workers; give it cluster"):
        run_jobs(bench.compared(["treelora"], {}), log, console, lane_run, lanes=2)


STOPPED = """
    import signal
    import sys
    from pathlib import Path
    from rich.console import Console
    from tests.support.study_runs import lane_run
    from tests.unit.test_study_lanes import PLAIN
    from treelora_platform.studies.run import Log, run_jobs
    from treelora_platform.studies.spec import Bench, Study

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)
        folder = Path(sys.argv[1])
        bench = Bench(Study.model_validate(PLAIN), folder / "runs")
        run_jobs(bench.compared(["sequential"], {}), Log(folder / "log.jsonl"), Console(), lane_run, lanes=2)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_what_is_under_way_stops_with_the_study(tmp_path, how):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "wait").touch()
    (tmp_path / "study.py").write_text(textwrap.dedent(STOPPED))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", "platform"])}
    study = subprocess.Popen(
        [sys.executable, str(tmp_path / "study.py"), str(tmp_path)],
        env=environment,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell starts background jobs
    )
    try:
        wait_for(lambda: len(list((tmp_path / "runs").glob("begun-*"))) == 2, 120, "two lanes")
        lanes = psutil.Process(study.pid).children(recursive=True)
    finally:
        study.send_signal(how)
        study.wait(120)
    _, alive = psutil.wait_procs(lanes, timeout=60)
    assert alive == []
    assert len(list((tmp_path / "runs").glob("stopped-*"))) == 2
    assert len(list((tmp_path / "runs").glob("begun-*"))) == 2  # none was begun after it
