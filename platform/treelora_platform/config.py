"""`ExperimentConfig`: the only configuration there is.

One frozen, validated object describes an experiment. The command line, the workers, MLflow and the checkpoints all
read this object and nothing else; what can't be run is refused here, before Ray starts.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, model_validator

from treelora.errors import ConfigError
from treelora.options import Options, peers
from treelora.options.tree import TreeLoRAOptions
from treelora.options.vision import VisionOptions
from treelora_platform.config_sections import (
    IMAGE_SOURCES,
    CheckpointSettings,
    ClusterSettings,
    EngineSettings,
    EvaluationSettings,
    LoraSettings,
    ModelConfig,
    StreamConfig,
    TrackingSettings,
    TrainSettings,
)
from treelora_platform.settings_file import parse_value, read_mapping, validated

MethodName = Literal[
    "treelora", "sequential", "frozen", "joint", "olora", "inflora", "sdlora", "slao", "ewc", "agem", "gem", "ogd",
    "replay", "lwf", "tasl", "ncm", "hidelora", "hideprompt", "l2p", "dualprompt",
]  # fmt: skip
# Whether a method's class says `accumulates`; said here as well, because this file must not import torch.
ACCUMULATING = frozenset({"olora", "inflora", "sdlora", "dualprompt"})
PROMPTING = frozenset({"l2p", "dualprompt", "hideprompt"})
HIERARCHICAL = frozenset({"hidelora", "hideprompt"})
TEXT_METHODS, IMAGE_METHODS = frozenset({"frozen", "lwf"}), frozenset({"ncm"}) | PROMPTING
IDLE_CLUSTER_SETTINGS = frozenset({"max_failures", "min_workers", "wait_seconds", "stall_seconds", "storage"})
"""Of section `cluster`: where a run is kept, and what is done when something goes wrong."""


class ExperimentConfig(Options):
    """One experiment: a method learns a stream of tasks on a model."""

    name: str = Field("run", min_length=1, max_length=100, description="Name of the run, unique in output_dir.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seeds weights of new adapters, the order of rows and every RNG.")
    output_dir: str = Field("runs", description="Folder that holds the runs; on a cluster, one that all nodes see.")
    method: MethodName = Field("treelora", description="Continual-learning method.")
    stream: StreamConfig = StreamConfig()
    extensions: tuple[StreamConfig, ...] = Field((), description="Tasks that came later; `treelora extend` adds them.")
    model: ModelConfig = ModelConfig()
    vision: VisionOptions = VisionOptions()
    lora: LoraSettings = LoraSettings()
    treelora: TreeLoRAOptions = TreeLoRAOptions()
    olora: peers.OLoRAOptions = peers.OLoRAOptions()
    inflora: peers.InfLoRAOptions = peers.InfLoRAOptions()
    sdlora: peers.SDLoRAOptions = peers.SDLoRAOptions()
    ewc: peers.EWCOptions = peers.EWCOptions()
    agem: peers.AGEMOptions = peers.AGEMOptions()
    gem: peers.GEMOptions = peers.GEMOptions()
    ogd: peers.OGDOptions = peers.OGDOptions()
    replay: peers.ReplayOptions = peers.ReplayOptions()
    lwf: peers.LwFOptions = peers.LwFOptions()
    tasl: peers.TaSLOptions = peers.TaSLOptions()
    hidelora: peers.HiDeLoRAOptions = peers.HiDeLoRAOptions()
    hideprompt: peers.HiDePromptOptions = peers.HiDePromptOptions()
    l2p: peers.L2POptions = peers.L2POptions()
    dualprompt: peers.DualPromptOptions = peers.DualPromptOptions()
    train: TrainSettings = TrainSettings(steps=16)
    engine: EngineSettings = EngineSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _parts_fit(self) -> ExperimentConfig:
        share = max(1, self.cluster.workers) * self.train.accumulation
        if self.train.global_batch % share:
            raise ValueError(
                f"train.global_batch {self.train.global_batch} can't be dealt evenly to {self.cluster.workers} workers "
                f"x accumulation {self.train.accumulation}; make it a multiple of {share}"
            )
        if self.engine.kind == "torch" and self.cluster.workers > 1:
            raise ValueError(
                f"engine.kind torch runs in one process; set cluster.workers to 1, not {self.cluster.workers}"
            )
        if not self.cluster.workers and (self.engine.kind != "torch" or self.cluster.storage):
            what = "cluster.storage" if self.cluster.storage else f"engine.kind {self.engine.kind}"
            raise ValueError(
                f"cluster.workers 0 runs in the driver's own process, which {what} isn't for; set engine.kind to torch "
                "and leave cluster.storage out, or set cluster.workers to 1"
            )
        if self.train.epochs_by_task and self.stream.order and len(self.train.epochs_by_task) != len(self.stream.order):
            raise ValueError(
                f"train.epochs_by_task has {len(self.train.epochs_by_task)} numbers for {len(self.stream.order)} tasks"
            )
        pulls = self.method == "treelora" and self.treelora.penalty not in ("none", "prox")
        if self.engine.offload_optimizer and (pulls or self.method in ("agem", "gem", "ogd")):
            raise ValueError(
                f"engine.offload_optimizer: DeepSpeed then clips by the norm that gradients had before method "
                f"{self.method} changed them; set it to false"
            )
        protected = self.method == "treelora" and self.treelora.protect is not None
        if (self.method in ACCUMULATING or protected) and self.train.weight_decay:
            raise ValueError(
                f"train.weight_decay {self.train.weight_decay:g} would shrink what method {self.method} has learnt "
                "before; set it to 0"
            )
        if self.method == "treelora" and self.treelora.inference not in self.evaluation.modes:
            raise ValueError(
                f"treelora.inference {self.treelora.inference} isn't among evaluation.modes {self.evaluation.modes}; "
                "add it there"
            )
        if self.evaluation.in_context_examples and self.method != "frozen":
            raise ValueError(f"evaluation.in_context_examples is for method frozen, not {self.method}")
        self._modality_fits()
        self._inference_fits()
        return self

    @property
    def images(self) -> bool:
        """Whether the stream is of images; else it is of text."""
        return self.stream.source in IMAGE_SOURCES

    def _modality_fits(self) -> None:
        if any((later.source in IMAGE_SOURCES) != self.images for later in self.extensions):
            raise ValueError("extensions: a stream is of text or of images, not of both; begin another run")
        if self.method in (TEXT_METHODS if self.images else IMAGE_METHODS):
            takes, other = (
                ("text", "ncm") if self.images else ("images", "frozen" if self.method == "ncm" else "hidelora")
            )
            raise ValueError(
                f"method {self.method} is for streams of {takes}, and source {self.stream.source!r} isn't one; "
                f"its counterpart here is {other}"
            )
        if self.images and self.train.weight_decay and self.vision.mask == "local":
            raise ValueError(
                f"train.weight_decay {self.train.weight_decay:g} would shrink the head's rows of earlier classes, "
                "which vision.mask local leaves alone; set it to 0"
            )

    def _inference_fits(self) -> None:
        evaluation = self.evaluation
        if self.method in HIERARCHICAL and "routed" not in evaluation.modes:
            raise ValueError(
                f"method {self.method} infers the task of a test row: that is inference routed, which isn't among "
                f"evaluation.modes {evaluation.modes}; add it there"
            )
        if self.method in HIERARCHICAL and self.images and not self.vision.align:
            raise ValueError(f"method {self.method} aligns the head after each task; set vision.align to true")
        if self.method not in PROMPTING:
            return
        if "merged" in evaluation.modes or evaluation.router_margin:
            key = "mode merged of evaluation.modes" if "merged" in evaluation.modes else "evaluation.router_margin"
            raise ValueError(
                f"{key} averages tasks' adapters, which prompts, as of method {self.method}, don't allow; leave it out"
            )
        if evaluation.forward:
            raise ValueError(
                f"evaluation.forward also asks the model without adapter, which method {self.method} has no prompts "
                "for; set it to false"
            )

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON-able plain values."""
        return self.model_dump(mode="json")

    def in_use(self) -> dict[str, Any]:
        """`as_dict` without the settings of other methods, and of images where the stream is of text."""
        others = set(get_args(MethodName)) - {self.method} | (set() if self.images else {"vision"})
        plain = {key: value for key, value in self.as_dict().items() if key not in others}
        if not self.images:
            for stream in (plain["stream"], *plain["extensions"]):
                del stream["classes"]
        return plain

    def flat(self) -> dict[str, Any]:
        """Dotted keys to plain values: what MLflow records as parameters."""
        return dict(_flatten(self.as_dict()))

    def digest(self) -> str:
        """SHA-256 of what determines the result.

        Where it is kept and tracked, what is done about faults, and other methods' settings don't.
        """
        return _digest(self.in_use())

    def lasting_digest(self) -> str:
        """The same of what differs from the defaults, wherever the data lie: for records that are kept.

        It stays what it is when the configuration gets more fields, or the data another place. Nor does it tell when
        a default has changed: that is what a record's commit is for.
        """
        used, known = self.in_use(), self
        if self.model.dtype == "bfloat16":  # the default before `auto` came, of which records say nothing
            known = self.model_copy(update={"model": self.model.model_copy(update={"dtype": "auto"})})
        differing = known.model_dump(mode="json", exclude_defaults=True)
        # held against its fields' defaults, which stay, not against what a preset makes of them, which changes
        differing["treelora"] = self.treelora.model_dump(mode="json", exclude_defaults=True)
        given = {k: v for k, v in differing.items() if k in used and v != {}}
        for part in (given.get("stream", {}), *given.get("extensions", ())):
            part.pop("path", None)
        return _digest(given)

    def as_yaml(self) -> str:
        """The configuration as YAML that `load_config` takes."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


def _digest(settings: dict[str, Any]) -> str:
    plain = {k: v for k, v in settings.items() if k not in ("output_dir", "tracking", "checkpoint", "name")}
    plain["cluster"] = {k: v for k, v in plain.get("cluster", {}).items() if k not in IDLE_CLUSTER_SETTINGS}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        return [item for key, value in tree.items() for item in _flatten(value, f"{prefix}{key}.")]
    return [(prefix.rstrip("."), tree)]


def load_config(path: str | Path, overrides: Annotated[list[str], "key=value"] | None = None) -> ExperimentConfig:
    """Read a YAML file, apply dotted `key=value` overrides, and validate.

    Raises:
        ConfigError: names the file, each wrong key, its value and what would be right.
    """
    return parse_config(read_config(path, overrides), origin=str(path))


def read_config(path: str | Path, overrides: Annotated[list[str], "key=value"] | None = None) -> dict[str, Any]:
    """What a file and overrides say, before anything is filled in or validated.

    Raises:
        ConfigError: the file can't be read as a mapping, or an override isn't `key=value`.
    """
    plain = read_mapping(Path(path), "a configuration", "`jobs/configs/` has recipes to start from")
    for override in overrides or []:
        set_value(plain, override)
    return plain


def parse_config(plain: dict[str, Any], origin: str = "configuration") -> ExperimentConfig:
    """Validate plain values.

    Raises:
        ConfigError: every fault in one message, a line each.
    """
    return validated(ExperimentConfig, plain, origin)


def parse_options(texts: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts, values as YAML, as one mapping; dotted keys make sections.

    Raises:
        ConfigError: a text is not of that form.
    """
    plain: dict[str, Any] = {}
    for text in texts:
        set_value(plain, text)
    return plain


def set_value(plain: dict[str, Any], override: str) -> None:
    """Set one `key=value`, the key dotted and the value YAML, in a nested mapping.

    Raises:
        ConfigError: the text is not of that form.
    """
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r}: write key=value, such as train.learning_rate=5e-4")
    *parents, last = key.strip().split(".")
    node = plain
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds {child!r}, not a section")
        node = child
    parsed = parse_value(value, override)
    if isinstance(parsed, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", parsed):
        parsed = float(parsed)  # YAML 1.1 reads 1e-4 as text; people mean the number
    node[last] = parsed


def json_schema() -> dict[str, Any]:
    """JSON schema of the configuration, for editors."""
    return ExperimentConfig.model_json_schema()
