"""Runs as registered models, in SQLite and on a real MLflow server: what is loaded answers as `treelora predict`."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

from tests.orchestration.test_tracking import Server
from tests.support.registry import COLUMNS, load, prompts_of, routed_run, rows_of, table_of, tracked
from tests.support.streams import TASKS, tiny_config
from treelora.errors import CheckpointError, ConfigError
from treelora.loop import StreamLoop
from treelora_platform import predict
from treelora_platform.model_registry import register_run, requirements
from treelora_platform.predict import PredictOptions
from treelora_platform.predict_io import Prompt
from treelora_platform.tracking import MlflowServer, TrackingError

ADDRESSES = ("sqlite", "server")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StreamLoop]:
    return routed_run(tmp_path_factory.mktemp("learnt"))


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield {"sqlite": f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db", "server": server.uri}
    server.kill()


@pytest.fixture(scope="module")
def models(run: tuple[Path, StreamLoop], addresses: dict[str, str]) -> dict[str, tuple[str, str]]:
    """In either store the run's id and its model's URI."""
    found = {}
    for kind, address in addresses.items():
        run_id = tracked(run[0], address)
        found[kind] = run_id, register_run(run[0], address, run_id, "tiny model", "champion")
    return found


@pytest.fixture(autouse=True)
def fluent_state() -> Iterator[None]:
    """What `load_model` needs is set in these tests only."""
    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


@pytest.mark.parametrize("kind", ADDRESSES)
def test_a_loaded_model_answers_as_the_run_does(
    kind: str, models: dict[str, tuple[str, str]], addresses: dict[str, str], run: tuple[Path, StreamLoop]
) -> None:
    run_dir, loop = run
    model = load(addresses[kind], models[kind][1])
    prompts = prompts_of(loop)
    table = table_of(prompts).set_index(np.arange(len(prompts)) * 7)
    given = {}
    for options in ({}, {"inference": "last"}, {"inference": "merged"}, {"task": TASKS[1]}, {"router_margin": 1e6}, {}):
        found = model.predict(table, params=options)
        assert found.columns.tolist() == COLUMNS
        assert found.index.tolist() == table.index.tolist()
        assert found.to_numpy().tolist() == rows_of(run_dir, prompts, PredictOptions(**options)), options
        given[str(options)] = tuple(found["answer"])
    assert len(set(given.values())) >= 4  # the ways differ, so they can be told
    assert found["task"].notna().all()


def test_choices_come_from_the_row_or_from_the_task(
    models: dict[str, tuple[str, str]], addresses: dict[str, str], run: tuple[Path, StreamLoop]
) -> None:
    run_dir, loop = run
    model = load(addresses["sqlite"], models["sqlite"][1])
    prompts = [Prompt("x", 0, prompt.text) for prompt in prompts_of(loop)[::4]]
    plain = pd.DataFrame({"prompt": [prompt.text for prompt in prompts]})
    expected = rows_of(run_dir, prompts, PredictOptions())
    assert model.predict(plain).to_numpy().tolist() == expected
    mixed = plain.assign(choices=[["up", "down"], None, [], *[None] * (len(prompts) - 3)])
    found = model.predict(mixed)["answer"].tolist()
    assert found[0] in ("up", "down")
    assert found[1] == expected[1][0]
    free = rows_of(run_dir, [Prompt("x", 0, prompts[2].text, ())], PredictOptions())
    assert found[2] == free[0][0] != expected[2][0]
    short = model.predict(mixed, params={"max_new_tokens": 1})["answer"].tolist()
    assert len(short[2]) < len(found[2])


def test_a_scoring_server_gets_json(
    models: dict[str, tuple[str, str]], addresses: dict[str, str], run: tuple[Path, StreamLoop]
) -> None:
    """The function behind MLflow's REST interface, on requests as they come over the wire."""
    model = load(addresses["sqlite"], models["sqlite"][1])
    schema = model.metadata.get_input_schema()

    def ask(**request: Any) -> Any:
        answer = scoring_server.invocations(json.dumps(request), "application/json", model, schema)
        return json.loads(answer.response, parse_constant=pytest.fail)["predictions"]

    record = {"prompt": "red green blue", "choices": ["red", "blue"]}
    [routed] = ask(dataframe_records=[record])
    assert routed["answer"] in record["choices"]
    assert isinstance(routed["margin"], float)
    [last] = ask(dataframe_records=[{"prompt": "one two"}], params={"inference": "last", "max_new_tokens": 2})
    assert (last["task"], last["margin"], last["fallback"]) == (None, None, False)
    for request, message in (
        ({"dataframe_records": [record], "params": {"task": "unknown"}}, "there is no task 'unknown'"),
        ({"dataframe_records": [record], "params": {"inference": "best"}}, "--inference 'best': use last"),
        ({"dataframe_records": [{"prompt": " "}]}, "row 0: `prompt` is ' '"),
        ({"dataframe_records": [record, record | {"choices": ["a", "a"]}]}, "row 1: `choices` repeats 'a'"),
        ({"dataframe_records": [{"text": "no prompt"}]}, r"missing inputs \['prompt'\]"),
    ):
        with pytest.raises(MlflowException, match=message) as refused:
            ask(**request)
        assert refused.value.get_http_status_code() == 400
    assert ask(dataframe_records=[record]) == [routed]  # a refusal leaves nothing behind


