"""`treelora simulate` through its command line, at tiny sizes."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from treelora.simulation.regret import VARIANTS, RegretCell, simulate_regret
from treelora.simulation.smooth_bandit import SmoothProblem
from treelora.simulation.storage import StorageSettings, adapter_bytes, simulate_storage
from treelora_platform.cli import app
from treelora_platform.simulate_figures import regret_figure, storage_figure

COLUMNS = {
    "regret": ["arms", "variant", "exploration", "slack", "run", "step", "regret", "tried"],
    "recovery": [
        "scenario", "run", "tree", "tasks", "labeling", "vocabulary_length", "rand_index", "purity", "p_value",
    ],
    "sketch": [
        "run", "sketch_size", "l2_error", "l1_ratio", "l2_ratio", "l1_error", "layer_ranking", "ranking",
        "layer_nearest", "nearest", "shard_difference", "bytes_task",
    ],
    "storage": [
        "run", "tasks", "arms", "sketch_bytes", "tree_bytes", "bandit_bytes", "other_bytes", "depth", "begin_ms",
        "step_p50_ms", "step_p99_ms", "end_p50_ms", "end_max_ms", "arm_purity",
    ],
}  # fmt: skip
SIZES = {
    "regret": "--runs 3 --steps 20 --arms 4 --arms 8 --exploration 0.5 --slack 1 --slack 2",
    "recovery": "--runs 1 --permutations 1 --layers 2 --sketch-size 8",
    "sketch": "--runs 2 --tasks 4 --layer 64 --layer 32 --size 8 --size 16",
    "storage": "--tasks 6 --layers 2 --sketch-size 8 --steps 3 --budget 4 --runs 2",
}


def simulate(name, folder, *more):
    return CliRunner().invoke(app, ["simulate", name, *SIZES[name].split(), "--out", str(folder), *more])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulations")
    return folder, {name: simulate(name, folder / name) for name in SIZES}


@pytest.mark.parametrize("name", list(SIZES))
def test_writes_a_table_and_a_figure_and_says_where(results, name):
    folder, outcomes = results
    assert outcomes[name].exit_code == 0, outcomes[name].output
    table = pq.read_table(folder / name / f"{name}.parquet")
    assert table.column_names == COLUMNS[name]
    assert (folder / name / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    shown = outcomes[name].output.replace("\n", "")
    assert f"{name}.parquet" in shown
    assert f"{name}.png" in shown
    assert not [path.name for path in (folder / name).iterdir() if path.name.startswith(".")]


def test_the_regret_table_holds_what_was_simulated(results):
    rows = pq.read_table(results[0] / "regret" / "regret.parquet").to_pylist()
    assert {(row["variant"], row["arms"]) for row in rows} == {(name, n) for name in VARIANTS for n in (4, 8)}
    mine = [r for r in rows if (r["variant"], r["arms"], r["run"], r["slack"]) == ("tree", 8, 2, 1.0)]
    expected = simulate_regret(RegretCell(8, "tree", 0.5, 1.0), SmoothProblem(), 20, 3)
    assert [row["step"] for row in mine] == list(range(1, 21))
    assert [row["regret"] for row in mine] == expected.regret[:, 2].tolist()
    growth = pq.read_table(results[0] / "regret" / "regret-growth.parquet").to_pylist()
    assert [row["variant"] for row in growth] == list(VARIANTS)
    assert all(row["exponent_low"] <= row["exponent"] <= row["exponent_high"] for row in growth)


def test_storage_counts_both_runs_and_keeps_to_the_budget(results):
    rows = pq.read_table(results[0] / "storage" / "storage.parquet").to_pylist()
    assert [(row["run"], row["tasks"], row["arms"]) for row in rows] == [
        (run, n, min(n, 4)) for run in (0, 1) for n in range(1, 7)
    ]


@pytest.mark.parametrize("name", ["regret", "recovery", "sketch"])
def test_the_same_seed_writes_the_same_bytes(results, tmp_path, name):
    again, other = (simulate(name, tmp_path / seed, "--seed", seed) for seed in ("0", "1"))
    assert again.exit_code == other.exit_code == 0
    file = f"{name}.parquet"
    first = (results[0] / name / file).read_bytes()
    assert (tmp_path / "0" / file).read_bytes() == first
    assert (tmp_path / "1" / file).read_bytes() != first


def test_a_mistake_is_one_message(tmp_path):
    outcome = CliRunner().invoke(app, ["simulate", "regret", "--arms", "12", "--out", str(tmp_path / "x")])
    assert outcome.exit_code == 2
    assert "arms = 12: must be a power of two" in outcome.output
    assert not (tmp_path / "x").exists()


def test_the_regret_figure_draws_means():
    cells = [RegretCell(n, "tree", c, 1.0) for n in (4, 8) for c in (0.5, 1.0)]
    found = {cell: simulate_regret(cell, SmoothProblem(), 30, 5) for cell in cells}
    over_size, over_time, over_c, over_slack = regret_figure(found, 0.5).axes
    means = [found[RegretCell(n, "tree", 0.5, 1.0)].regret[-1].mean() for n in (4, 8)]
    np.testing.assert_allclose(over_size.lines[0].get_xydata(), [[4, means[0]], [8, means[1]]])
    np.testing.assert_allclose(over_time.lines[0].get_ydata(), found[cells[2]].regret.mean(axis=1))
    np.testing.assert_allclose(over_c.lines[0].get_xydata()[1], [1.0, found[cells[3]].regret[-1].mean()])
    assert [line.get_label() for line in over_slack.lines] == ["4 arms", "8 arms"]


def test_the_storage_figure_counts_adapters_of_arms():
    points = list(simulate_storage(StorageSettings(tasks=6, layers=2, sketch_size=8, budget=3, steps=3)))
    total = storage_figure(points, adapter_bytes(), 3).axes[1]
    np.testing.assert_allclose(total.lines[1].get_ydata(), np.array([1, 2, 3, 3, 3, 3]) * 1843200 / 2**20)
    assert total.get_title(loc="left") == "Stored in all, at most 3 arms"
