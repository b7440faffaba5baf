import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.loud import loud_column
from tests.support.run_dir import START_MS, SyntheticRun, finished_run
from treelora.errors import DataError
from treelora_platform.run_tables import (
    STEPS,
    read_config_yaml,
    read_run_json,
    read_scores,
    read_steps,
    read_table,
    read_tasks,
    read_trees,
    steps_parts,
    task_names,
)


@pytest.fixture
def run(tmp_path):
    return SyntheticRun(tmp_path / "run", ["alpha", "beta"])


def test_steps_come_in_order_and_once(run):
    run.write_steps(7, 9)
    run.write_steps(1, 6)
    run.write_steps(5, 8, late_ms=7)  # written again by a resumed run, cut elsewhere
    steps = read_steps(run.path)
    assert steps["global_step"].to_pylist() == list(range(1, 10))
    late = [(t - START_MS) % 1000 for t in steps["time_unix_ms"].to_pylist()]
    assert late == [0, 0, 0, 0, 7, 7, 0, 0, 0]  # of the parts that hold a step the one that begins last
    assert read_steps(run.path, after=7, columns=["loss"]).to_pylist() == [
        {"global_step": 8, "loss": 0.5},
        {"global_step": 9, "loss": 4 / 9},
    ]
    assert read_steps(run.path, after=9).num_rows == 0


def test_half_written_files_are_not_parts(run):
    run.write_steps(1, 3)
    folder = run.path / "tables" / "steps"
    for name in (".00000004-00000006.parquet.tmp", "00000004-00000006.tmp", "x.parquet"):
        (folder / name).write_bytes(b"half")
    assert [(part.first, part.last) for part in steps_parts(run.path)] == [(1, 3)]


def test_a_run_without_tables_is_empty(tmp_path):
    assert read_steps(tmp_path).schema.names == STEPS.names
    assert (read_scores(tmp_path).num_rows, read_tasks(tmp_path).num_rows, read_trees(tmp_path)) == (0, 0, [])
    assert (read_run_json(tmp_path), read_config_yaml(tmp_path), task_names(tmp_path)) == ({}, {}, {})


def test_columns_that_older_runs_lack_are_null(run):
    run.write_steps(1, 2)
    part = steps_parts(run.path)[0].path
    pq.write_table(pq.read_table(part).drop_columns(["arms", "sparsity"]), part)
    assert read_steps(run.path)["arms"].to_pylist() == [None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["loss"]), "has no column 'loss'"),
        (lambda t: t.set_column(5, "loss", pa.array(["a", "b"])), "column 'loss' is string, expected double"),
        (lambda t: t.set_column(5, "loss", pa.array([1.0, None])), "column 'loss' has empty values"),
        (lambda t: t.drop_columns("arms").append_column("arms", pa.array([["a"], []])), "column 'arms' is list"),
    ],
)
def test_wrong_tables_are_named(run, change, message):
    run.write_steps(1, 2)
    part = steps_parts(run.path)[0].path
    pq.write_table(change(pq.read_table(part)), part)
    with pytest.raises(DataError, match=message) as caught:
        read_steps(run.path)
    assert str(part) in str(caught.value)


def test_a_truncated_part_is_named(run):
    run.write_steps(1, 2)
    part = steps_parts(run.path)[0].path
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(DataError, match=part.name):
        read_steps(run.path)


def test_an_extension_type_is_refused_before_a_value_is_read(tmp_path):
    path = tmp_path / "loud.parquet"
    with loud_column() as (loud, ran):
        pq.write_table(pa.table({"task": loud}), path)
        ran.clear()
        with pytest.raises(DataError, match="extension types"):
            read_table(path, pa.schema([pa.field("task", pa.string())]))
        assert ran == []
        pq.read_schema(path)
        assert ran, "the file must be one that would have run code"


def test_names_of_all_tasks(tmp_path):
    run = finished_run(tmp_path / "run", ["alpha", "beta"])
    assert task_names(run.path) == {0: "alpha", 1: "beta"}


def test_trees_in_order_with_parents_and_mean_diameters(tmp_path):
    run = finished_run(tmp_path / "run", ["alpha", "beta", "gamma"])
    layers = {
        "names": ["alpha", "beta"], "left": [1, -1, -1], "right": [2, -1, -1], "task": [-1, 1, 0],
        "delta": [[0.2, 0.6], [0, 0], [0, 0]], "format": 1,
    }  # fmt: skip
    (run.path / "tree" / "0010-delta.json").write_text(json.dumps(layers))
    trees = read_trees(run.path)
    assert [tree.after_index for tree in trees] == [0, 1, 2, 10]
    assert trees[-1].delta == (pytest.approx(0.4), 0.0, 0.0)
    assert trees[-1].parent == (-1, 0, 0)
    assert trees[2].parent == (-1, 0, 0, 2, 2)
    assert sorted(t for t in trees[2].task if t >= 0) == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": [0, -1, -1]}, "must follow it"),
        ({"left": [7, -1, -1]}, "must follow it"),
        ({"left": [2, -1, -1]}, "not every node"),
        ({"left": [-1, -1, -1]}, "must follow it"),
        ({"left": [1, -1]}, "differ in length"),
        ({"task": [-1, 0, 5]}, "leaf 2 is task 5"),
        ({"delta": None}, "is not a tree"),
        ({"names": None}, "is not a tree"),
    ],
)
def test_damaged_trees_are_named(run, change, message):
    plain = {
        "names": ["a", "b"],
        "left": [1, -1, -1],
        "right": [2, -1, -1],
        "task": [-1, 0, 1],
        "delta": [0.3, 0, 0],
    }
    run.write_json("tree/1-beta.json", plain | change)
    with pytest.raises(DataError, match=message):
        read_trees(run.path)


def test_damaged_json_and_yaml_are_named(run):
    (run.path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json: can't be read"):
        read_run_json(run.path)
    (run.path / "config.yaml").write_text("- a list")
    with pytest.raises(DataError, match=r"config\.yaml: holds a list"):
        read_config_yaml(run.path)
    (run.path / "config.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(DataError, match=r"config\.yaml: can't be read"):
        read_config_yaml(run.path)


def test_not_a_number_survives(run):
    row = run.step_row(1) | {"loss": float("nan")}
    pq.write_table(pa.Table.from_pylist([row], schema=STEPS), run.path / "tables/steps/00000001-00000001.parquet")
    assert np.isnan(read_steps(run.path)["loss"].to_numpy()).tolist() == [True]
