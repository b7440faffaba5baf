"""Runs as registered models: MLflow keeps what answers prompts, and anybody loads it by name.

Only MLflow's client is used: which run or server is active in this process plays no part, and doesn't change.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

from treelora.errors import ConfigError, one_line
from treelora_platform.checkpoint import newest_commit, newest_name
from treelora_platform.packing import pack_run
from treelora_platform.redaction import hide_credentials
from treelora_platform.run_record import load_run_config
from treelora_platform.tracking import MlflowServer, TrackingError, resolve_tracking_uri

CODE = Path(__file__).with_name("pyfunc_model.py")
REQUIRED = ("treelora", "mlflow", "torch", "transformers", "peft")
LOGGED_NAME = "learnt"
RUN_TAG, COMMIT_TAG = "run_id", "commit"
_RUN_TAGS = ("method", "stream", "order", "seed", "data_hash", "version.commit", "treelora.sweep", "treelora.trial")
_SCORES = ("final/op/", "final/bwt/")


def register_run(
    run_dir: Path,
    tracking_uri: str | None,
    mlflow_run_id: str,
    registered_name: str,
    alias: str | None = None,
) -> str:
    """Register what a run has learnt as the next version of a model.

    A version of the same run at the same commit is not made twice: only the alias is set.

    Args:
        run_dir: The run, or a packed copy of it.
        tracking_uri: Server or database that has the run, and gets the model; None: SQLite beside the run.
        mlflow_run_id: The run there.
        registered_name: Of the model.
        alias: Name for this version, such as `best`; it is taken from the version that has it.

    Returns:
        `models:/<name>/<version>`.

    Raises:
        ConfigError: no run is there, or the name is none that MLflow takes.
        CheckpointError: no task is learnt yet, or the commit is damaged.
        TrackingError: the server can't be reached, knows no such run, or refuses.
    """
    _check_names(registered_name, alias)
    address = resolve_tracking_uri(tracking_uri, run_dir.parent)
    with tempfile.TemporaryDirectory(prefix="treelora-model-") as scratch:
        packed = pack_run(run_dir, Path(scratch) / "run")
        with _refusals_told(address):
            client = MlflowServer(address).client
            version = _version_of(client, registered_name, mlflow_run_id, newest_name(packed))
            version = version or _register(client, packed, Path(scratch) / "model", mlflow_run_id, registered_name)
            if alias:
                client.set_registered_model_alias(registered_name, alias, version)
    return f"models:/{registered_name}/{version}"


def _register(client: Any, packed: Path, folder: Path, run_id: str, name: str) -> str:
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    run = client.get_run(run_id)
    tags = _tags(packed, run.data.tags, run.data.metrics) | {RUN_TAG: run_id}
    logged = client.create_logged_model(
        run.info.experiment_id, LOGGED_NAME, run_id, tags, params=run.data.params, model_type="treelora"
    )
    try:
        _save(packed, folder, logged, run_id, tags)
        client.log_model_artifacts(logged.model_id, str(folder))
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        client.finalize_logged_model(logged.model_id, "READY")
        with suppress(MlflowException):  # it exists, or creating a version says what is wrong
            client.create_registered_model(name)
        made = client.create_model_version(
            # not models:/<id>: MLflow would look that up in the process's active store
            *(name, logged.artifact_location, run_id, tags),
            description=_description(tags),
            model_id=logged.model_id,
        )
    except BaseException:
        with suppress(MlflowException, OSError):  # what went wrong first is what counts
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    return str(made.version)


def _save(packed: Path, folder: Path, logged: Any, run_id: str, tags: Mapping[str, str]) -> None:
    """Write the model's folder as MLflow wants it; its requirements are given, so nothing is loaded or asked for."""
    import pandas as pd
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    images = load_run_config(packed).images
    texts = {"prompt": ["red green blue", "one two three"], "choices": [["yes", "no"], ["yes", "no"]]}
    example = {"image": [blank_png()]} if images else texts
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    # unless told, MLflow copies a lock file that lies in the working directory
    with _environment(MLFLOW_UV_AUTO_DETECT="false", MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"):
        save_model(
            path=str(folder),
            python_model=shutil.copy(
                CODE, packed.parent
            ),  # the model notes the path: not that of this machine's packages
            artifacts={"run": str(packed)},
            mlflow_model=Model(logged.artifact_location, run_id, model_uuid=logged.model_id, model_id=logged.model_id),
            signature=signature(images),
            input_example=pd.DataFrame(example),
            pip_requirements=requirements(),
            model_config={"base_model": tags["base_model"]},  # what isn't named here can't be given on loading
            metadata=dict(tags),
        )


def blank_png() -> bytes:
    """An image, to show what a model takes."""
    from PIL import Image

    file = BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    return file.getvalue()


def signature(images: bool = False) -> Any:
    """What a registered model takes and gives: see `pyfunc_model.RunModel.predict`."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    texts: list[Any] = [ColSpec(DataType.string, "prompt"), ColSpec(Array(DataType.string), "choices", required=False)]
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")] if images else texts),
        outputs=Schema(
            [
                ColSpec(DataType.string, "answer"),
                ColSpec(DataType.string, "task", required=False),
                ColSpec(DataType.double, "margin", required=False),
                ColSpec(DataType.string, "runner_up", required=False),
                ColSpec(DataType.boolean, "fallback"),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("inference", DataType.string, None),
                ParamSpec("task", DataType.string, None),
                ParamSpec("router_margin", DataType.double, None),
                ParamSpec("max_new_tokens", DataType.long, None),
            ]
        ),
    )


def requirements() -> list[str]:
    """Pinned packages, as they are installed here; builds such as `+cpu` are left to the one who installs."""
    return [f"{package}=={metadata.version(package).partition('+')[0]}" for package in REQUIRED]


def _tags(packed: Path, run_tags: Mapping[str, str], metrics: Mapping[str, float]) -> dict[str, str]:
    from treelora_platform.predict import default_inference

    config = load_run_config(packed)
    commit, _ = newest_commit(packed)
    router = commit is not None and any(name.startswith("router/") for name in commit.parts["evaluator"])
    inference = default_inference(config, router)
    tags = {key: run_tags[key] for key in _RUN_TAGS if key in run_tags}
    tags |= {"base_model": config.model.name, "inference": inference, COMMIT_TAG: newest_name(packed)}
    scores = {key.removeprefix("final/"): value for key, value in metrics.items() if key.startswith(_SCORES)}
    if f"op/{inference}" in scores:
        scores["op"] = scores[f"op/{inference}"]
    return tags | {key: f"{value:.2f}" for key, value in sorted(scores.items())}


def _description(tags: Mapping[str, str]) -> str:
    scored = f", OP {tags['op']} % ({tags['inference']})" if "op" in tags else ""
    return f"{tags.get('method', 'a run')} on {tags['base_model']}, after {tags.get('order', 'its tasks')}{scored}"


def _version_of(client: Any, name: str, run_id: str, commit: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}'")
    same = [v for v in found if (v.tags.get(RUN_TAG), v.tags.get(COMMIT_TAG)) == (run_id, commit)]
    return str(same[0].version) if same else None


def _check_names(name: str, alias: str | None) -> None:
    if not re.fullmatch(r"[\w.\- ]{1,200}", name) or name != name.strip():
        raise ConfigError(f"model name {name!r}: use letters, digits, '.', '-', '_' and spaces inside")
    if alias is not None and not re.fullmatch(r"(?!v\d+$|latest$)[A-Za-z][\w\-]{0,99}", alias):
        raise ConfigError(f"alias {alias!r}: use letters, digits, '-' and '_'; neither `latest` nor v and a number")


@contextmanager
def _refusals_told(address: str) -> Iterator[None]:
    """One line of what MLflow raises, without credentials."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise TrackingError(hide_credentials(f"MLflow at {address}: {one_line(error)}")) from None


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
