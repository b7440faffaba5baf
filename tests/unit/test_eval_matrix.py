"""The numbers of continual learning against hand-worked values, brute force and algebra."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rich.console import Console

from treelora.errors import DataError
from treelora.evaluation.matrix import (
    BEFORE_TRAINING,
    SCORES_SCHEMA,
    Score,
    backward_transfer,
    baseline_from_table,
    forgetting,
    forward_transfer,
    heat,
    matrix_from_table,
    overall_performance,
    render_matrix,
    scores_table,
    shorten,
    task_names,
)

NAN = float("nan")
HAND = np.array([[80.0, 70.0, 50.0], [NAN, 60.0, 66.0], [NAN, NAN, 90.0]])

matrices = st.integers(1, 6).flatmap(lambda n: arrays(np.float64, (n, n), elements=st.floats(0, 100, width=32)))


def score(mode="last", task="a", after="a", i=0, j=0, value=50.0):
    return Score(mode, task, after, i, j, "accuracy", value, 64, 1.5)


def upper(R):
    return np.where(np.tril(np.ones_like(R), -1) > 0, NAN, R)


def test_hand_worked():
    assert overall_performance(HAND) == pytest.approx((50 + 66 + 90) / 3)
    assert overall_performance(HAND, 2) == pytest.approx((70 + 60) / 2)
    assert overall_performance(HAND, 1) == 80.0
    # Task 0 lost 30, task 1 gained 6, task 2 is new: nothing is clipped.
    assert backward_transfer(HAND) == pytest.approx((30 - 6 + 0) / 3)
    assert backward_transfer(HAND, 2) == pytest.approx(10 / 2)
    assert backward_transfer(HAND, 1) == 0.0
    assert forgetting(HAND) == pytest.approx((30 - 6) / 2)
    assert forgetting(HAND, 2) == 10.0
    assert forgetting(HAND, 1) == 0.0


def test_forgetting_starts_from_the_best_earlier_score_not_from_the_diagonal():
    R = np.array([[50.0, 90.0, 40.0], [NAN, 70.0, 60.0], [NAN, NAN, 10.0]])
    assert forgetting(R) == pytest.approx(((90 - 40) + (70 - 60)) / 2)
    assert backward_transfer(R) == pytest.approx(((50 - 40) + (70 - 60) + 0) / 3)


def test_forward_transfer_by_hand():
    R = np.array([[80.0, 70.0, 50.0], [40.0, 60.0, 66.0], [20.0, 35.0, 90.0]])
    assert forward_transfer(R, [99.0, 30.0, 40.0]) == pytest.approx(((40 - 30) + (35 - 40)) / 2)
    assert forward_transfer(R, [99.0, 30.0, NAN]) == pytest.approx(40 - 30)
    R[1, 0] = NAN
    assert forward_transfer(R, [99.0, 30.0, 40.0]) == pytest.approx(35 - 40)
    assert np.isnan(forward_transfer(HAND, np.zeros(3)))
    assert np.isnan(forward_transfer(np.array([[1.0]]), [0.0]))


@given(matrices)
def test_definitions_by_brute_force(R):
    R = upper(R)
    for n in range(1, len(R) + 1):
        assert overall_performance(R, n) == pytest.approx(sum(R[i][n - 1] for i in range(n)) / n)
        lost = sum(R[i][i] - R[i][n - 1] for i in range(n)) / n
        assert backward_transfer(R, n) == pytest.approx(lost, abs=1e-9)
        if n > 1:
            drops = [max(R[i][j] for j in range(i, n - 1)) - R[i][n - 1] for i in range(n - 1)]
            assert forgetting(R, n) == pytest.approx(sum(drops) / (n - 1), abs=1e-9)


@given(matrices, st.floats(-50, 50))
def test_a_shift_moves_performance_and_leaves_transfer(R, shift):
    moved = R + shift
    assert overall_performance(moved) == pytest.approx(overall_performance(R) + shift, abs=1e-6)
    assert backward_transfer(moved) == pytest.approx(backward_transfer(R), abs=1e-6)
    assert forgetting(moved) == pytest.approx(forgetting(R), abs=1e-6)
    b = np.linspace(0, 10, len(R))
    np.testing.assert_allclose(forward_transfer(moved, b + shift), forward_transfer(R, b), atol=1e-6)


@given(matrices)
def test_what_was_learnt_is_what_is_left_plus_what_was_lost(R):
    assert overall_performance(R) + backward_transfer(R) == pytest.approx(R.diagonal().mean(), abs=1e-9)


@given(matrices)
def test_forgetting_is_at_least_the_drop_from_the_diagonal(R):
    n = len(R)
    if n > 1:
        assert forgetting(R) >= backward_transfer(R) * n / (n - 1) - 1e-9


@given(matrices)
def test_cells_below_the_diagonal_are_not_looked_at(R):
    for number in (overall_performance, backward_transfer, forgetting):
        assert number(R) == number(upper(R))


@pytest.mark.parametrize("number", [overall_performance, backward_transfer, forgetting])
def test_missing_and_impossible_input_is_refused(number):
    R = HAND.copy()
    R[1, 2] = NAN
    with pytest.raises(DataError, match=r"R\[1, 2\]"):
        number(R)
    assert np.isfinite(number(R, 2))
    for n in (0, 4, -1):
        with pytest.raises(DataError, match=f"n is {n}"):
            number(HAND, n)
    with pytest.raises(DataError, match="shape"):
        number(HAND[:2])
    with pytest.raises(DataError, match="shape"):
        number(np.zeros((0, 0)))


def test_missing_diagonal_and_history_are_named():
    R = HAND.copy()
    R[1, 1] = NAN
    with pytest.raises(DataError, match=r"R\[1, 1\]"):
        backward_transfer(R)
    R = HAND.copy()
    R[0, 1] = NAN
    with pytest.raises(DataError, match=r"R\[0, 1\]"):
        forgetting(R)
    with pytest.raises(DataError, match=r"shape \(2,\)"):
        forward_transfer(HAND, [1.0, 2.0])


@given(matrices, st.randoms())
def test_matrix_survives_table_and_parquet_in_any_row_order(R, random):
    R = upper(R)
    n = len(R)
    scores = [score(task=f"t{i}", after=f"t{j}", i=i, j=j, value=R[i, j]) for i in range(n) for j in range(i, n)]
    scores += [score(mode="routed", task="t0", after="t0", value=1.0)]
    scores += [score(task="t0", after="", j=BEFORE_TRAINING, value=12.5)]
    random.shuffle(scores)
    file = io.BytesIO()
    pq.write_table(scores_table(scores), file)
    table = pq.read_table(file)
    assert table.schema.equals(SCORES_SCHEMA)
    np.testing.assert_array_equal(matrix_from_table(table, "last"), R)
    np.testing.assert_array_equal(matrix_from_table(table, "routed"), [[1.0]])
    np.testing.assert_array_equal(baseline_from_table(table, "last"), [12.5] + [NAN] * (n - 1))
    assert task_names(table) == [f"t{i}" for i in range(n)]


def test_an_unfinished_stream_has_the_size_seen_so_far():
    table = scores_table([score(), score(task="b", after="a", i=1, j=0, value=30.0)])
    np.testing.assert_array_equal(matrix_from_table(table, "last"), [[50.0, NAN], [30.0, NAN]])


def test_zero_shot_scores_alone_leave_the_matrix_empty():
    table = scores_table([score(task="b", after="", i=1, j=BEFORE_TRAINING, value=7.0)])
    assert np.isnan(matrix_from_table(table, "last")).all()
    np.testing.assert_array_equal(baseline_from_table(table, "last"), [NAN, 7.0])
    assert task_names(table) == ["task 0", "b"]


def test_bad_tables_are_refused():
    with pytest.raises(DataError, match=r"'merged'; the table has \['last'\]"):
        matrix_from_table(scores_table([score()]), "merged")
    with pytest.raises(DataError, match="measured twice"):
        matrix_from_table(scores_table([score(), score(value=51.0)]), "last")
    for i, j in ((-1, 0), (0, -2)):
        with pytest.raises(DataError, match="count from 0"):
            matrix_from_table(scores_table([score(i=i, j=j)]), "last")
    with pytest.raises(DataError, match="both 'a' and 'b'"):
        task_names(scores_table([score(), score(task="b", j=1)]))


def test_schema_is_tidy_and_an_empty_table_keeps_it():
    table = scores_table([])
    assert table.schema.equals(SCORES_SCHEMA)
    assert [(f.name, f.type) for f in table.schema] == [
        ("mode", pa.string()),
        ("task", pa.string()),
        ("after_task", pa.string()),
        ("task_index", pa.int32()),
        ("after_index", pa.int32()),
        ("metric", pa.string()),
        ("score", pa.float64()),
        ("rows", pa.int32()),
        ("seconds", pa.float64()),
    ]
    assert task_names(table) == []


def test_rendering_shows_scores_names_and_performance():
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(render_matrix(HAND, ["mnli", "a very long name (B)", "cb"]))
    text = console.file.getvalue()
    lines = [line for line in text.splitlines() if "mnli" in line]
    assert lines[-1].split() == ["│", "1", "mnli", "│", "80.0", "│", "70.0", "│", "50.0", "│"]
    assert "2 a very long name (B)" in text
    assert "·" in text
    op = next(line for line in text.splitlines() if "OP" in line)
    assert [w for w in op.split() if w[0].isdigit()] == ["80.0", "65.0", "68.7"]
    with pytest.raises(DataError, match="2 names for 3 tasks"):
        render_matrix(HAND, ["a", "b"])


def test_colours_run_from_red_to_green():
    rgb = [tuple(bytes.fromhex(heat(p)[1:])) for p in (-5, 0, 50, 100, 120)]
    assert rgb[0] == rgb[1] == (240, 90, 90)
    assert rgb[2] == (240, 240, 90)
    assert rgb[3] == rgb[4] == (90, 240, 90)


@given(st.text(max_size=30), st.integers(5, 20))
def test_short_names_fit(name, width):
    short = shorten(name, width)
    assert len(short) <= width
    assert short == name or (len(name) > width and short[-3:] == name[-3:])