@pytest.mark.parametrize("kind", ADDRESSES)
def test_what_the_registry_knows(kind: str, models: dict[str, tuple[str, str]], addresses: dict[str, str]) -> None:
    run_id, uri = models[kind]
    assert uri == "models:/tiny model/1"
    client = MlflowServer(addresses[kind]).client
    version = client.get_model_version_by_alias("tiny model", "champion")
    assert (str(version.version), version.run_id, version.status) == ("1", run_id, "READY")
    tags, metrics = version.tags, client.get_run(run_id).data.metrics
    assert (tags["method"], tags["stream"], tags["inference"], tags["base_model"]) == (
        "treelora", "builtin", "routed", "tiny",
    )  # fmt: skip
    assert (tags["run_id"], tags["commit"]) == (run_id, "00000036-0003-step000000")
    assert tags["op"] == tags["op/routed"] == f"{metrics['final/op/routed']:.2f}"
    assert version.description == (f"treelora on tiny, after {', '.join(TASKS)}, OP {tags['op']} % (routed)")
    run = client.get_run(run_id)
    [output] = run.outputs.model_outputs
    assert client.get_logged_model(output.model_id).status == "READY"
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("kind", ADDRESSES)
def test_what_is_packed(
    kind: str, models: dict[str, tuple[str, str]], addresses: dict[str, str], tmp_path: Path
) -> None:
    mlflow.set_tracking_uri(addresses[kind])
    folder = Path(mlflow.artifacts.download_artifacts(models[kind][1], dst_path=str(tmp_path)))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    packed = {file.removeprefix("artifacts/run/") for file in files if file.startswith("artifacts/run/")}
    adapters = {f"adapters/{i:04d}-{name}/{file}" for i, name in enumerate(TASKS)
                for file in ("adapter_config.json", "adapter_model.safetensors")}  # fmt: skip
    parts = ("adapter.safetensors", "evaluator.safetensors", "memory.safetensors", "manifest.json")
    commit = {f"checkpoints/00000036-0003-step000000/{part}" for part in parts}
    assert packed == {"config.yaml", "run.json", "tasks.json", *adapters, *commit}
    assert {"MLmodel", "pyfunc_model.py", "requirements.txt", "input_example.json"} <= files
    assert not [file for file in files if file.endswith((".pkl", ".pickle", ".pt", ".bin"))]
    assert "inner.example" not in "".join((folder / file).read_text() for file in files if not file.endswith("tensors"))
    assert (folder / "requirements.txt").read_text().split() == requirements()
    assert [line.partition("==")[0] for line in requirements()] == [
        "treelora", "mlflow", "torch", "transformers", "peft",
    ]  # fmt: skip
    assert "+" not in "".join(requirements())
    described = yaml.safe_load((folder / "MLmodel").read_text())
    assert described["signature"]["inputs"].startswith('[{"type": "string", "name": "prompt", "required": true}')
    example = mlflow.pyfunc.load_model(str(folder)).input_example
    assert example["prompt"].tolist() == ["red green blue", "one two three"]
    assert len(mlflow.pyfunc.load_model(str(folder)).predict(example)) == 2


