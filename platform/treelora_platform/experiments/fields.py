"""Fields of recorded runs: their values, conditions on them (`lora.rank>4`), and those that bear on a run's scores."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from treelora.errors import DataError
from treelora_platform.experiments.records import RunRecord

# Where a run lies, how it is tracked and saved, and what is measured: none of it changes a score.
IDLE = frozenset(
    {"name", "output_dir", "tracking", "checkpoint", "sweep"}
    | {"evaluation.modes", "evaluation.forward", "evaluation.batch_rows", "stream.order", "stream.options"}
)
# How a step is computed: times differ with it, scores by rounding only.
MACHINE = frozenset({"cluster", "engine"})
ORDER, SEED, DATA = "order", "seed", "data_hash"
REPLICATE = (ORDER, SEED, DATA)
"""What the runs of a group are expected to differ in. `order` tells the tasks' order even where none was asked for."""
_CONDITION = re.compile(r"\s*([^=!<>]+?)\s*(!=|<=|>=|==?|<|>)\s*(.*?)\s*", re.DOTALL)
_SHOWN = 30


def field(record: RunRecord, key: str) -> str | None:
    """`record.value`, but None for another method's settings; `tasks` are the slugs of the tasks in any order."""
    if key == "tasks":
        return ", ".join(sorted(record.task_set)) or None
    if key in record.params and record.is_idle(key):
        return None
    return record.value(key)


def settings(record: RunRecord) -> dict[str, str]:
    """All that bears on the run's scores: fields of its own method, filled with defaults, and `REPLICATE`.

    A field that is newer than the run has the default, if other fields of its section were recorded.
    """
    sections = {key.partition(".")[0] for key in record.params if "." in key}
    filled = {key: text for key, text in _defaults().items() if key.partition(".")[0] in sections and "." in key}
    found = {key: text for key, text in (filled | record.params).items() if bears(key) and not record.is_idle(key)}
    if DATA in record.tags:
        found.pop("stream.path", None)  # the same data may lie elsewhere
    replicate = {ORDER: record.tags.get(ORDER), SEED: record.value(SEED), DATA: record.tags.get(DATA)}
    return found | {key: text for key, text in replicate.items() if text is not None}


def bears(key: str) -> bool:
    """Whether a field of the configuration can change scores by more than rounding."""
    section = key.partition(".")[0]
    return not {key, section} & (IDLE | MACHINE)


@lru_cache(maxsize=1)
def _defaults() -> Mapping[str, str]:
    from treelora_platform.config import ExperimentConfig
    from treelora_platform.tracking_state import loggable_params

    return loggable_params(ExperimentConfig().as_dict())


@dataclass(frozen=True)
class Condition:
    """`key operator text`; equal are equal texts and equal numbers, and only numbers are less or greater."""

    key: str
    operator: str
    text: str

    def holds(self, record: RunRecord) -> bool:
        """Whether a run fits; one that lacks the field fits `!=` only."""
        value = field(record, self.key)
        if value is None:
            return self.operator == "!="
        mine, theirs = as_number(value), as_number(self.text)
        equal = value == self.text or (mine is not None and mine == theirs)
        if self.operator in ("=", "!="):
            return equal == (self.operator == "=")
        if mine is None or theirs is None:
            return False
        return mine < theirs if self.operator == "<" else mine > theirs if self.operator == ">" else (
            equal or (mine < theirs) == (self.operator == "<=")
        )  # fmt: skip


def parse_condition(text: str) -> Condition:
    """Read `key=value`, `key!=value`, or `<`, `<=`, `>`, `>=` with a number.

    Raises:
        DataError: says what is right.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise DataError(f"filter {text!r}: write key=value, key!=value or key<number, such as lora.rank=8")
    key, operator, value = match.groups()
    operator = operator.replace("==", "=")
    if operator not in ("=", "!=") and as_number(value) is None:
        raise DataError(f"filter {text!r}: {operator} wants a number after it, such as lora.rank{operator}8")
    return Condition(key, operator, value)


def matching(records: Sequence[RunRecord], filters: Sequence[str]) -> list[RunRecord]:
    """Runs that fit all conditions.

    Raises:
        DataError: a condition is none, names no field of these runs, or leaves none of them.
    """
    kept = list(records)
    for text in filters:
        condition = parse_condition(text)
        check_keys([condition.key], records, f"filter {text!r}")
        fitting = [record for record in kept if condition.holds(record)]
        if not fitting:
            there = show_values(field(record, condition.key) for record in kept)
            raise DataError(f"filter {text!r}: fits none of {len(kept)} runs; {condition.key} there is {there}")
        kept = fitting
    return kept


def check_keys(keys: Iterable[str], records: Sequence[RunRecord], where: str) -> None:
    """See that each key is a field or a tag of some run.

    Raises:
        DataError: names what exists.
    """
    known = {"tasks", *(key for run in records for key in (*run.params, *run.tags))}
    for key in keys:
        if key in known or (key.startswith("tags.") and key.removeprefix("tags.") in known):
            continue
        close = difflib.get_close_matches(key, known, n=3)
        if close:
            hint = f"did you mean {' or '.join(map(repr, close))}?"
        else:
            varying = sorted(k for k in known if len({field(run, k) for run in records}) > 1)
            listed = ", ".join(varying[:_SHOWN]) + (", ..." if len(varying) > _SHOWN else "")
            hint = f"fields that differ between the runs: {listed or 'none'}"
        raise DataError(f"{where}: no run has a field or tag {key!r}; {hint}")


def as_number(text: str) -> float | None:
    """The number that a text is, if it is one."""
    try:
        number = float(text)
    except ValueError:
        return None
    return None if number != number else number


def sort_key(value: str | None) -> tuple[int, float, str]:
    """Order of values: numbers by size, then texts, then what is missing."""
    if value is None:
        return (2, 0.0, "")
    number = as_number(value)
    return (1, 0.0, value) if number is None else (0, number, value)


def shorter(text: str) -> str:
    """A drawn number to four digits; every other text as it is."""
    try:
        return f"{float(text):.4g}" if "." in text and len(text) > 8 else text
    except ValueError:
        return text


def show_values(values: Iterable[str | None], limit: int = 6) -> str:
    """Distinct values in order, at most so many: `4, 8, none`."""
    distinct = sorted(set(values), key=sort_key)
    texts = ["none" if value is None else shorter(value) for value in distinct]
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")
