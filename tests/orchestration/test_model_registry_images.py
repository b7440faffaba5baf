"""A run on images as a registered model: it takes encoded images, over the wire too, and never a path."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

from tests.support.image_streams import image_config
from tests.support.registry import load, tracked
from tests.support.serving import learnt
from treelora.data.images.files import read_images
from treelora_platform.model_registry import register_run
from treelora_platform.predict import PredictOptions, open_predictor
from treelora_platform.predict_io import Prompt


def test_images_are_answered_as_treelora_predict_does(tmp_path: Path) -> None:
    config = image_config(tmp_path, treelora={"inference": "routed"}, vision={"align": True, "align_epochs": 1})
    run_dir, before = tmp_path / "run", mlflow.get_tracking_uri()
    loop = learnt(config, run_dir)
    address = f"sqlite:///{tmp_path}/mlflow.db"
    try:
        model = load(address, register_run(run_dir, address, tracked(run_dir, address), "digits", "best"))
    finally:
        mlflow.set_tracking_uri(before)
    encoded = [example.image for test in loop.evaluator.tests for example in read_images(test.task.path("test"))][:9]
    prompts = [Prompt(f"row {number}", number, "", image=image) for number, image in enumerate(encoded)]
    predictor = open_predictor(run_dir, PredictOptions())
    expected = [(a.answer, a.task) for part in predictor.answers(prompts) for a in part]
    found = model.predict(pd.DataFrame({"image": encoded}))
    assert list(zip(found["answer"], found["task"], strict=True)) == expected

    body = {
        "dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(image).decode()] for image in encoded]}
    }
    reply = scoring_server.invocations(json.dumps(body), "application/json", model, model.metadata.get_input_schema())
    assert reply.status == 200
    assert [row["answer"] for row in json.loads(reply.response)["predictions"]] == [answer for answer, _ in expected]

    with pytest.raises(MlflowException, match="image"):
        model.predict(pd.DataFrame({"prompt": [str(tmp_path / "some.png")]}))
    with pytest.raises(MlflowException, match="row 0: image can't be decoded"):
        model.predict(pd.DataFrame({"image": [b"no image"]}))
