"""From a labelled data set to a stream: which classes or domains make which task.

Protocols as in van de Ven, Tuytelaars & Tolias (2022), Nature Machine Intelligence 4, 1185-1197.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treelora.data.images.sources.common import natural, permutation, whole_option
from treelora.data.schema import PROTOCOLS
from treelora.errors import ConfigError, DataError

PROTOCOL_OPTIONS = frozenset({"protocol", "tasks", "classes_per_task", "class_seed", "base_classes"})
BASE_NAME = "base classes"
_MAX_NAME = 40


@dataclass(frozen=True)
class TaskPlan:
    """One task to be made: its classes in order, and its domain where domains make the tasks."""

    name: str
    choices: tuple[str, ...]
    domain: str | None = None


@dataclass(frozen=True)
class Plan:
    """The tasks in order, and the classes held out for pre-training."""

    protocol: str
    tasks: tuple[TaskPlan, ...]
    base: tuple[str, ...]


def class_order(classes: Collection[str], class_seed: int | None) -> tuple[str, ...]:
    """Classes in natural order ("2" before "10"), or a permutation of it by the seed."""
    ordered = sorted(classes, key=natural)
    if class_seed is None:
        return tuple(ordered)
    return tuple(ordered[int(i)] for i in permutation(len(ordered), "classes", class_seed))


def cut(classes: Sequence[str], tasks: int | None, classes_per_task: int | None) -> list[tuple[str, ...]]:
    """Classes in tasks of equal size, the last one smaller where they don't divide.

    Raises:
        ConfigError: not exactly one of the two numbers is given.
        DataError: a task would have one class or none.
    """
    if (tasks is None) == (classes_per_task is None):
        raise ConfigError("give one of options.tasks and options.classes_per_task")
    n = len(classes)
    size = classes_per_task if classes_per_task is not None else -(-n // (tasks or 1))
    parts = [tuple(classes[start : start + size]) for start in range(0, n, size)]
    asked = f"{tasks} tasks" if tasks is not None else f"tasks of {classes_per_task}"
    if not parts or (tasks is not None and len(parts) != tasks):
        raise DataError(f"{n} classes can't make {asked}: {len(parts)} of {size} hold them all; ask for fewer")
    if alone := [part[0] for part in parts if len(part) == 1]:
        raise DataError(
            f"{n} classes in {asked} leave a task with the single class {alone[0]!r}, where there is nothing to tell "
            "apart; choose options.tasks, classes_per_task or base_classes so that each task has two"
        )
    return parts


def class_names(parts: Sequence[Sequence[str]]) -> list[str]:
    """Names for tasks of classes: the classes themselves where all names stay short, else their positions."""
    spelt = ["classes " + " and ".join(part) for part in parts]
    if all(len(name) <= _MAX_NAME for name in spelt):
        return spelt
    ends = [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
    return [f"classes {end - len(part) + 1}-{end}" for part, end in zip(parts, ends, strict=True)]


def base_classes(where: str, order: Sequence[str], options: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that are held out for pre-training, in the order of all classes."""
    wanted = options.get("base_classes")
    if not isinstance(wanted, list | tuple):
        return tuple(order[: whole_option(options, "base_classes", 0, 0) or 0])
    if unknown := [name for name in wanted if name not in order]:
        raise ConfigError(f"{where}: base class {unknown[0]!r} isn't one of its classes, {', '.join(order[:10])} ...")
    return tuple(name for name in order if name in wanted)


def plan_tasks(
    where: str,
    classes: Collection[str],
    domains: Collection[str],
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> Plan:
    """The tasks that the options ask for.

    Options: ``protocol`` (class_incremental), ``tasks`` or ``classes_per_task``, ``class_seed`` (none: natural
    order), ``base_classes`` (0): that many classes of the order, or those named, appear in no task. Raises
    ConfigError for options that contradict each other or the data, DataError naming ``where`` for tasks that could
    not be learnt.
    """
    protocol = options.get("protocol") or "class_incremental"
    if protocol not in PROTOCOLS:
        raise ConfigError(f"options.protocol is {protocol!r}; use one of {', '.join(PROTOCOLS)}")
    tasks = whole_option(options, "tasks", None, 1)
    per_task = whole_option(options, "classes_per_task", None, 1)
    order = class_order(classes, whole_option(options, "class_seed", None, 0))
    base = base_classes(where, order, options)
    rest = tuple(name for name in order if name not in base)
    if len(rest) < 2:
        raise DataError(
            f"{where}: {len(rest)} of {len(order)} classes are left for tasks after {len(base)} base classes; "
            "at least two are needed"
        )
    if protocol == "domain_incremental":
        if tasks is not None or per_task is not None:
            raise ConfigError("options.tasks and classes_per_task don't go with domain_incremental: domains make tasks")
        if not domains:
            raise ConfigError(f"{where}: domain_incremental needs domains, as layout domain/split/class has them")
        # Domains have their classes in common, so that no order of classes can tell them apart.
        shared = tuple(sorted(rest, key=natural))
        return Plan(protocol, tuple(TaskPlan(d, shared, d) for d in sorted(domains, key=natural)), base)
    if tasks is None and per_task is None:
        if not defaults:
            raise ConfigError(f"{where}: say how its {len(rest)} classes make tasks: options.tasks or classes_per_task")
        tasks, per_task = defaults.get("tasks"), defaults.get("classes_per_task")
    try:
        parts = cut(rest, tasks, per_task)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    named = zip(class_names(parts), parts, strict=True)
    return Plan(protocol, tuple(TaskPlan(name, part) for name, part in named), base)
