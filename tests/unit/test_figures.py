import numpy as np
import pytest

from tests.support.run_dir import SyntheticRun, finished_run
from treelora_platform.canvas import to_svg
from treelora_platform.figures import (
    arms_figure,
    loss_figure,
    matrix_figure,
    save_figures,
    transfer_figure,
    tree_figure,
)
from treelora_platform.run_tables import read_scores, read_steps, read_trees, task_names


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("figures") / "run", ["alpha", "beta", "gamma"])


def test_the_matrix_is_drawn_as_it_is(run):
    axes = matrix_figure(read_scores(run.path), "last", task_names(run.path)).axes[0]
    drawn = axes.images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(drawn, [[90, 80, 70], [np.nan, 90, 80], [np.nan, np.nan, 90]])
    assert axes.images[0].get_clim() == (0, 100)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["alpha", "beta", "gamma"]


def test_op_and_bwt_over_tasks(run):
    upper, lower = transfer_figure([("", read_scores(run.path))]).axes
    assert upper.lines[0].get_label() == "last"
    np.testing.assert_allclose(upper.lines[0].get_xydata(), [[1, 90], [2, 85], [3, 80]])
    np.testing.assert_allclose(lower.lines[0].get_xydata(), [[1, 0], [2, 5], [3, 10]])


def test_loss_with_task_boundaries(run):
    axes = loss_figure([("", read_steps(run.path))]).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [4 / g for g in range(1, 19)])
    assert [line.get_xdata()[0] for line in axes.lines[2:]] == [6.5, 12.5]


def test_the_moving_mean_stays_within_a_task(tmp_path):
    run = SyntheticRun(tmp_path / "run", ["alpha", "beta"], steps_per_task=16)
    run.write_steps(1, 32)
    smooth = loss_figure([("", read_steps(run.path))]).axes[0].lines[1].get_ydata()
    loss = [4 / g for g in range(1, 33)]
    # a window of three steps: one on each side, two in all where a task begins or ends
    assert smooth[1] == pytest.approx(np.mean(loss[0:3]))
    assert smooth[15] == pytest.approx(np.mean(loss[14:16]))
    assert smooth[16] == pytest.approx(np.mean(loss[16:18]))


def test_arms_are_shares_and_blank_before_a_task_is_learnt(run):
    axes = arms_figure(read_steps(run.path), task_names(run.path)).axes[0]
    drawn = axes.images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(drawn[:, :6], [[1] * 6, [np.nan] * 6])
    np.testing.assert_array_equal(drawn[:, 6:], np.full((2, 6), 0.5))


def test_branches_stand_at_their_diameters(run):
    axes = tree_figure(read_trees(run.path)[2]).axes[0]
    upright = sorted(line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[1])
    assert upright == pytest.approx([0.3, 0.5])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["alpha", "beta", "gamma"]


def test_files(run, tmp_path):
    paths = save_figures(run.path, tmp_path / "figures", formats=("png", "svg"))
    names = {path.name for path in paths}
    assert {
        "matrix-last.png",
        "transfer.svg",
        "loss.png",
        "arms.svg",
        "penalty.png",
        "tree-0002.png",
    } <= names
    assert len(names) == 2 * (2 + 4 + 2)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths if path.suffix == ".png")


def test_text_in_a_page_takes_the_pages_colour(run):
    svg = to_svg(loss_figure([("", read_steps(run.path))]), "loss")
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert 'id="loss-figure_1"' in svg
    assert ">Training loss</text>" in svg
