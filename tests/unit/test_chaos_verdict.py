"""The digest of a run: equal for equal runs, and every difference is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.streams import TASKS, commits, execute, tiny_config
from treelora.errors import CheckpointError
from treelora_platform.chaos.verdict import differences, run_digest, unfinished_files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process, with the record that a driver leaves."""
    folder = tmp_path_factory.mktemp("verdict")
    run_dir = folder / "tiny"
    execute(tiny_config(folder), run_dir)
    (run_dir / "run.json").write_text(json.dumps({"status": "FINISHED"}))
    return run_dir


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_an_equal_run_in_another_folder(whole: Path, copy: Path) -> None:
    expected = run_digest(whole)
    assert expected == run_digest(copy)
    assert differences(expected, run_digest(copy)) == []
    assert expected["status"] == "FINISHED"
    assert expected["steps"] == list(range(1, 13))
    assert expected["last commit"] == commits(whole)[-1].name
    assert expected["adapters on disk"] == [f"000{i}-{name}" for i, name in enumerate(TASKS)]
    assert expected[f"SHA-256 of 0002-{TASKS[2]}"] == expected_sha(whole, f"adapters/0002-{TASKS[2]}")
    assert {what for what in expected if what.startswith("SHA")} >= {
        "SHA-256 of adapter.safetensors", "SHA-256 of memory.safetensors", "SHA-256 of evaluator.safetensors"
    }  # fmt: skip
    assert json.loads(expected[f"tree 0002-{TASKS[2]}"])["names"] == list(TASKS)
    assert len([what for what in expected if what.startswith("score ")]) == 3 * (1 + 2 + 3)


def expected_sha(run_dir: Path, folder: str) -> str:
    import hashlib

    return hashlib.sha256((run_dir / folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_times_may_differ(whole: Path, copy: Path) -> None:
    for path in [*(copy / "tables" / "steps").glob("*.parquet"), copy / "tables" / "scores.parquet"]:
        table = pq.read_table(path)
        for name in {"time_unix_ms", "step_seconds", "data_seconds", "peak_memory_mb", "seconds"} & set(
            table.column_names
        ):
            number = table.column_names.index(name)
            zeros = pa.array([0] * table.num_rows, table.schema.field(name).type)
            table = table.set_column(number, table.schema.field(name), zeros)
        pq.write_table(table, path)
    assert differences(run_digest(whole), run_digest(copy)) == []


def change(path: Path, column: str, row: int, value: object) -> None:
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[row] = value
    field = table.schema.field(column)
    pq.write_table(table.set_column(table.column_names.index(column), field, pa.array(values, field.type)), path)


def test_one_bit_of_a_loss(whole: Path, copy: Path) -> None:
    [part] = [path for path in (copy / "tables" / "steps").glob("*.parquet") if path.name.startswith("000000005-")]
    before = pq.read_table(part)["loss"][0].as_py()
    change(part, "loss", 0, before * (1 + 2**-52))
    [line] = differences(run_digest(whole), run_digest(copy))
    assert line.startswith("step 5: loss: ")
    assert line.endswith(f", not {before!r}")


def test_a_score(whole: Path, copy: Path) -> None:
    change(copy / "tables" / "scores.parquet", "score", 0, 12.5)
    [line] = differences(run_digest(whole), run_digest(copy))
    assert line.startswith(f"score last of {TASKS[0]} after {TASKS[0]}: (12.5,")


def test_a_step_that_is_missing(whole: Path, copy: Path) -> None:
    for path in (copy / "tables" / "steps").glob("*-000000005.parquet"):
        path.unlink()
    assert differences(run_digest(whole), run_digest(copy)) == [
        "steps: too many [], missing ['5']",
        "step 5: is missing",
    ]


def test_a_tree_and_a_status(whole: Path, copy: Path) -> None:
    (copy / "tree" / f"0001-{TASKS[1]}.json").unlink()
    (copy / "run.json").write_text(json.dumps({"status": "RUNNING"}))
    lines = differences(run_digest(whole), run_digest(copy))
    assert lines == ["status: 'RUNNING', not 'FINISHED'", f"tree 0001-{TASKS[1]}: is missing"]
    assert f"tree 0001-{TASKS[1]}: should not be there" in differences(run_digest(copy), run_digest(whole))


def test_a_report_that_was_not_written(whole: Path, copy: Path) -> None:
    (copy / "report.html").touch()
    [line] = differences(run_digest(copy), run_digest(whole))
    assert line == "report and figures: too many [], missing ['report.html']"


def test_an_altered_adapter_is_no_finished_run(copy: Path) -> None:
    path = copy / "adapters" / f"0000-{TASKS[0]}" / "adapter_model.safetensors"
    altered = bytearray(path.read_bytes())
    altered[-1] ^= 1
    path.write_bytes(altered)
    with pytest.raises(CheckpointError, match="differs from the checksum"):
        run_digest(copy)


def test_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no commit"):
        run_digest(tmp_path)


def test_another_seed_differs_in_nearly_all(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "tiny"
    execute(tiny_config(tmp_path, seed=1), run_dir)
    lines = differences(run_digest(whole), run_digest(run_dir))
    assert {f"step {n}" for n in range(1, 13)} <= {line.split(":")[0] for line in lines}
    assert any(line.startswith("SHA-256 of memory.safetensors: ") for line in lines)


def test_mappings_are_told_key_by_key() -> None:
    before = {"MLflow points of loss by step": {1: 1, 2: 1, 3: 1, 4: 1, 5: 1}}
    after = {"MLflow points of loss by step": {1: 2, 2: 2, 3: 2, 4: 2, 6: 1}}
    [line] = differences(before, after)
    assert line == "MLflow points of loss by step: 1: 2, not 1, 2: 2, not 1, 3: 2, not 1 and 3 more"


def test_unfinished_files(copy: Path) -> None:
    assert unfinished_files(copy) == []
    (copy / ".lock").touch()
    (copy / "tables" / "steps" / "000000001-000000002.tmp").touch()
    (copy / "checkpoints" / ".writing-x").mkdir()
    assert unfinished_files(copy) == ["checkpoints/.writing-x", "tables/steps/000000001-000000002.tmp"]
