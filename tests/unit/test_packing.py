"""A packed run answers as the run does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.registry import prompts_of, rows_of
from tests.support.serving import learnt
from tests.support.streams import tiny_config
from treelora.errors import CheckpointError, ConfigError
from treelora_platform.packing import pack_run, shareable
from treelora_platform.predict import PredictOptions


def test_other_methods_and_runs_without_notes_of_their_tasks(tmp_path: Path) -> None:
    """`joint` has no router, `olora` a wider adapter; a run of an earlier version has no tasks.json."""
    for method in ("joint", "olora"):
        config = tiny_config(tmp_path / method, method=method, lora={"dropout": 0.0})
        loop = learnt(config, tmp_path / method / "run")
        (tmp_path / method / "run" / "tasks.json").unlink()
        packed = pack_run(tmp_path / method / "run", tmp_path / method / "packed")
        for inference in (None, "last"):
            options = PredictOptions(inference)
            found = rows_of(packed, prompts_of(loop), options)
            assert found == rows_of(tmp_path / method / "run", prompts_of(loop), options)
        noted = [json.loads(path.read_text()) for path in packed.glob("adapters/*/adapter_config.json")]
        assert {adapter["base_model_name_or_path"] for adapter in noted} == {"tiny"}
        again = pack_run(packed, tmp_path / method / "again")
        assert {p.name: p.read_bytes() for p in again.glob("checkpoints/*/*")} == {
            p.name: p.read_bytes() for p in packed.glob("checkpoints/*/*")
        }
    with pytest.raises(ConfigError, match=r"packed: isn't empty"):
        pack_run(tmp_path / "joint" / "run", tmp_path / "joint" / "packed")
    [described] = (tmp_path / "joint" / "run").glob("adapters/*/adapter_config.json")
    described.unlink()
    with pytest.raises(CheckpointError, match=r"the adapter can't be copied \(.*adapter_config.json"):
        pack_run(tmp_path / "joint" / "run", tmp_path / "joint" / "other")


def test_what_belongs_to_one_machine_or_is_secret_stays_there(tmp_path: Path) -> None:
    stream = {"source": "hf", "path": "s3://ada:hunter2@host/data", "order": ["a"]}
    config = tiny_config(tmp_path, stream=stream, tracking={"uri": "http://host"}, extensions=[stream])
    found = shareable(config)
    assert "hunter2" not in found.as_yaml()
    assert (found.output_dir, found.tracking.uri, found.stream.path) == ("runs", None, "s3://***@host/data")
    assert (found.lora, found.model, found.evaluation) == (config.lora, config.model, config.evaluation)
