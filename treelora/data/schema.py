"""What a split file holds: its rows, its description, and the rules that both must keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from treelora.data.names import slugify
from treelora.errors import DataError

FORMAT = 1
METADATA_KEY = b"treelora.task"
SPLITS = ("train", "validation", "test")
METRICS = ("accuracy", "exact_match", "rouge_l", "sari", "edit_similarity")
Kind = Literal["choice", "generation"]

TEXT_COLUMNS = ("id", "prompt", "answer")


@dataclass(frozen=True)
class Example:
    """One row: what the model reads, what it should write, and what it may choose from (() = free text)."""

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitMeta:
    """What a split file says about its task. ``skipped`` counts source rows that the importer left out."""

    name: str
    kind: Kind
    choices: tuple[str, ...]
    metric: str
    split: str
    source: str
    family: str | None = None
    vocabulary: str | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise DataError("a task needs a name that isn't blank")
        for key, value, allowed in (
            ("kind", self.kind, get_args(Kind)),
            ("metric", self.metric, METRICS),
            ("split", self.split, SPLITS),
        ):
            if value not in allowed:
                raise DataError(f"task {self.name!r}: {key} is {value!r}; use one of {', '.join(allowed)}")
        if len(set(self.choices)) != len(self.choices):
            raise DataError(f"task {self.name!r}: choices repeat: {list(self.choices)}")

    def to_dict(self, rows: int) -> dict[str, Any]:
        """The JSON object stored in the file."""
        return {
            "format": FORMAT,
            "name": self.name,
            "slug": slugify(self.name),
            "kind": self.kind,
            "choices": list(self.choices),
            "metric": self.metric,
            "family": self.family,
            "vocabulary": self.vocabulary,
            "source": self.source,
            "split": self.split,
            "rows": rows,
            "skipped": dict(sorted(self.skipped.items())),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "SplitMeta":
        """Inverse of ``to_dict``; KeyError or TypeError where a field is missing or odd."""
        if raw["format"] != FORMAT:
            raise DataError(f"format {raw['format']!r}, this version reads format {FORMAT}; import the task again")
        return cls(
            name=str(raw["name"]),
            kind=raw["kind"],
            choices=tuple(str(choice) for choice in raw["choices"]),
            metric=raw["metric"],
            split=raw["split"],
            source=str(raw["source"]),
            family=raw.get("family"),
            vocabulary=raw.get("vocabulary"),
            skipped={str(reason): int(count) for reason, count in raw["skipped"].items()},
        )


def check_rows(where: str, meta: SplitMeta, examples: Sequence[Example]) -> None:
    """Refuse an empty split, blank fields, repeated ids and answers outside their choices, naming the row."""
    if not examples:
        raise DataError(f"{where}: task {meta.name!r} has no usable rows in its {meta.split} split")
    seen: dict[str, int] = {}
    for i, row in enumerate(examples):
        for key in TEXT_COLUMNS:
            if not getattr(row, key).strip():
                raise DataError(f"{where}: row {i}: '{key}' is blank; remove the row or fill it in")
        if (first := seen.setdefault(row.id, i)) != i:
            raise DataError(f"{where}: row {i}: id {row.id!r} is taken by row {first}; ids must differ")
        allowed = row.choices or meta.choices
        if meta.kind == "choice" and row.answer not in allowed:
            raise DataError(f"{where}: row {i}: answer {row.answer!r} is not among the choices {list(allowed)}")
