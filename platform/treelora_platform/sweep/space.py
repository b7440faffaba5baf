"""The space of a sweep: refused while it costs nothing, and as Ray Tune takes it."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from typing import Any

from treelora.errors import ConfigError
from treelora_platform.config import ExperimentConfig
from treelora_platform.sweep.spec import Range, SweepSpec, trial_config

PROBES = 64


def check_space(spec: SweepSpec, shared: dict[str, Any]) -> ExperimentConfig:
    """See that every value in the space makes a valid configuration; returns the first one.

    Each value is tried alone; then all combinations of a grid, or some drawn at random.

    Args:
        spec: The sweep.
        shared: What its trials share: `template(spec)`.

    Raises:
        ConfigError: names the key, the value and what would be right.
    """
    first = {key: _ends(values)[0] for key, values in spec.space.items()}
    base = trial_config(shared, {})
    known = set(base.flat()) | {key for flat in base.flat() for key in _parents(flat)}
    if unknown := [key for key in spec.space if key not in known]:
        raise ConfigError(f"space: no field {unknown[0]!r} in the configuration{_nearest(unknown[0], known)}")
    for key, domain in spec.space.items():
        for value in _ends(domain):
            _valid(shared, {**first, key: value}, f"space.{key} = {value!r}")
    combinations = grid(spec) if spec.search == "grid" else draws(spec, PROBES)
    for values in itertools.islice(combinations, PROBES):
        _valid(shared, values, "this combination of the space can't be run")
    mode = spec.mode or base.treelora.inference
    if {"op", "bwt"} & spec.objectives.keys() and mode not in base.evaluation.modes:
        raise ConfigError(f"mode: {mode!r} isn't scored; add it to evaluation.modes {list(base.evaluation.modes)}")
    if spec.scheduler.kind == "asha" and spec.primary not in ("op", "bwt"):
        raise ConfigError(f"objectives: asha stops trials by op or bwt; put one of them before {spec.primary!r}")
    return trial_config(shared, first)


def check_rungs(spec: SweepSpec, tasks: int) -> None:
    """See that the scheduler has something to stop in a stream of so many tasks.

    Raises:
        ConfigError: it hasn't.
    """
    if spec.scheduler.kind == "asha" and spec.scheduler.grace_tasks >= tasks:
        raise ConfigError(
            f"scheduler.grace_tasks: {spec.scheduler.grace_tasks} of {tasks} tasks leave nothing to stop early; "
            "lower it, or set scheduler.kind to none"
        )


def grid(spec: SweepSpec) -> Iterator[dict[str, Any]]:
    """All combinations, the last key running fastest."""
    for values in itertools.product(*spec.lists.values()):
        yield dict(zip(spec.lists, values, strict=True))


def draws(spec: SweepSpec, count: int) -> Iterator[dict[str, Any]]:
    """Combinations drawn at random, as `random` would."""
    generator = random.Random(spec.seed)
    for _ in range(count):
        yield {key: draw(values, generator) for key, values in spec.space.items()}


def draw(values: list[Any] | Range, generator: random.Random) -> Any:
    """One value of a key."""
    if isinstance(values, list):
        return generator.choice(values)
    if values.log:
        number = math.exp(generator.uniform(math.log(values.low), math.log(values.high)))
        number = min(max(number, values.low), values.high)
        return round(number) if values.whole else number
    if values.whole:
        return generator.randint(int(values.low), int(values.high))
    return generator.uniform(values.low, values.high)


def tune_space(spec: SweepSpec) -> dict[str, Any]:
    """The space for a search algorithm of Ray Tune; values of lists travel as JSON (`decode`)."""
    from ray import tune

    def domain(values: list[Any] | Range) -> Any:
        if isinstance(values, list):
            return tune.choice([encode(value) for value in values])
        if values.whole:
            low, high = int(values.low), int(values.high) + 1  # Tune leaves the upper end out
            return tune.lograndint(low, high) if values.log else tune.randint(low, high)
        return tune.loguniform(values.low, values.high) if values.log else tune.uniform(values.low, values.high)

    return {wire_name(key): domain(values) for key, values in spec.space.items()}


def encode(value: Any) -> str:
    """A listed value as text, since search algorithms compare and sort choices, and some values are lists."""
    return json.dumps(value, sort_keys=True)


def decode(spec: SweepSpec, sampled: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys and plain values from what Ray Tune sampled."""
    found = {}
    for key, values in spec.space.items():
        value = sampled[wire_name(key)]
        found[key] = json.loads(value) if isinstance(values, list) else int(value) if values.whole else float(value)
    return found


def wire_name(key: str) -> str:
    """A dotted key as it travels through Ray Tune."""
    return key.replace(".", ":")  # Tune would look for a nested mapping


def _ends(values: list[Any] | Range) -> list[Any]:
    return values if isinstance(values, list) else [values.low, values.high]


def _valid(shared: dict[str, Any], values: dict[str, Any], where: str) -> None:
    try:
        trial_config(shared, values)
    except ConfigError as error:
        shown = ", ".join(f"{key}={value}" for key, value in values.items())
        raise ConfigError(f"{where} ({shown}): {error}") from None


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _nearest(key: str, known: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
