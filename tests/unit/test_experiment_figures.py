import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.experiment_runs import FolderHistory, params_of, tags_of
from tests.support.run_dir import finished_run
from treelora.errors import DataError
from treelora.simulation.statistics import Interval
from treelora_platform.experiments.details import CURVE_RUNS, MATRIX_RUNS, Details
from treelora_platform.experiments.figures import (
    GREY,
    Cost,
    Dots,
    Shift,
    cost_figure,
    differences_figure,
    looks,
    matrices_figure,
    mean_curve,
    pareto_front,
    standings_figure,
    stream_figure,
)
from treelora_platform.experiments.importance import Parameter
from treelora_platform.experiments.search_figures import layers_figure, parallel_figure, places, pulls_by_layer
from treelora_platform.run_tables import STEPS


def steps_of(arms_by_task):
    """A steps table: task index -> the arms of each step."""
    rows = [
        dict.fromkeys(STEPS.names) | {"task_index": task, "arms": arms}
        for task, steps in arms_by_task.items()
        for arms in steps
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema([field.with_nullable(True) for field in STEPS]))


def test_pulls_of_each_layer_worked_by_hand():
    table = steps_of({0: [None], 1: [[0, 0], [0, 0]], 2: [[1, 0], [1, 1], [0, 1], [1, 0]]})
    tasks, most, entropy = pulls_by_layer(table)
    assert tasks == [1, 2]
    np.testing.assert_array_equal(most, [[0, 1], [0, 0]])
    # with one past task there is no choice; 3 to 1 is 0.8113 bits of one, 2 to 2 is all of it
    np.testing.assert_allclose(entropy, [[np.nan, 0.811278], [np.nan, 1.0]], atol=1e-6)


def test_a_layer_that_never_pulled_is_empty_and_one_that_settled_has_no_entropy():
    tasks, most, entropy = pulls_by_layer(steps_of({3: [[2], [2, 1]]}))
    assert tasks == [3]
    np.testing.assert_array_equal(most, [[2], [1]])
    np.testing.assert_array_equal(entropy, [[0], [0]])


def test_layers_are_drawn_as_they_are():
    figure = layers_figure(steps_of({1: [[0, 0]], 2: [[1, 0]]}), {0: "alpha", 1: "beta"})
    left, right = figure.axes[:2]
    np.testing.assert_array_equal(left.images[0].get_array(), [[0, 1], [0, 0]])
    assert right.images[0].get_array().mask[:, 0].all()
    assert [label.get_text() for label in left.get_xticklabels()] == ["beta", "task 2"]


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(points)
def test_the_pareto_front_is_what_no_other_dominates(found):
    best = [
        i
        for i, (cost, good) in enumerate(found)
        if not any(c <= cost and g >= good and (c, g) != (cost, good) for c, g in found)
    ]
    front = pareto_front(found)
    assert sorted(front) == best
    assert [found[i][0] for i in front] == sorted(found[i][0] for i in front)


def test_the_front_is_ringed_and_joined():
    costs = {"slow": Cost(((9.0, 50.0),), 9.0, 50.0), "fast": Cost(((1.0, 40.0), (3.0, 44.0)), 2.0, 42.0),
             "bad": Cost(((5.0, 30.0),), 5.0, 30.0)}  # fmt: skip
    axes = cost_figure(costs, looks(["slow", "fast"])).axes[0]
    rings = next(line for line in axes.lines if line.get_label() == "Pareto front")
    np.testing.assert_array_equal(rings.get_xydata(), [[2, 42], [9, 50]])
    assert GREY in [line.get_color() for line in axes.lines]
    assert axes.get_xscale() == "linear"
    assert cost_figure(costs | {"long": Cost((), 90.0, 60.0)}, {}).axes[0].get_xscale() == "log"


def test_curves_are_averaged_over_those_that_are_known():
    at, means = mean_curve([np.array([10.0, np.nan, 40.0]), np.array([20.0, np.nan])])
    assert at == [1, 3]
    assert [mean.value for mean in means] == [15, 40]
    assert (means[0].low, means[0].high) == (10, 20)
    assert math.isnan(means[1].low)
    assert mean_curve([]) == ([], [])


def test_the_stream_shows_means_and_single_runs():
    op = {"one": [np.array([90.0, 80.0]), np.array([70.0, 60.0])]}
    upper, lower = stream_figure(op, {"one": [np.array([0.0, 10.0])]}, looks(["one"])).axes
    np.testing.assert_array_equal(upper.lines[0].get_ydata(), [90, 80])
    np.testing.assert_array_equal(upper.lines[2].get_xydata(), [[1, 80], [2, 70]])
    np.testing.assert_array_equal(lower.lines[0].get_xydata(), [[1, 0], [2, 10]])  # one run is its own mean


def test_dots_and_intervals():
    dots = {"one": Dots((1.0, 3.0), Interval(2.0, 1.0, 3.0)), "none": Dots((), None)}
    left, _ = standings_figure(dots, dots, looks(["one"])).axes
    drawn = [line.get_xydata().tolist() for line in left.lines]
    assert drawn == [[[1, 0], [3, 0]], [[1, 0], [3, 0]], [[2, 0]], []]
    assert [label.get_text() for label in left.get_yticklabels()] == ["one", "none"]


def test_only_what_is_beyond_chance_is_filled():
    shifts = [Shift("a", Interval(2.0, 1.0, 3.0), True), Shift("b", Interval(0.1, -1.0, 1.2), False)]
    left, right = differences_figure(shifts, shifts[1:]).axes
    marks = [line for line in left.lines if line.get_marker() == "o"]
    assert [mark.get_ydata()[0] for mark in marks] == [0, 1]
    assert [mark.get_markerfacecolor() == mark.get_color() for mark in marks] == [True, False]
    assert [line.get_ydata()[0] for line in right.lines if line.get_marker() == "o"] == [1]


