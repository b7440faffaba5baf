"""Search algorithms and schedulers of Ray Tune, as a sweep asks for them."""

from __future__ import annotations

from typing import Any

from treelora_platform.sweep.journal import Entry
from treelora_platform.sweep.space import draws, encode, grid, tune_space, wire_name
from treelora_platform.sweep.spec import Range, SweepSpec


def trials_of(spec: SweepSpec, known: list[Entry]) -> tuple[Any, Any, int]:
    """Search algorithm, domain of the values, and how many samples Tune takes; `known`: trials that began before."""
    from ray import tune

    if spec.search == "optuna":
        return optuna_search(spec, known), tune_space(spec), spec.trials
    listed = grid(spec) if spec.search == "grid" else draws(spec, spec.trials)
    return None, tune.grid_search([{wire_name(k): wire(spec, k, v) for k, v in one.items()} for one in listed]), 1


def wire(spec: SweepSpec, key: str, value: Any) -> Any:
    """A value as it travels through Ray Tune."""
    return value if isinstance(spec.space[key], Range) else encode(value)


def optuna_search(spec: SweepSpec, known: list[Entry]) -> Any:
    """Optuna's search, which is first told of the trials that began before: they end at once, and so inform it."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    points = [{f"values/{wire_name(k)}": wire(spec, k, v) for k, v in entry.values.items()} for entry in known]
    scores: list[str] = list(spec.objectives)
    better: list[str] = list(spec.objectives.values())
    one = len(scores) == 1
    return OptunaSearch(
        metric=scores[0] if one else scores,
        mode=better[0] if one else better,
        points_to_evaluate=points or None,
        seed=spec.seed + len(known),  # with the same seed a sweep that goes on would draw its first trials again
    )


def scheduler_of(spec: SweepSpec, tasks: int) -> Any:
    """What ends trials early in a stream of so many tasks."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

    if spec.scheduler.kind == "none":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="tasks",
        metric=spec.primary,
        mode=spec.objectives[spec.primary],
        max_t=tasks,
        grace_period=spec.scheduler.grace_tasks,
        reduction_factor=spec.scheduler.reduction_factor,
    )