def test_registering_neither_loads_nor_installs_nor_leaves_anything(
    run: tuple[Path, StreamLoop], addresses: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "uv.lock").write_text("version = 1")
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\nversion = '1'")
    monkeypatch.chdir(tmp_path)
    run_id = tracked(run[0], addresses["sqlite"], "untouched")
    before = MlflowServer(addresses["sqlite"]).client.get_run(run_id)
    mlflow.set_tracking_uri("sqlite:///another.db")
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail(f"a process was started: {a} {k}"))
    monkeypatch.setattr(predict, "load_adapted_model", lambda *_: pytest.fail("the base model was loaded"))
    uri = register_run(run[0], addresses["sqlite"], run_id, "untouched")
    assert (mlflow.get_tracking_uri(), mlflow.active_run()) == ("sqlite:///another.db", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pyproject.toml", "uv.lock"]
    client = MlflowServer(addresses["sqlite"]).client
    assert client.get_run(run_id).info.end_time == before.info.end_time
    version = client.get_model_version("untouched", uri.rpartition("/")[2])
    assert not (Path(version.source) / "uv.lock").exists()


def test_a_state_is_registered_once(
    run: tuple[Path, StreamLoop], addresses: dict[str, str], models: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    run_id, uri = models["sqlite"]
    address = addresses["sqlite"]
    client = MlflowServer(address).client
    assert register_run(run[0], address, run_id, "tiny model", "newest") == uri
    assert client.get_model_version_by_alias("tiny model", "newest").version == 1
    earlier = tmp_path / "run"
    shutil.copytree(run[0], earlier)
    newest = sorted((earlier / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)  # an earlier state of the same run is another version
    assert register_run(earlier, address, run_id, "tiny model", "newest") == "models:/tiny model/2"
    assert client.get_model_version_by_alias("tiny model", "newest").version == 2
    assert client.get_model_version_by_alias("tiny model", "champion").version == 1


def test_another_place_for_the_base_model(
    run: tuple[Path, StreamLoop], models: dict[str, tuple[str, str]], addresses: dict[str, str], tmp_path: Path
) -> None:
    """The model names its base and doesn't hold it: who has it elsewhere says where."""
    with pytest.raises(ConfigError, match="nowhere"):
        load(addresses["sqlite"], models["sqlite"][1], base_model=str(tmp_path / "nowhere"))
    model = load(addresses["sqlite"], models["sqlite"][1], base_model="tiny")
    assert len(model.predict(pd.DataFrame({"prompt": ["one two"]}))) == 1


def test_refusals(run: tuple[Path, StreamLoop], addresses: dict[str, str], tmp_path: Path) -> None:
    address = addresses["sqlite"]
    for name in ("a/b", "", "x:y", " x", "o'brien"):
        with pytest.raises(ConfigError, match="model name"):
            register_run(run[0], address, "0" * 32, name)
    for alias in ("v1", "latest", "a b", "1st"):
        with pytest.raises(ConfigError, match="alias"):
            register_run(run[0], address, "0" * 32, "x", alias)
    with pytest.raises(TrackingError, match=r"MLflow at sqlite:.*not found"):
        register_run(run[0], address, "0" * 32, "nothing")
    assert not MlflowServer(address).client.search_registered_models("name = 'nothing'")
    with pytest.raises(TrackingError, match=r"MLflow at http://\*\*\*@127\.0\.0\.1:9: ") as refused:
        register_run(run[0], "http://ada:hunter2@127.0.0.1:9", "0" * 32, "nothing")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ConfigError, match="no run is there"):
        register_run(tmp_path, address, "0" * 32, "nothing")
    config = tiny_config(tmp_path)
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    with pytest.raises(CheckpointError, match="no task is learnt yet"):
        register_run(tmp_path, address, "0" * 32, "nothing")


def test_a_failure_on_the_way_leaves_no_version(
    run: tuple[Path, StreamLoop], addresses: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = addresses["sqlite"]
    run_id = tracked(run[0], address, "broken")
    client = MlflowServer(address).client

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(mlflow.MlflowClient, "log_model_artifacts", full)
    with pytest.raises(TrackingError, match="no space left on device"):
        register_run(run[0], address, run_id, "broken")
    monkeypatch.undo()
    assert not client.search_registered_models("name = 'broken'")
    experiment = client.get_run(run_id).info.experiment_id
    assert [model.status for model in client.search_logged_models([experiment])] == ["FAILED"]
    assert register_run(run[0], address, run_id, "broken") == "models:/broken/1"


def test_no_page_of_log_lines(
    run: tuple[Path, StreamLoop], addresses: dict[str, str], caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    run_id = tracked(run[0], addresses["sqlite"], "quiet")
    capfd.readouterr()
    with caplog.at_level(logging.INFO):
        register_run(run[0], addresses["sqlite"], run_id, "quiet")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
