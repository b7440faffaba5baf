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
Kind = Literal["choice", "generation", "image"]
PROTOCOLS = ("class_incremental", "domain_incremental", "task_incremental")

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
    """What a split file says about its task. ``skipped`` counts source rows that the importer left out.

    ``protocol`` says how a stream of image tasks is cut (van de Ven, Tuytelaars & Tolias 2022, Nature Machine
    Intelligence 4): new classes in every task, the same classes from new domains, or new classes with the
    task known. None for text.
    """

    name: str
    kind: Kind
    choices: tuple[str, ...]
    metric: str
    split: str
    source: str
    family: str | None = None
    vocabulary: str | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    protocol: str | None = None

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
        self._check_protocol()

    def _check_protocol(self) -> None:
        if self.kind != "image":
            if self.protocol is not None:
                raise DataError(
                    f"task {self.name!r}: protocol {self.protocol!r} is for images, its kind is {self.kind!r}"
                )
            return
        if self.protocol not in PROTOCOLS:
            raise DataError(f"task {self.name!r}: protocol is {self.protocol!r}; use one of {', '.join(PROTOCOLS)}")
        if self.metric != "accuracy":
            raise DataError(f"task {self.name!r}: metric is {self.metric!r}; images are judged by accuracy")
        if not self.choices:
            raise DataError(f"task {self.name!r}: choices are empty; an image task names its classes")

    def to_dict(self, rows: int) -> dict[str, Any]:
        """The JSON object stored in the file."""
        description = {
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
        # Text files keep the bytes, and so the fingerprints, that they had before there were images.
        return description if self.protocol is None else {**description, "protocol": self.protocol}

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
            protocol=raw.get("protocol"),
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
