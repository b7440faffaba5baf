"""What a sweep searches, as one YAML file: a space over fields of the configuration, objectives, search, scheduler."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, JsonValue, model_validator

from treelora.errors import ConfigError
from treelora.options import Options
from treelora.options.tree import Inference
from treelora_platform.config import ExperimentConfig, parse_config, read_config, set_value
from treelora_platform.recipes import recipe_path
from treelora_platform.settings_file import parse_value, read_mapping, validated

Search = Literal["grid", "random", "optuna"]
Score = Literal["op", "bwt", "seconds", "tokens_per_second", "stored_bytes"]
BETTER: dict[str, Literal["max", "min"]] = {
    "op": "max",
    "bwt": "min",
    "seconds": "min",
    "tokens_per_second": "max",
    "stored_bytes": "min",
}
"""Objectives, and what is better of each: OP in percent, BWT in points forgotten (arXiv 2506.10355), training time."""
RESERVED = ("name", "output_dir", "tracking", "checkpoint", "extensions")
MOST_TRIALS = 1000


class Range(Options):
    """Numbers from `low` to `high`, both inside; whole ones where both are."""

    low: int | float = Field(description="Least value.")
    high: int | float = Field(description="Largest value.")
    log: bool = Field(False, description="Equal chances for equal ratios, for values that span decades.")

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0, not {self.low:g}")
        return self

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int)


class Asha(Options):
    """Asynchronous successive halving (Li et al., MLSys 2020, arXiv 1810.05934) over the tasks of the stream.

    After `grace_tasks` tasks, and after `reduction_factor` times as many each, only the best 1 / `reduction_factor` of
    the trials that have got so far go on.
    """

    kind: Literal["asha"] = "asha"
    grace_tasks: int = Field(1, ge=1, description="Tasks that every trial learns.")
    reduction_factor: float = Field(2, gt=1, description="How many times fewer trials go on from rung to rung.")


class NoScheduler(Options):
    """Every trial learns the whole stream."""

    kind: Literal["none"] = "none"


class SweepSpec(Options):
    """One sweep. Every trial is a whole experiment of its own, in a folder of its own."""

    name: str = Field(min_length=1, max_length=80, description="Name of the sweep, unique in output_dir.")
    recipe: str = Field(description="Recipe or file that every trial's configuration starts from.")
    overrides: dict[str, JsonValue] = Field({}, description="Dotted keys that all trials share, and their values.")
    space: dict[str, list[JsonValue] | Range] = Field(
        min_length=1, description="Dotted keys that are searched: a list to choose from, or {low, high, log}."
    )
    search: Search = Field(
        "random", description="`grid`: all combinations of lists; `random`; `optuna`: Bayesian, TPE or NSGA-II."
    )
    trials: int = Field(8, ge=1, le=MOST_TRIALS, description="Trials; a grid has as many as there are combinations.")
    objectives: dict[Score, Literal["max", "min"]] = Field(
        {"op": "max"}, min_length=1, description="What is searched for; the first one decides where one must."
    )
    mode: Inference | None = Field(
        None, description="Way of inference that OP and BWT are taken of; null: treelora.inference."
    )
    scheduler: Asha | NoScheduler = Field(NoScheduler(), discriminator="kind", description="Which trials end early.")
    concurrency: int | None = Field(
        None, ge=1, description="Trials at once at most; null: as many as there is room for."
    )
    retries: int = Field(1, ge=0, description="Times a failed trial is begun again; it goes on at its last commit.")
    seed: int = Field(
        0, ge=0, lt=2**31, description="Seeds the search, not the trials; put `seed` into the space for that."
    )
    register_as: str | None = Field(None, min_length=1, description="Name of the registered model for the best trials.")
    register_best: int = Field(1, ge=1, description="How many of the best trials are registered.")

    @model_validator(mode="after")
    def _fits(self) -> SweepSpec:
        for where, keys in (("space", self.space), ("overrides", self.overrides)):
            if clash := [key for key in keys if key.split(".")[0] in RESERVED]:
                raise ValueError(f"{where}: {clash[0]!r} is the sweep's to set; leave it out")
        if clash := sorted(self.space.keys() & self.overrides.keys()):
            raise ValueError(f"overrides: {clash[0]!r} is searched; take it out of one of the two")
        for key, values in self.space.items():
            if isinstance(values, list):
                if not values:
                    raise ValueError(f"space.{key}: has no values to choose from")
                if len({repr(value) for value in values}) < len(values):
                    raise ValueError(f"space.{key}: a value is there twice")
            elif self.search == "grid":
                raise ValueError(f"space.{key}: a grid needs a list of values, not a range; or set search to random")
        for score, direction in self.objectives.items():
            if BETTER[score] != direction:
                raise ValueError(f"objectives.{score}: better is {BETTER[score]!r}, not {direction!r}")
        if self.search == "grid" and math.prod(len(values) for values in self.lists.values()) > MOST_TRIALS:
            raise ValueError(f"space: the grid has more than {MOST_TRIALS} combinations; set search to random")
        return self

    @property
    def lists(self) -> dict[str, list[JsonValue]]:
        """The keys that are chosen from a list."""
        return {key: values for key, values in self.space.items() if isinstance(values, list)}

    @property
    def primary(self) -> Score:
        """The objective that schedulers and the choice of the best go by."""
        return next(iter(self.objectives))

    def count(self) -> int:
        """How many trials there will be."""
        return math.prod(len(values) for values in self.lists.values()) if self.search == "grid" else self.trials


def load_sweep(path: str | Path, overrides: list[str] | None = None) -> SweepSpec:
    """Read a sweep from a YAML file; `key=value` overrides replace its top-level fields or entries of its mappings.

    Raises:
        ConfigError: names the file, each wrong key, its value and what would be right.
    """
    plain = read_mapping(Path(path), "a sweep", "jobs/configs/sweeps has examples")
    for text in overrides or []:
        _override(plain, text)
    return parse_sweep(plain, str(path))


def parse_sweep(plain: dict[str, Any], origin: str = "sweep") -> SweepSpec:
    """Validate plain values.

    Raises:
        ConfigError: every fault in one message, a line each.
    """
    return validated(SweepSpec, plain, origin)


def template(spec: SweepSpec) -> dict[str, Any]:
    """What all trials share, as plain values: the recipe and the sweep's overrides. Trials on other nodes get this.

    Only what these say themselves: what a preset fills in depends on the trial.

    Raises:
        ConfigError: the recipe can't be read, or is no valid configuration with these overrides.
    """
    path = recipe_path(spec.recipe)
    if not path.exists():
        raise ConfigError(f"recipe: {spec.recipe!r} is neither a file nor the name of a recipe")
    plain = read_config(path, _texts(spec.overrides))
    parse_config(plain, str(path))
    return plain


def trial_config(base: dict[str, Any], values: dict[str, Any], output_dir: str | None = None) -> ExperimentConfig:
    """The whole configuration of a trial; its name is the digest of all that determines its result.

    Raises:
        ConfigError: names the key that doesn't exist, or the value that it can't take.
    """
    plain = copy.deepcopy(base)
    for text in _texts(values):
        set_value(plain, text)
    if output_dir is not None:
        plain["output_dir"] = output_dir
    config = parse_config(plain, "trial")
    name = f"{config.method}-s{config.seed}-{config.digest()[:12]}"
    return config.model_copy(update={"name": name})


def _texts(values: dict[str, Any]) -> list[str]:
    return [f"{key}={_as_yaml(value)}" for key, value in values.items()]


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _override(plain: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    section, dot, entry = key.strip().partition(".")
    if not equals or not section:
        raise ConfigError(f"override {text!r}: write key=value, such as trials=16 or overrides.train.steps=8")
    parsed = parse_value(value, text)
    if not dot:
        plain[section] = parsed
        return
    # what follows the first dot is one key, since keys of the space have dots themselves
    node = plain.setdefault(section, {})
    if not isinstance(node, dict):
        raise ConfigError(f"override {text!r}: {section!r} holds {node!r}, not a mapping")
    node[entry] = parsed
