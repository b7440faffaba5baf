"""A study: variants of methods x orders of tasks x seeds, under equal conditions, as one YAML file.

A study turns into jobs, each of them an experiment. A job's run is named by the digest of its configuration, so a run
that several phases, variants or studies ask for is made once, and a changed study never takes an old run for a new one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, JsonValue, model_validator

from treelora.errors import ConfigError
from treelora.methods import METHODS
from treelora.options import Options
from treelora.options.tree import Inference
from treelora_platform.config import ExperimentConfig, load_config
from treelora_platform.precision import settled
from treelora_platform.recipes import recipe_path
from treelora_platform.settings_file import read_mapping, validated

Setting = dict[str, int | float]
"""Dotted keys of the configuration, and the value of each that tuning chose or tries."""
RESERVED = ("name", "method", "seed", "output_dir", "stream.order", "stream.seed")
PLACES = ("stream.path",)
"""Where things lie is said for all runs, for it isn't part of a run's name."""


class Variant(Options):
    """A method with settings of its own."""

    method: str = Field(description="Name of the method.")
    set: dict[str, JsonValue] = Field({}, description="Dotted keys of the configuration, and their values.")
    replay: bool = Field(False, description="Rows of earlier tasks are seen again; such variants are marked.")
    mode: Inference = Field("last", description="The variant's own way of inference, which it is tuned by.")
    tuned_as: str | None = Field(None, description="Takes over what tuning chose for this variant.")


class Tuning(Options):
    """How hyperparameters are chosen: by OP on orders and seeds that the comparison doesn't use."""

    orders: tuple[tuple[str, ...], ...] = Field(min_length=1, description="Task names in order, none of them `orders`.")
    seeds: tuple[int, ...] = Field(min_length=1, description="Seeds, none of them among the study's `seeds`.")
    grid: dict[str, tuple[int | float, ...]] = Field(min_length=1, description="Values that every variant may take.")
    extra: dict[str, dict[str, tuple[int | float, ...]]] = Field({}, description="More, for single variants.")
    overrides: dict[str, JsonValue] = Field({}, description="On top of the study's, such as fewer ways of inference.")


class Reduced(Options):
    """What `--reduced` makes smaller, beside one order, one seed and no tuning."""

    tasks: int | None = Field(None, ge=2, description="Only so many tasks of the order.")
    steps: tuple[int, ...] = Field((), description="In place of the study's.")
    overrides: dict[str, JsonValue] = Field({"stream.test_rows": 8}, description="On top of the study's.")


