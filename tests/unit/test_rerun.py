"""A rerun against its original: what is equal, what is not, and what is said about it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.support.mlflow_runs import add_run, final_metrics, run_tags
from tests.support.run_dir import SyntheticRun, finished_run
from tests.support.streams import tiny_config
from treelora.errors import ConfigError, DataError
from treelora_platform.config import ExperimentConfig
from treelora_platform.experiments import rerun as module
from treelora_platform.experiments.best import RERUN_TAG
from treelora_platform.experiments.rerun import RerunOutcome, again, changes, check_data, rerun, show_rerun
from treelora_platform.experiments.rerun_compare import compare_runs
from treelora_platform.prepare import prepare_stream
from treelora_platform.run import Outcome
from treelora_platform.tracking_query import History

Change = Callable[[Path], None]


def nowhere() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A run of three tasks, 18 steps, and its copy."""
    finished_run(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    return tmp_path / "one", tmp_path / "two"


def change_column(path: Path, column: str, edit: Callable[[list[Any]], None]) -> None:
    table = pq.read_table(path)
    values = table[column].to_pylist()
    edit(values)
    place = table.column_names.index(column)
    pq.write_table(
        table.set_column(place, table.schema.field(column), pa.array(values, table.schema.types[place])), path
    )


def test_a_copy_is_equal(pair: tuple[Path, Path]) -> None:
    equality = compare_runs(*pair)
    assert (equality.differences, equality.notes) == ((), ())
    # two modes, 1 + 2 + 3 cells each; six steps a task, and arms from the second on; a tree a task
    assert equality.compared == {"scores": 12, "losses": 18, "arms": 12, "trees": 3}


def test_the_last_bit_of_a_score_counts(pair: tuple[Path, Path]) -> None:
    def nudge(values: list[float]) -> None:
        assert values[0] == 90.0
        values[0] = 90.00000000000001

    change_column(pair[1] / "tables/scores.parquet", "score", nudge)
    [line] = compare_runs(*pair).differences
    assert line.startswith("scores: 1 of 12 differ, at most by 1.421e-14 points (last, alpha after alpha: 90 -> 90)")


def test_the_largest_difference_is_told(pair: tuple[Path, Path]) -> None:
    def change(values: list[float]) -> None:
        values[0] += 1
        values[-1] -= 4  # routed, gamma after gamma: 90 -> 86

    change_column(pair[1] / "tables/scores.parquet", "score", change)
    [line] = compare_runs(*pair).differences
    assert line == "scores: 2 of 12 differ, at most by 4 points (routed, gamma after gamma: 90 -> 86)"


def test_losses_step_by_step(pair: tuple[Path, Path]) -> None:
    """Of the part of the steps 7 to 9 the second and third change, by 0.25 and 0.125."""

    def change(values: list[float]) -> None:
        values[1] += 0.25
        values[2] -= 0.125

    [part] = (pair[1] / "tables/steps").glob("00000007-*.parquet")
    change_column(part, "loss", change)
    assert compare_runs(*pair).differences == ("losses: 2 of 18 differ, at most by 0.25 (step 8), the first at step 8",)


def test_a_loss_that_became_nan_differs_and_one_that_stayed_nan_does_not(pair: tuple[Path, Path]) -> None:
    [part] = (pair[1] / "tables/steps").glob("00000001-*.parquet")
    change_column(part, "loss", lambda values: values.__setitem__(0, float("nan")))
    assert compare_runs(*pair).differences == ("losses: 1 of 18 differ, at most by inf (step 1), the first at step 1",)
    shutil.copy(part, pair[0] / "tables/steps" / part.name)
    assert compare_runs(*pair).differences == ()


def test_arms_and_trees(pair: tuple[Path, Path]) -> None:
    [part] = (pair[1] / "tables/steps").glob("00000013-*.parquet")
    change_column(part, "arms", lambda values: values.__setitem__(2, [0, 0, 0, 0]))
    path = pair[1] / "tree/2-task-2.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"delta": [value and value + 0.5 for value in tree["delta"]]}))
    assert compare_runs(*pair).differences == (
        "arms: 1 of 12 differ, the first at step 15",
        "trees: 1 of 3 differ, the first after gamma: the same shape, diameters differ at most by 0.5",
    )
    path.write_text(json.dumps(tree | {"task": [*tree["task"][:-2], *reversed(tree["task"][-2:])]}))
    assert compare_runs(*pair).differences[1] == "trees: 1 of 3 differ, the first after gamma: another shape"


def test_what_is_missing_differs_and_what_is_more_is_noted(pair: tuple[Path, Path]) -> None:
    scores = pair[0] / "tables/scores.parquet"
    table = pq.read_table(scores)
    pq.write_table(table.filter(pc.less(table["after_index"], 2)), scores)  # stopped after two tasks
    forth = compare_runs(*pair)
    assert (forth.differences, forth.compared["scores"]) == ((), 6)
    assert forth.notes == ("scores: 6 more now, which the run had not or MLflow has not",)
    assert compare_runs(pair[1], pair[0]).differences == ("scores: 6 of 12 are missing now",)


def test_the_same_experiment_in_a_place_of_its_own(tmp_path: Path) -> None:
    tracking = {"uri": "http://far", "experiment": "sweep", "tags": {"team": "x"}}
    config = tiny_config(tmp_path / "far", name="n" * 98, tracking=tracking, cluster={"workers": 1})
    found = again(config, "sqlite:///here.db", "abc")
    assert found.digest() == config.digest()
    assert (found.name, found.output_dir) == ("n" * 94 + "-rerun", "runs")
    assert (found.tracking.uri, found.tracking.experiment) == ("sqlite:///here.db", "sweep-rerun")
    assert found.tracking.tags == {"team": "x", RERUN_TAG: "abc"}
    assert again(found, "sqlite:///here.db", "def").tracking.experiment == "sweep-rerun"
    other = again(config, "x", "abc", str(tmp_path), "mine", ["train.learning_rate=1e-4", "seed=3"])
    assert (other.name, other.output_dir) == ("mine", str(tmp_path))
    assert (other.train.learning_rate, other.train.steps, other.seed) == (1e-4, 4, 3)
    with pytest.raises(ConfigError, match=r"rerun of abc: train\.stepz: no such key"):
        again(config, "x", "abc", overrides=["train.stepz=3"])


def test_data_that_is_gone_or_changed_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    known = prepare_stream(config).fingerprint()
    out = io.StringIO()
    for part in (known, known[:16]):  # the tag has the beginning only
        check_data(config, "abc", part, Console(file=out, width=200))
    assert out.getvalue().count(f"data: what run abc learnt (SHA-256 {known[:12]})") == 2
    with pytest.raises(DataError, match=rf"isn't what run abc learnt \(SHA-256 ffff there, {known[:12]} here\)"):
        check_data(config, "abc", "ffff", nowhere())
    gone = tiny_config(tmp_path, stream={"source": "parquet", "path": str(tmp_path / "gone")})
    with pytest.raises(DataError, match=r"the data of run abc isn't here: .*gone"):
        check_data(gone, "abc", known, nowhere())


def test_circumstances(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    then = {"versions": {"torch": "2.9", "commit": "a", "ray": "2"}, "config_hash": config.digest()}
    now = {"versions": {"torch": "2.13", "commit": "a", "hardware": "2 x arm"}}
    same = again(config, "x", "abc")
    assert changes(then, {"versions": then["versions"]}, config, same) == []
    assert changes(then, now, config, again(config, "x", "abc", overrides=["cluster.cpus_per_worker=2"])) == [
        "torch: 2.9 -> 2.13",
        "ray: 2 -> unknown",
        "hardware: unknown -> 2 x arm",
        "cluster.cpus_per_worker: 1.0 -> 2.0",
    ]
    assert changes({"config_hash": "of an earlier version"}, {}, config, same) == [
        "configuration: it has fields now that it hadn't then, with their defaults"
    ]


def test_the_verdict(pair: tuple[Path, Path]) -> None:
    def shown(circumstances: tuple[str, ...]) -> str:
        out = io.StringIO()
        outcome = RerunOutcome("abc", pair[1], "def", compare_runs(*pair), circumstances)
        show_rerun(outcome, Console(file=out, width=300))
        return f"{outcome.verdict}\n{out.getvalue()}"

    assert shown(()) == f"equal\nequal: {pair[1]} against abc (12 scores, 18 losses, 12 arms, 3 trees)\n"
    assert shown(("torch: 1 -> 2",)).endswith("not as it was then:\n  torch: 1 -> 2\n")
    change_column(pair[1] / "tables/scores.parquet", "score", lambda values: values.__setitem__(0, 1.0))
    different = shown(("torch: 1 -> 2",)).splitlines()
    assert different[0] == "different"
    assert different[2:] == [
        "  scores: 1 of 12 differ, at most by 89 points (last, alpha after alpha: 90 -> 1)",
        "that may come from:",
        "  torch: 1 -> 2",
    ]
    assert "versions, hardware and configuration are the same" in shown(())


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def tracked(folder: Path, database: str, config: ExperimentConfig, data_hash: str, **options: Any) -> str:
    """A made-up run's artifacts and parameters in MLflow."""
    finished_run(folder)
    (folder / "config.yaml").write_text(config.as_yaml())
    (folder / "run.json").write_text(json.dumps({"data_hash": data_hash, "config_hash": config.digest()}))
    tags = run_tags("treelora", config.stream.order)
    return add_run(database, "exp", config.name, {}, tags, final_metrics(80.0), folder, **options)


def test_everything_comes_from_mlflow(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rerun itself is made up here: a run with the same numbers, or with one more point of BWT."""
    config = tiny_config(tmp_path / "far", name="first")
    run_id = tracked(tmp_path / "first", database, config, prepare_stream(config).fingerprint())
    shutil.rmtree(tmp_path / "first")
    asked: list[ExperimentConfig] = []

    def made_up(config: ExperimentConfig, console: Console) -> Outcome:
        asked.append(config)
        return Outcome(finished_run(tmp_path / config.name, drop=10.0 if len(asked) == 1 else 11.0).path, "def")

    monkeypatch.setattr(module, "run_experiment", made_up)
    history = History(database)
    same = rerun(history, run_id, nowhere(), output_dir=str(tmp_path / "here"))
    assert (same.verdict, same.original, same.mlflow_run_id) == ("equal", run_id, "def")
    assert asked[0].digest() == config.digest()
    assert (asked[0].name, asked[0].tracking.uri) == ("first-rerun", database)
    other = rerun(history, run_id, nowhere(), output_dir=str(tmp_path / "here"), name="other")
    assert other.verdict == "different"
    assert other.equality.differences[0].startswith(
        "scores: 6 of 12 differ, at most by 2 points (last, alpha after gam"
    )


def test_runs_that_cannot_be_made_again(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run_experiment", lambda *_: pytest.fail("it was started"))
    history = History(database)
    config = tiny_config(tmp_path / "far", name="changed")
    run_id = tracked(tmp_path / "changed", database, config, "f" * 64)
    with pytest.raises(DataError, match=f"isn't what run {run_id} learnt"):
        rerun(history, run_id, nowhere(), output_dir=str(tmp_path / "here"))
    bare = SyntheticRun(tmp_path / "bare", ["alpha"])
    no_scores = add_run(database, "exp", "bare", {}, {}, {}, bare.path, status="FAILED")
    with pytest.raises(DataError, match=rf"run {no_scores} \(FAILED\) has no tables/scores.parquet in MLflow"):
        rerun(history, no_scores, nowhere())
    sweep = add_run(database, "exp", "sweep", {}, {"treelora.kind": "sweep"})
    with pytest.raises(DataError, match="is a sweep; name one of its trials"):
        rerun(history, sweep, nowhere())
    with pytest.raises(DataError, match="no MLflow run"):
        rerun(history, "0" * 32, nowhere())
