"""The built-in stream: six small tasks in plain English, made by code, with nothing to download.

All tasks read notes of one kind ("Last night the horse fell asleep and Anna smiled happily.") and differ in
what they ask: a rule (time, mood or subject of the note) and a vocabulary (colours or directions) that must
be learnt to answer it. Each rule meets both vocabularies and each vocabulary all rules, so a tree of tasks
can be scored by rule and by vocabulary apart. Every note has a time, a mood and a subject, drawn apart:
only the question says which of them counts, so learning one task pulls at the answers of the others. Chance
is 1/2.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from treelora.data.files import join
from treelora.data.parquet import write_split
from treelora.data.schema import Example, SplitMeta
from treelora.data.task import Task, open_task
from treelora.errors import DataError

T = TypeVar("T")

# A small part of the 384,000 notes there are, so that drawing a new one stays quick.
MAX_ROWS = 10_000

_NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack"),
    *("Kate", "Leo", "Maria", "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tina", "Victor"),
)
_TIMES = {
    "past": ("yesterday", "last night", "last week", "last summer", "two days ago", "an hour ago"),
    "future": ("tomorrow", "tomorrow night", "next week", "next summer", "in two days", "in an hour"),
}
_SUBJECTS = {
    "animal": (
        *("horse", "dog", "cat", "cow", "sheep", "goat", "lion", "tiger"),
        *("bear", "wolf", "fox", "rabbit", "duck", "owl", "pig", "donkey"),
    ),
    "vehicle": (
        *("car", "bus", "truck", "train", "tram", "van", "taxi", "lorry"),
        *("bicycle", "motorbike", "tractor", "boat", "ship", "ferry", "jeep", "scooter"),
    ),
}
# What subjects do and how people feel about it, as (past, future). Every value shows in two words at least:
# a small model has to find them in some 20 steps.
_DEEDS = {
    "animal": (
        ("ate some food", "will eat some food"),
        ("fell asleep", "will fall asleep"),
        ("had a baby", "will have a baby"),
        ("drank water", "will drink water"),
        ("hunted for food", "will hunt for food"),
    ),
    "vehicle": (
        ("ran out of fuel", "will run out of fuel"),
        ("was repaired", "will be repaired"),
        ("was repainted", "will be repainted"),
        ("needed an engine", "will need an engine"),
        ("was parked", "will be parked"),
    ),
}
_MOODS = {
    "positive": (
        ("smiled happily", "will smile happily"),
        ("was happy and proud", "will be happy and proud"),
        ("felt happy", "will feel happy"),
        ("was glad and happy", "will be glad and happy"),
        ("laughed happily", "will laugh happily"),
    ),
    "negative": (
        ("cried sadly", "will cry sadly"),
        ("was sad and angry", "will be sad and angry"),
        ("felt sad", "will feel sad"),
        ("was upset and sad", "will be upset and sad"),
        ("wept sadly", "will weep sadly"),
    ),
}
_VALUES: dict[str, tuple[str, str]] = {
    "mood": ("positive", "negative"),
    "time": ("past", "future"),
    "subject": ("animal", "vehicle"),
}


@dataclass(frozen=True)
class _Spec:
    """One task: its rule, its vocabulary, the question, and the answers to the rule's two values."""

    rule: str
    vocabulary: str
    question: str
    answers: tuple[str, str]


# Interleaved: neighbours differ in both. Within a vocabulary the rules disagree about most notes.
_SPECS: dict[str, _Spec] = {
    "time-colours": _Spec("time", "colours", "Past or future? Red or blue:", ("blue", "red")),
    "mood-directions": _Spec("mood", "directions", "Good or bad mood? Left or right:", ("left", "right")),
    "subject-colours": _Spec("subject", "colours", "Animal or machine? Red or blue:", ("blue", "red")),
    "time-directions": _Spec("time", "directions", "Done or to come? Left or right:", ("right", "left")),
    "mood-colours": _Spec("mood", "colours", "Happy or sad? Red or blue:", ("red", "blue")),
    "subject-directions": _Spec("subject", "directions", "Creature or vehicle? Left or right:", ("left", "right")),
}


def builtin_names() -> tuple[str, ...]:
    """Names of the built-in tasks, in the default order of the stream."""
    return tuple(_SPECS)


def _spec(name: str) -> _Spec:
    if name not in _SPECS:
        raise DataError(f"no built-in task {name!r}; there are {', '.join(_SPECS)}")
    return _SPECS[name]


def _note(rng: random.Random, values: Mapping[str, str]) -> str:
    """One note; only ``Random.random`` is used, whose sequence Python promises to keep for a seed."""

    def pick(items: Sequence[T]) -> T:
        return items[int(rng.random() * len(items))]

    future = values["time"] == "future"
    when = pick(_TIMES[values["time"]])
    subject = f"the {pick(_SUBJECTS[values['subject']])} {pick(_DEEDS[values['subject']])[future]}"
    feeling = f"{pick(_NAMES)} {pick(_MOODS[values['mood']])[future]}"
    return f"{when[0].upper()}{when[1:]} {subject} and {feeling}."


def generate(name: str, split_sizes: Mapping[str, int], seed: int) -> dict[str, tuple[list[Example], SplitMeta]]:
    """Rows and description of every split of one task, in balanced classes; no two rows share a prompt.

    A pure function of its arguments. A task's rows don't depend on which other tasks are made.
    """
    spec = _spec(name)
    if sum(split_sizes.values()) > MAX_ROWS:
        raise DataError(f"built-in task {name!r}: {sum(split_sizes.values())} rows; it makes at most {MAX_ROWS}")
    rng = random.Random(f"treelora/{seed}/{name}")
    prompts: set[str] = set()
    made: dict[str, tuple[list[Example], SplitMeta]] = {}
    for split, size in split_sizes.items():
        rows: list[Example] = []
        while len(rows) < size:
            values = {rule: options[rng.random() < 0.5] for rule, options in _VALUES.items()}
            which = len(rows) % 2
            values[spec.rule] = _VALUES[spec.rule][which]
            prompt = f"{_note(rng, values)} {spec.question}"
            if prompt in prompts:
                continue
            prompts.add(prompt)
            rows.append(Example(f"{name}-{split}-{len(rows)}", prompt, spec.answers[which], ()))
        meta = SplitMeta(
            name=name,
            kind="choice",
            choices=tuple(sorted(spec.answers)),
            metric="accuracy",
            split=split,
            source=f"builtin seed {seed}",
            family=spec.rule,
            vocabulary=spec.vocabulary,
        )
        made[split] = (rows, meta)
    return made


def write_builtin(
    out: Path, names: Sequence[str] | None = None, train_rows: int = 160, test_rows: int = 64, seed: int = 0
) -> list[Task]:
    """Write built-in tasks below ``out`` (all of them without ``names``) and open them, in that order."""
    tasks = []
    for name in builtin_names() if names is None else names:
        for split, (rows, meta) in generate(name, {"train": train_rows, "test": test_rows}, seed).items():
            write_split(join(join(out, name), f"{split}.parquet"), rows, meta)
        tasks.append(open_task(join(out, name)))
    return tasks
