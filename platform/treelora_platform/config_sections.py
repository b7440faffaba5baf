"""The sections of an `ExperimentConfig`, each with what can be refused by looking at it alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import Field, JsonValue, field_validator, model_validator

from treelora.options import Options
from treelora.options.tree import Inference
from treelora_platform.redaction import hide_credentials, is_secret
from treelora_platform.storage.address import check_address

TextSource = Literal["builtin", "parquet", "olora", "trace", "jsonl", "csv", "hf"]
ImageSource = Literal["digits", "images", "image_folder", "hf_images", "cifar100", "imagenet_r", "cub200"]
Source = TextSource | ImageSource
IMAGE_SOURCES = frozenset(get_args(ImageSource))
PACKAGED_SOURCES = frozenset({"builtin", "digits"})


def _secrets(options: Mapping[str, Any]) -> Iterator[str]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets(value)
        elif isinstance(value, str) and is_secret(key):
            yield key


class ClassSettings(Options):
    """How the classes of a data set of images make tasks."""

    protocol: Literal["class_incremental", "domain_incremental", "task_incremental"] = Field(
        "class_incremental",
        description="Each task brings new classes, and a test image may be of any seen so far; or each brings a domain "
        "of the same classes; or new classes, and the task of a test image is told.",
    )
    tasks: int | None = Field(None, ge=1, description="Number of tasks; or give `per_task`.")
    per_task: int | None = Field(None, ge=2, description="Classes a task; or give `tasks`.")
    seed: int | None = Field(None, ge=0, description="Shuffles the classes; null: natural order.")
    base: tuple[str, ...] = Field((), description="Classes that appear in no task: the model was pre-trained on them.")

    @model_validator(mode="after")
    def _one_size(self) -> ClassSettings:
        if self.tasks is not None and self.per_task is not None:
            raise ValueError(f"give `tasks` or `per_task`; found both, {self.tasks} and {self.per_task}")
        return self

    def as_options(self) -> dict[str, JsonValue]:
        """As the importers of images take it."""
        given: dict[str, JsonValue] = {
            "protocol": self.protocol,
            "tasks": self.tasks,
            "classes_per_task": self.per_task,
            "class_seed": self.seed,
            "base_classes": list(self.base),
        }
        return {key: value for key, value in given.items() if value not in (None, [])}


class StreamConfig(Options):
    """Which tasks arrive, in which order, and how many rows of each are used."""

    source: Source = Field("builtin", description="Where the tasks come from: the built-in stream or an importer.")
    path: str | None = Field(None, description="Folder, file, URI or Hugging Face id that the importer reads.")
    order: tuple[str, ...] = Field((), description="Task names in order of arrival; empty: all that the source has.")
    train_rows: int | None = Field(None, ge=1, description="At most this many training rows a task (seeded choice).")
    test_rows: int | None = Field(None, ge=1, description="At most this many test rows a task, balanced over answers.")
    seed: int = Field(0, ge=0, description="Seeds the generator of the built-in stream and the choice of rows.")
    classes: ClassSettings = ClassSettings()
    options: dict[str, JsonValue] = Field({}, description="Options of the importer, such as column names.")

    @field_validator("order")
    @classmethod
    def _no_task_twice(cls, order: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in order if order.count(name) > 1})
        if twice:
            raise ValueError(f"names {', '.join(map(repr, twice))} more than once; a stream holds each task once")
        return order

    @field_validator("options")
    @classmethod
    def _no_secrets(cls, options: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if secret := next(_secrets(options), None):
            raise ValueError(
                f"{secret!r} looks like a secret, and configurations are recorded; give it in the environment, as "
                "AWS_ACCESS_KEY_ID or HF_TOKEN"
            )
        return options

    @model_validator(mode="after")
    def _path_given(self) -> StreamConfig:
        if self.source not in PACKAGED_SOURCES and not self.path:
            raise ValueError(f"source {self.source!r} needs `path`, the folder or file to read")
        return self


class ModelConfig(Options):
    """The pre-trained model that the stream is learnt on."""

    name: str = Field(
        "smollm2",
        description="`smollm2` (packaged), `tiny` (random, tests), a Hugging Face id or a folder; for images also "
        "`digits-vit` (small, trained at its first use) and `timm:NAME`.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the frozen base weights; adapters are float32. `auto`: `bfloat16` where GPUs or CPUs multiply "
        "in it, else `float32`.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    random_weights: bool = Field(
        False, description="Build the model's shape with random weights: for speed measurements."
    )
    template: str = Field("chat", description="`chat` (the model's own), `plain`, or a text that contains {prompt}.")
    system_prompt: str | None = Field(
        None, description="System message for the chat template; null: the template's own."
    )
    max_length: int = Field(512, ge=8, description="Longest row in tokens; prompts are cut on the left, answers never.")

    long_rows: Literal["truncate", "refuse"] = Field(
        "truncate", description="What becomes of rows above max_length: cut on the left and counted, or an error."
    )

    @field_validator("template")
    @classmethod
    def _template_known(cls, template: str) -> str:
        if template not in ("chat", "plain") and "{prompt}" not in template:
            raise ValueError("is neither `chat` nor `plain`, nor a text that contains {prompt}")
        return template


class LoraSettings(Options):
    """The low-rank adapters (Hu et al., 2021, arXiv 2106.09685)."""

    rank: int = Field(8, ge=1, description="Rank r of each adapter.")
    alpha: float = Field(32.0, gt=0, description="Scale: the update is alpha / rank x B A.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before A, while training.")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "v_proj"), min_length=1, description="Modules that get an adapter."
    )
    layers: tuple[int, ...] | None = Field(None, description="Transformer layers that get one; null: all.")


class TrainSettings(Options):
    """Steps, batches and the optimizer (AdamW with warm-up and cosine decay, anew for each task)."""

    global_batch: int = Field(8, ge=1, description="Rows a step, over all workers and accumulation.")
    accumulation: int = Field(1, ge=1, description="Micro-batches a worker takes for one step.")
    epochs: float | None = Field(None, gt=0, description="Passes over each task's rows; give this or `steps`.")
    steps: int | None = Field(None, ge=1, description="Steps a task; give this or `epochs`.")
    epochs_by_task: tuple[float, ...] = Field((), description="Passes for each task in order, where they differ.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of a task's steps with rising learning rate.")
    min_lr: float = Field(0.1, ge=0, le=1, description="Learning rate at the end of a task, as a share of the peak.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    max_bad_steps: int = Field(3, ge=1, description="Steps with a NaN or infinite loss in a row before the run stops.")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSettings:
        given = [
            n
            for n, v in (
                ("epochs", self.epochs),
                ("steps", self.steps),
                ("epochs_by_task", self.epochs_by_task),
            )
            if v
        ]
        if len(given) != 1:
            found = "none" if not given else " and ".join(given)
            raise ValueError(f"give exactly one of `epochs`, `steps`, `epochs_by_task`; found {found}")
        return self


class EngineSettings(Options):
    """How a step is computed."""

    kind: Literal["deepspeed", "torch"] = Field("deepspeed", description="`torch`: one process, without DeepSpeed.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="What DeepSpeed ZeRO shards: 1 optimizer, 2 gradients, 3 weights."
    )
    offload_optimizer: bool = Field(False, description="Keep optimizer state in host memory (stages 1 to 3).")
    offload_weights: bool = Field(False, description="Keep sharded weights in host memory (stage 3).")

    @model_validator(mode="after")
    def _offload_fits(self) -> EngineSettings:
        if self.offload_weights and self.zero_stage != 3:
            raise ValueError(f"offload_weights needs zero_stage 3, not {self.zero_stage}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        return self


class EvaluationSettings(Options):
    """What is scored after every task."""

    modes: tuple[Inference, ...] = Field(("last", "routed"), min_length=1, description="Inference modes to score.")
    batch_rows: int = Field(16, ge=1, description="Rows a forward pass.")
    max_new_tokens: int = Field(64, ge=1, description="Longest generated answer in tokens.")
    router_layer: int = Field(
        8, ge=0, description="Layer of the frozen model whose mean-pooled features the router reads."
    )
    router_rows: int = Field(96, ge=2, description="Training rows a task that the router is fitted on.")
    router_margin: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Log-likelihood margin below which the average of the tree node around the two likeliest tasks "
        "answers; 0: never.",
    )
    forward: bool = Field(False, description="Also score each task before it is learnt, for forward transfer (FWT).")
    in_context_examples: int = Field(0, ge=0, description="Solved examples put before a test prompt (method `frozen`).")


class CheckpointSettings(Options):
    """When progress is committed."""

    every_steps: int | None = Field(None, ge=1, description="Also commit every so many steps; null: at task ends only.")
    keep: int = Field(2, ge=1, description="Commits kept; older ones are deleted.")


class ClusterSettings(Options):
    """Workers and what each of them takes."""

    workers: int = Field(
        1, ge=0, description="Ray Train workers; 0: none, the run is in the driver's own process, with engine torch."
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs that Ray reserves for a worker.")
    gpus_per_worker: float = Field(
        0, ge=0, le=1, description="GPUs that Ray reserves for a worker; less than 1 lets several runs share a GPU."
    )
    threads_per_worker: int | None = Field(None, ge=1, description="Torch threads; null: cpus_per_worker.")
    max_failures: int = Field(2, ge=0, description="Restarts of the worker group after a worker died.")
    min_workers: int | None = Field(
        None, ge=1, description="Go on with so many where there is no room for `workers`; null: with all or not at all."
    )
    wait_seconds: float = Field(
        60, ge=0, description="How long to wait for room for all workers, at the start and after each failure."
    )
    stall_seconds: float | None = Field(
        900, ge=5, description="A worker without progress for so long is ended and its group restarted; null: never."
    )
    storage: str | None = Field(
        None,
        description="Address that the run is kept at where nodes share no folder, such as s3://bucket/folder; null: "
        "output_dir is a folder that all nodes see.",
    )

    @field_validator("storage")
    @classmethod
    def _storage_known(cls, storage: str | None) -> str | None:
        return check_address(storage) if storage else None

    @model_validator(mode="after")
    def _fits(self) -> ClusterSettings:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}; lower it")
        if 0 < self.gpus_per_worker < 1 < self.workers:
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g} would put several of the {self.workers} workers on one GPU, "
                "which NCCL refuses; set workers to 1, or gpus_per_worker to 1"
            )
        return self


class TrackingSettings(Options):
    """Where MLflow keeps the record."""

    uri: str | None = Field(
        None, description="Tracking server or database; null: MLFLOW_TRACKING_URI, else sqlite beside the runs."
    )
    experiment: str = Field("treelora", min_length=1, description="MLflow experiment.")
    tags: dict[str, str] = Field({}, description="Tags of the run.")

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri and hide_credentials(uri) != uri:
            raise ValueError(
                "has a user or password in it, and configurations are recorded; set MLFLOW_TRACKING_URI, or "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri
