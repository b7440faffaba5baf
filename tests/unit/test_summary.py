import pytest
from rich.console import Console

from tests.support.run_dir import SyntheticRun, finished_run
from treelora.errors import DataError
from treelora_platform.summary import (
    Comparison,
    ModeSummary,
    RunSummary,
    compare,
    format_bytes,
    format_seconds,
    render_comparison,
    summarise,
)


def test_a_finished_run(tmp_path):
    run = finished_run(tmp_path / "run", ["alpha", "beta", "gamma"])
    summary = summarise(run.path)
    # last: column 3 is 70, 80, 90; learnt at 90 each, so (20 + 10 + 0) / 3 forgotten; routed a tenth of that
    assert summary.modes["last"] == ModeSummary(op=80.0, bwt=10.0, fwt=None)
    assert summary.modes["routed"].op == pytest.approx(89.0)
    assert summary.modes["routed"].bwt == pytest.approx(1.0)
    # 18 steps of 0.5 s and 100 tokens; 3 adapters of 1000 bytes and a memory of 300
    assert (summary.seconds, summary.tokens, summary.tokens_per_second) == (9.0, 1800, 200.0)
    assert summary.stored_bytes == 3300
    assert summary.tasks == ("alpha", "beta", "gamma")
    assert (summary.name, summary.method) == ("synthetic", "treelora")


def test_a_run_in_the_middle_of_an_evaluation_counts_complete_columns_only(tmp_path):
    run = SyntheticRun(tmp_path / "run", ["alpha", "beta"])
    run.write_steps(1, 8)
    run.write_scores(0, {"last": [60.0]})
    run.write_scores(1, {"last": [50.0]})  # beta's score is still missing
    assert summarise(run.path).modes["last"] == ModeSummary(60.0, 0.0, None)
    assert summarise(run.path).tasks == ("alpha", "beta")


def test_forward_transfer_needs_scores_before_training(tmp_path):
    run = SyntheticRun(tmp_path / "run", ["alpha", "beta"])
    for task, after, score in [
        (0, -1, 20.0),
        (1, -1, 30.0),
        (0, 0, 80.0),
        (1, 0, 45.0),
        (0, 1, 70.0),
        (1, 1, 90.0),
    ]:
        run.add_score("last", task, after, score)
    # beta before it was learnt: 45 against 30; alpha fell by 10 of two tasks
    assert summarise(run.path).modes["last"] == ModeSummary(op=80.0, bwt=5.0, fwt=15.0)


def test_a_model_that_is_never_trained_has_its_mean_as_op(tmp_path):
    run = SyntheticRun(tmp_path / "run", ["alpha", "beta"], method="frozen")
    run.add_score("last", 0, -1, 20.0)
    run.add_score("last", 1, -1, 40.0)
    assert summarise(run.path).modes["last"] == ModeSummary(op=30.0, bwt=None, fwt=None)


def test_scores_from_before_training_are_none_of_a_model_that_was_trained(tmp_path):
    run = SyntheticRun(tmp_path / "run", ["alpha", "beta"])
    run.write_scores(0, {"merged": [60.0]})
    run.write_scores(1, {"merged": [50.0, 70.0]})
    run.add_score("last", 0, -1, 20.0)
    run.add_score("last", 1, -1, 40.0)
    assert summarise(run.path).modes["merged"].op == 60.0
    assert summarise(run.path).modes["last"] == ModeSummary(op=None, bwt=None, fwt=None)


def test_a_run_scored_at_the_end_only_has_no_bwt(tmp_path):
    run = SyntheticRun(tmp_path / "run", ["alpha", "beta"], method="joint")
    run.write_scores(1, {"last": [60.0, 80.0]})
    assert summarise(run.path).modes["last"] == ModeSummary(op=70.0, bwt=None, fwt=None)


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        summarise(tmp_path)


def test_a_run_that_has_just_begun(tmp_path):
    run = SyntheticRun(tmp_path / "run", ["alpha"])
    assert summarise(run.path) == RunSummary("synthetic", "treelora", {}, 0.0, 0, None, 0, ())


def _summary(name, **modes):
    return RunSummary(name, "m", modes, 1.0, 10, 10.0, 1, ("a",))


def test_the_best_is_the_highest_op_and_the_lowest_bwt():
    rows = compare([_summary("x", last=ModeSummary(70.0, 9.0)), _summary("y", last=ModeSummary(75.0, -1.0))])
    assert rows[0] == Comparison("OP last (%)", ("70.00", "75.00"), "75.00")
    assert rows[1] == Comparison("BWT last (points)", ("9.00", "-1.00"), "-1.00")
    assert rows[2].label == "tasks learnt"


def test_ties_and_lone_scores_have_no_best():
    rows = compare([_summary("x", last=ModeSummary(70.001, None)), _summary("y", last=ModeSummary(70.002, 3.0))])
    assert rows[0].best is None
    assert rows[1] == Comparison("BWT last (points)", ("–", "3.00"), None)


def test_runs_side_by_side_in_the_terminal(tmp_path):
    treelora = finished_run(tmp_path / "a", name="one [bold]", drop=2.0)
    sequential = finished_run(tmp_path / "b", name="two", method="sequential", drop=10.0)
    console = Console(width=120, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    console.print(render_comparison([summarise(treelora.path), summarise(sequential.path)]))
    lines = {
        line.split("│")[1].strip(): line.split("│")[2:4] for line in console.export_text().splitlines() if "│" in line
    }
    assert [cell.strip() for cell in lines["OP last (%)"]] == ["88.00", "80.00"]
    assert [cell.strip() for cell in lines["BWT last (points)"]] == ["2.00", "10.00"]
    assert [cell.strip() for cell in lines["stored"]] == ["3.2 KiB", "3.2 KiB"]
    (tmp_path / "names").write_text(console.export_text())
    with pytest.raises(DataError, match="nothing to compare"):
        render_comparison([])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (59.97, "1 min 00 s"), (60, "1 min 00 s"), (185, "3 min 05 s"),
     (3599.6, "1 h 00 min"), (7620, "2 h 07 min")],
)  # fmt: skip
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**41, "2.0 TiB")],
)
def test_bytes(count, text):
    assert format_bytes(count) == text