def test_equal_values_are_not_magnified():
    dots = {"one": Dots((5.0, 5.0 + 1e-13), Interval(5.0, 5.0, 5.0))}
    low, high = standings_figure(dots, dots, looks(["one"])).axes[0].get_xlim()
    assert (low, high) == pytest.approx((4.5, 5.5))


def test_matrices_are_drawn_as_they_are():
    matrix = np.array([[90.0, 70.0], [np.nan, 80.0]])
    axes = matrices_figure({"one": matrix, "two": matrix - 10}).axes
    np.testing.assert_array_equal(axes[1].images[0].get_array().filled(np.nan), [[80, 60], [np.nan, 70]])
    assert [text.get_text() for text in axes[0].texts] == ["90", "70", "80"]


def test_places_on_an_axis():
    def at(*values):
        return places(Parameter("x", values))

    assert at("1", "2", "5") == [0, 0.25, 1]
    assert at("0.001", "0.01", "0.1") == pytest.approx([0, 0.5, 1])
    assert at("b", "a", "c") == [0.5, 0, 1]
    assert at("4", None, "8") == [0, 1, 0.5]
    assert at("3", "3") == [0.5, 0.5]


def test_a_line_a_run_ends_at_its_score():
    parameters = [Parameter("lora.rank", ("4", "8", "8")), Parameter("seed", ("0", "0", "1"))]
    axes = parallel_figure(parameters, [50.0, 60.0, 70.0], "OP (%)").axes[0]
    runs = [line.get_ydata().tolist() for line in axes.lines if len(line.get_xdata()) == 3]
    assert runs == [[0, 0, 0], [1, 0, 0.5], [1, 1, 1]]
    assert [text.get_text() for text in axes.texts][-5:] == ["50.0", "55.0", "60.0", "65.0", "70.0"]


def test_equal_scores_have_one_mark():
    axes = parallel_figure([Parameter("seed", ("0", "1"))], [50.0, 50.0], "OP (%)").axes[0]
    assert [text.get_text() for text in axes.texts][-1] == "50.0"


@pytest.fixture
def history(tmp_path):
    """Twenty runs of three tasks; number i forgets i points with each task."""
    found = FolderHistory()
    for i in range(20):
        run = finished_run(tmp_path / f"{i}", drop=float(i), name=f"r{i}")
        found.add(run, params_of("treelora", i), tags_of("treelora", i, run.names))
    return found


def test_curves_are_of_so_many_runs(history, tmp_path):
    details = Details(history, tmp_path / "d")
    curves = details.curves(history.records, "bwt", "last")
    assert len(curves) == len(history.asked) == CURVE_RUNS
    np.testing.assert_allclose(curves[10], [0, 5, 10])  # of the tasks 0, 1, 2 are lost 20, 10, 0 points
    assert details.curves(history.records, "op", "merged") == []


def test_matrices_are_means_of_runs_with_the_same_order(history, tmp_path):
    other = finished_run(tmp_path / "other", ("beta", "alpha", "gamma"))
    short = finished_run(tmp_path / "short", ("alpha", "beta"))
    odd = history.add(other, params_of("treelora", 1), tags_of("treelora", 1, other.names))
    stopped = history.add(short, params_of("treelora", 2), tags_of("treelora", 2, ("alpha", "beta", "gamma")))
    found = Details(history, tmp_path / "d").matrices([odd, stopped, *history.records[:10]], ["last", "merged"])
    assert list(found) == ["last"]
    assert found["last"].runs == MATRIX_RUNS - 1
    assert found["last"].tasks == ("alpha", "beta", "gamma")
    # runs 0 to 4 lose 2 points on average
    np.testing.assert_allclose(found["last"].values, [[90, 88, 86], [np.nan, 90, 88], [np.nan, np.nan, 90]])


def test_what_can_not_be_had_is_remarked_on_and_given_up(history, tmp_path):
    history.broken = {record.run_id for record in history.records[:5]}
    details = Details(history, tmp_path / "d")
    assert details.inside(history.records[0]) is None
    inside = details.inside(history.records[9])
    assert (inside.pulled, inside.pushed, len(inside.trees)) == (True, True, 3)
    nothing = replace(inside, steps=steps_of({0: [None], 1: [[]]}))
    assert (nothing.pulled, nothing.pushed) == (False, False)
    assert details.remarks == ["r0: MLflow at http://nowhere: connection refused"]
    assert details.matrices(history.records[:5], ["last"]) == {}
    assert details.remarks[-1] == "3 runs in a row could not be read, so no more were asked for"
    assert len(details.remarks) == 5
    asked = len(history.asked)
    assert details.inside(history.records[9]) is None
    assert len(history.asked) == asked


def test_a_damaged_artifact_is_remarked_on(history, tmp_path):
    (history.folders[history.records[3].run_id] / "tables" / "scores.parquet").write_bytes(b"no table")
    details = Details(history, tmp_path / "d")
    assert details.matrices(history.records[3:4], ["last"]) == {}
    assert "scores.parquet" in details.remarks[0]
    assert details.remarks[0].startswith("r3: ")


def test_a_run_that_does_not_exist(history, tmp_path):
    def gone(run_id, key):
        raise DataError(f"no MLflow run {run_id!r}")

    history.curve = gone
    details = Details(history, tmp_path / "d")
    assert details.curves(history.records[:2], "op", "last") == []
    assert len(details.remarks) == 2