class Study(Options):
    """What is compared with what, on which tasks."""

    name: str = Field(min_length=1, description="Title of the tables.")
    recipe: str = Field(description="Recipe or file that every run's configuration starts from.")
    overrides: dict[str, JsonValue] = Field({}, description="Dotted keys that all runs share.")
    reference: str = Field(description="The variant that all others are held against.")
    champion: str | None = Field(
        None, description="A variant to hold all others against as they are meant: each in its own way of inference."
    )
    variants: dict[str, Variant] = Field(min_length=1)
    orders: tuple[tuple[str, ...], ...] = Field(min_length=1, description="Task names in order of arrival.")
    seeds: tuple[int, ...] = Field(min_length=1)
    tuning: Tuning | None = Field(None, description="Null: the recipe's and the variants' values are used.")
    steps: tuple[int, ...] = Field((), description="Steps a task; the last is the comparison's, all are the quality's.")
    quality: tuple[str, ...] = Field((), description="Variants that are run at all `steps`; empty: all that train.")
    ablation: dict[str, str] = Field({}, description="Label of a row to the variant that it shows, the baseline first.")
    reduced: Reduced = Reduced()

    @model_validator(mode="after")
    def _fits(self) -> Study:
        known = self.variants
        asked = {"reference": [self.reference], "quality": self.quality, "ablation": self.ablation.values()}
        asked["champion"] = [self.champion] if self.champion else []
        asked |= {"tuning.extra": self.tuning.extra if self.tuning else (), "tuned_as": self._inherited()}
        for key, names in asked.items():
            if missing := [name for name in names if name not in known]:
                raise ValueError(f"{key}: no variant {missing[0]!r}; there are {', '.join(known)}")
        if chained := [name for name in self._inherited() if known[name].tuned_as]:
            raise ValueError(f"tuned_as: {chained[0]!r} takes its settings over itself; name that variant")
        _refuse_repeated("orders", self.orders)
        _refuse_repeated("seeds", self.seeds)
        if list(self.steps) != sorted(set(self.steps)) or any(count < 1 for count in self.steps):
            raise ValueError(f"steps: {list(self.steps)} must be positive and increase")
        for name, variant in known.items():
            self._check_variant(name, variant)
        if self.tuning:
            self._check_tuning(self.tuning)
        return self

    def _inherited(self) -> list[str]:
        return [variant.tuned_as for variant in self.variants.values() if variant.tuned_as]

    def _check_variant(self, name: str, variant: Variant) -> None:
        fixed = [*RESERVED, *(["train.steps"] if self.steps else [])]
        tuning = self.tuning.overrides if self.tuning else {}
        places = ((f"variants.{name}.set", variant.set), ("overrides", self.overrides), ("tuning.overrides", tuning))
        for where, keys in places:
            if where != "overrides" and (clash := [key for key in keys if key in PLACES]):
                raise ValueError(f"{where}: {clash[0]!r} is the same for all runs; move it to overrides, or to --set")
            if clash := [key for key in keys if key in fixed]:
                raise ValueError(f"{where}: {clash[0]!r} is the study's to set; leave it out")
        tuned = self.tuning.grid.keys() | self.tuning.extra.get(name, {}).keys() if self.tuning else set()
        if clash := sorted(tuned & variant.set.keys()) if not variant.tuned_as else []:
            raise ValueError(f"variants.{name}.set: {clash[0]!r} is tuned; take it out of one of the two")
        method = METHODS.get(variant.method)
        if method and method.replays != variant.replay:
            does = "sees" if method.replays else "never sees"
            raise ValueError(f"variants.{name}.replay: {variant.method} {does} earlier rows again; say so")

    def _check_tuning(self, tuning: Tuning) -> None:
        if shared := [order for order in tuning.orders if order in self.orders]:
            raise ValueError(f"tuning.orders: {', '.join(shared[0])} is also compared on; tune on another order")
        if seeds := [seed for seed in tuning.seeds if seed in self.seeds]:
            raise ValueError(f"tuning.seeds: {seeds[0]} is also compared on; tune on another seed")
        for key, values in [*tuning.grid.items(), *(pair for own in tuning.extra.values() for pair in own.items())]:
            if not values:
                raise ValueError(f"tuning: {key!r} has no values to try")
            _refuse_repeated(f"tuning: values of {key!r}", values)

    def places(self, variant: str) -> list[int]:
        """Orders, from 1, that a variant is run on: the first of each set of tasks where order plays no part."""
        if self.in_order(variant):
            return list(range(1, len(self.orders) + 1))
        firsts: dict[frozenset[str], int] = {}
        for place, order in enumerate(self.orders, start=1):
            firsts.setdefault(frozenset(order), place)
        return list(firsts.values())

    def in_order(self, variant: str) -> bool:
        """Whether the variant learns task after task; else it is a bound: joint training, or none."""
        method = METHODS.get(self.variants[variant].method)
        return not method or (method.trains and not method.joint)

    @property
    def graded(self) -> list[str]:
        """Variants that are run at all numbers of steps."""
        return [name for name in self.quality or self.variants if self.in_order(name)]

    def trains(self, variant: str) -> bool:
        """Whether the variant has anything to tune."""
        method = METHODS.get(self.variants[variant].method)
        return not method or method.trains

    def competes(self, variant: str) -> bool:
        """Whether the variant is held against the champion: neither a bound nor the champion's own method."""
        method = self.variants[variant].method
        return self.in_order(variant) and (not self.champion or method != self.variants[self.champion].method)

    def twin_of_reference(self, variant: str) -> bool:
        """Whether the variant's runs are the reference's, looked at in another way of inference."""
        mine, other = self.variants[variant], self.variants[self.reference]
        return mine.tuned_as == self.reference and (mine.method, mine.set) == (other.method, other.set)

    def is_peer(self, variant: str) -> bool:
        """Neither TreeLoRA nor a bound, and no rows of earlier tasks: what equal quality is measured against."""
        found = self.variants[variant]
        return found.method != "treelora" and not found.replay and self.in_order(variant)


def _refuse_repeated(where: str, values: Sequence[Any]) -> None:
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ValueError(f"{where}: {twice[0]} is there twice")


