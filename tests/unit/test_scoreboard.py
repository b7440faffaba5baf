"""What a trial is judged by after each task, worked out by hand."""

import math
import os

from tests.support.run_dir import SyntheticRun
from treelora_platform.sweep.scoreboard import Scoreboard

NAMES = ["alpha", "beta"]


def begun(tmp_path):
    run = SyntheticRun(tmp_path / "run", NAMES)
    run.write_json("run.json", {"tasks": NAMES, "mlflow_run_id": "abc"})
    return run


def test_a_run_that_has_not_begun(tmp_path):
    board = Scoreboard(tmp_path / "none", "last")
    assert (board.judged(), board.length()) == (0, 0)
    found = board.after(0)
    assert math.isnan(found["op"])
    assert math.isnan(found["bwt"])
    assert (found["tasks"], found["seconds"], found["tokens_per_second"], found["stored_bytes"]) == (0, 0.0, 0.0, 0)


def test_each_task_counts_once_it_is_learnt(tmp_path):
    run = begun(tmp_path)
    board = Scoreboard(run.path, "last")
    run.write_scores(0, {"last": [80.0]})
    run.write_tasks(1)
    assert (board.judged(), board.length()) == (1, 2)
    first = board.after(1)
    assert (first["op"], first["mlflow_run_id"]) == (80.0, "abc")
    assert (first["seconds"], first["tokens_per_second"], first["stored_bytes"]) == (3.0, 200.0, 1100)

    run.write_scores(1, {"last": [60.0, 90.0]})
    run.write_tasks(2)
    os.utime(run.path / "tables" / "tasks.parquet", ns=(1, 1))  # the clock may be too coarse to tell two writes apart
    assert board.judged() == 2
    second = board.after(2)
    assert (second["op"], second["bwt"], second["tasks"]) == (75.0, 10.0, 2)  # 20 points lost on the first of two tasks
    assert (second["seconds"], second["stored_bytes"]) == (6.0, 2200)
    assert board.after(1) == first


def test_tasks_that_are_learnt_as_one_are_all_learnt(tmp_path):
    """`joint` has a row in the table of tasks, and a score for each."""
    run = begun(tmp_path)
    run.write_scores(1, {"last": [70.0, 90.0]})
    run.write_tasks(1)
    board = Scoreboard(run.path, "last")
    assert (board.judged(), board.length()) == (2, 2)
    found = board.after(2)
    assert (found["op"], found["tasks"], found["seconds"]) == (80.0, 2, 3.0)
    assert math.isnan(found["bwt"])
