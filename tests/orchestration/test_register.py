"""Which runs of an experiment are registered, and where their adapters are found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from tests.support.mlflow_runs import add_run, final_metrics, run_tags
from tests.support.registry import load, routed_run, tracked
from tests.support.streams import TASKS
from treelora.errors import DataError
from treelora_platform.experiments.register import RUN_DIR_TAG, register_best, register_folder
from treelora_platform.packing import PACKED, pack_run
from treelora_platform.tracking import MlflowServer
from treelora_platform.tracking_query import History


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return routed_run(tmp_path_factory.mktemp("learnt"))[0]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def fluent_state() -> Iterator[None]:
    """What `load_model` needs is set in these tests only."""
    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


def test_the_folder_of_a_run_says_where_it_is_tracked(run_dir: Path, address: str, tmp_path: Path) -> None:
    copy = tmp_path / "by-folder"
    shutil.copytree(run_dir, copy)
    (copy / "tracking.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match=f"MLflow has no run of it; `treelora track {copy}`"):
        register_folder(copy)
    tracked(copy, address, "by folder")
    assert register_folder(copy, alias="best") == "models:/by-folder/1"
    assert load(address, "models:/by-folder@best").metadata.metadata["method"] == "treelora"


def test_the_best_of_an_experiment(run_dir: Path, address: str, tmp_path: Path) -> None:
    """Three configurations; two whose folders are found: by MLflow's own copy and under the folder of runs."""
    experiment = "choose"
    packed = pack_run(run_dir, tmp_path / "artifacts" / PACKED).parent
    ids = {}
    for rank, op, folder in ((2, 70.0, packed), (4, 80.0, None), (8, 60.0, None)):
        params = {"method": "treelora", "lora.rank": rank}
        ids[rank] = add_run(
            address, experiment, f"r{rank}", params, run_tags("treelora", TASKS), final_metrics(op), folder
        )
    history = History(address)
    runs = tmp_path / "runs"
    copy = runs / "mlartifacts" / ids[4] / "artifacts"  # where MLflow keeps artifacts beside its database
    copy.mkdir(parents=True)
    (copy / "run.json").write_text(json.dumps({"mlflow_run_id": ids[4]}))
    with pytest.raises(DataError, match=rf"run 'r4' \({ids[4]}\): its adapters are neither in MLflow"):
        register_best(history, experiment, 2, runs=runs)
    assert not MlflowServer(address).client.search_registered_models(f"name = '{experiment}'")

    shutil.copytree(run_dir, runs / "sweep" / "trials" / "r4")
    (runs / "sweep" / "trials" / "r4" / "run.json").write_text(json.dumps({"mlflow_run_id": ids[4]}))
    best, found = register_best(history, experiment, 2, runs=runs)
    assert best.run.run_id == ids[4]
    assert [(one.run.run_id, one.value) for one in found] == [(ids[4], 80.0), (ids[2], 70.0)]
    assert [one.uri for one in found] == ["models:/choose/2", "models:/choose/1"]  # the best is the latest
    client = MlflowServer(address).client
    assert client.get_model_version_by_alias("choose", "best").run_id == ids[4]

    far = tmp_path / "far"
    shutil.copytree(run_dir, far)
    (far / "run.json").write_text(json.dumps({"mlflow_run_id": ids[8]}))
    client.set_tag(ids[8], RUN_DIR_TAG, str(far))
    [worst] = register_best(history, experiment, metric="op", filters=("lora.rank=8",), registered_name="w", runs=runs)[
        1
    ]
    assert (worst.uri, worst.run.run_id) == ("models:/w/1", ids[8])
    model = load(address, "models:/choose@best")
    assert model.predict(pd.DataFrame({"prompt": ["one two three"]}))["answer"].iloc[0]