def load_study(path: str | Path) -> Study:
    """Read and check a study.

    Raises:
        ConfigError: names the file, the key, its value and what would be right.
    """
    return validated(Study, read_mapping(Path(path), "a study", "benchmarks/studies has some"), str(path))


def reduce_study(study: Study) -> Study:
    """The same study in minutes: one order, one seed, few rows, no tuning. For seeing that all of it works."""
    less = study.reduced
    return study.model_copy(
        update={
            "name": f"{study.name}, reduced",
            "orders": (study.orders[0][: less.tasks],),
            "seeds": study.seeds[:1],
            "tuning": None,
            "steps": less.steps or study.steps,
            "overrides": study.overrides | less.overrides,
        }
    )


@dataclass(frozen=True)
class Job:
    """One run that the study asks for."""

    variant: str
    order: int
    """Place in the study's orders, from 1; while tuning, in the tuning's."""
    seed: int
    steps: int | None
    """Steps a task; None: the recipe's length."""
    setting: Setting
    config: ExperimentConfig

    @property
    def label(self) -> str:
        """For people."""
        steps = f", {self.steps} steps" if self.steps else ""
        chosen = "".join(f", {key.split('.')[-1]} {value:g}" for key, value in self.setting.items())
        return f"{self.variant}, order {self.order}, seed {self.seed}{steps}{chosen}"


@dataclass(frozen=True)
class Bench:
    """A study and where its runs lie."""

    study: Study
    runs: Path
    overrides: tuple[str, ...] = ()
    """`key=value` of the person who runs it, such as where the data lie."""

    def __post_init__(self) -> None:
        fixed = [*RESERVED, *(["train.steps"] if self.study.steps else [])]
        if clash := [text for text in self.overrides if text.partition("=")[0].strip() in fixed]:
            raise ConfigError(f"override {clash[0]!r}: that is the study's to set; change the study's file")

    def job(
        self,
        variant: str,
        tasks: Sequence[str],
        order: int,
        seed: int,
        steps: int | None,
        setting: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
    ) -> Job:
        """The run of a variant on these tasks; `overrides` come on top of the study's.

        Raises:
            ConfigError: the configuration can't be run.
        """
        study, chosen = self.study, self.study.variants[variant]
        fixed: dict[str, Any] = {"method": chosen.method, "seed": seed, "output_dir": str(self.runs)}
        fixed |= {"stream.order": list(tasks), "stream.seed": seed}
        if steps:
            fixed["train.steps"] = steps
        if _has_seed(chosen.method):
            fixed[f"{chosen.method}.seed"] = seed  # what a method draws differs from run to run too
        shared = [*_texts(study.overrides), *_texts(overrides or {}), *self.overrides]
        texts = [*shared, *_texts(setting), *_texts(chosen.set), *_texts(fixed)]
        try:
            config = load_config(recipe_path(study.recipe), texts)
        except ConfigError as error:
            raise ConfigError(f"variant {variant!r}: {error}") from None
        if (
            not config.cluster.gpus_per_worker
        ):  # all runs in one dtype, and what was finished in another isn't of the study
            config = settled(config, torch.device("cpu"))
        name = f"{chosen.method}-s{seed}-{config.lasting_digest()[:12]}"
        return Job(variant, order, seed, steps, dict(setting), config.model_copy(update={"name": name}))

    def compared(self, variants: Iterable[str], settings: Mapping[str, Setting]) -> list[Job]:
        """The comparison at equal steps. Seeds and orders are outside, so that what is done is always paired."""
        steps = self.study.steps[-1] if self.study.steps else None
        return self._jobs(list(variants), settings, [steps])

    def quality(self, variants: Iterable[str], settings: Mapping[str, Setting]) -> list[Job]:
        """The same at the other numbers of steps."""
        wanted = set(variants)
        return self._jobs([v for v in self.study.graded if v in wanted], settings, self.study.steps[:-1])

    def _jobs(self, variants: list[str], settings: Mapping[str, Setting], counts: Sequence[int | None]) -> list[Job]:
        return [
            self.job(variant, tasks, place, seed, steps, settings.get(variant, {}))
            for seed in self.study.seeds
            for place, tasks in enumerate(self.study.orders, start=1)
            for steps in counts
            for variant in variants
            if place in self.study.places(variant)
        ]


def _has_seed(method: str) -> bool:
    section = ExperimentConfig.model_fields.get(method)
    return section is not None and "seed" in getattr(section.annotation, "model_fields", ())


def _texts(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
