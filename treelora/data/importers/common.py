"""What every importer shares: raw tasks and rows, the rule for unusable rows, finding folders, options."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from treelora.data.files import join, resolve
from treelora.data.schema import SPLITS, Example, Kind
from treelora.errors import ConfigError, DataError

Options = Mapping[str, Any]

# Names that sources use for our splits, in order of preference.
SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "dev", "eval", "valid"),
    "test": ("test",),
}
_EXAMPLES_SHOWN = 5


@dataclass(frozen=True)
class RawRow:
    """One source row before it is checked; ``index`` is its place in its file, from 0."""

    index: int
    prompt: object
    answer: object
    choices: object = None
    id: object = None
    problem: str | None = None


@dataclass(frozen=True)
class RawTask:
    """One source task: what it is, where it is, and its rows by our split names."""

    name: str
    where: str
    kind: Kind
    choices: tuple[str, ...]
    metric: str
    splits: Mapping[str, Iterable[RawRow]]
    family: str | None = None
    vocabulary: str | None = None


@dataclass
class Skipped:
    """Rows left out: how many for each reason, and the first few of them as "split[index]"."""

    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, row: str) -> None:
        """Count one row."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.rows.setdefault(reason, [])
        if len(shown) < _EXAMPLES_SHOWN:
            shown.append(row)


def text_problem(key: str, value: object) -> str | None:
    """Why a value can't be used as a text; None: it can."""
    if value is None:
        return f"{key} is null"
    if not isinstance(value, str):
        return f"{key} is {type(value).__name__}, not text"
    if not value.strip():
        return f"{key} is blank"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f"{key} is not UTF-8"
    return None


def _clean_choices(raw: object, kind: Kind, own: tuple[str, ...]) -> tuple[str, ...] | str:
    """The choices of a row, or why they can't be used."""
    if kind == "generation":
        return ()
    if raw is None:
        return own
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes) or not raw:
        return "choices are not a list of texts"
    if any(text_problem("choice", item) for item in raw) or len(set(raw)) != len(raw):
        return "choices are blank, repeated or not text"
    return tuple(str(item).strip() for item in raw)


def _clean(row: RawRow, task: RawTask, split: str, taken: set[str]) -> Example | str:
    """A checked example, or the reason to skip the row."""
    if row.problem:
        return row.problem
    for key, value in (("prompt", row.prompt), ("answer", row.answer)):
        if problem := text_problem(key, value):
            return problem
    answer = str(row.answer).strip()
    choices = _clean_choices(row.choices, task.kind, task.choices)
    if isinstance(choices, str):
        return choices
    if task.kind == "choice" and answer not in choices:
        return "label is '-' (no agreed label)" if answer == "-" else "answer is not among the choices"
    row_id = f"{split}-{row.index}" if row.id is None else str(row.id)
    if text_problem("id", row_id):
        return "id is blank or not UTF-8"
    if row_id in taken:
        return "id is repeated"
    taken.add(row_id)
    return Example(row_id, str(row.prompt), answer, choices)


def usable(task: RawTask, split: str, limit: int | None) -> tuple[list[Example], Skipped]:
    """The usable rows of a split, at most ``limit``, and what was left out; DataError if there are none."""
    rows: list[Example] = []
    skipped = Skipped()
    taken: set[str] = set()
    for raw in task.splits[split]:
        if limit is not None and len(rows) >= limit:
            break
        cleaned = _clean(raw, task, split, taken)
        if isinstance(cleaned, Example):
            rows.append(cleaned)
        else:
            skipped.add(cleaned, f"{split}[{raw.index}]")
    if not rows:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.counts.items()) or "no rows at all"
        raise DataError(f"{task.where}: task {task.name!r} has no usable rows in its {split} split ({reasons})")
    return rows, skipped


def read_bytes(uri: str) -> bytes:
    """A whole file, local or by URI."""
    fs, inner = resolve(uri)
    try:
        with fs.open_input_stream(inner) as source:
            return bytes(source.read())
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{uri}: can't be read ({error})") from error


def read_text(uri: str) -> str:
    """A text file. Bytes that are not UTF-8 become lone surrogates, which ``usable`` finds row by row."""
    return read_bytes(uri).decode("utf-8-sig", "surrogateescape")


def read_json_list(uri: str) -> list[Any]:
    """A JSON file that holds one list."""
    try:
        value = json.loads(read_text(uri))
    except ValueError as error:
        raise DataError(f"{uri}: not complete JSON ({error}); is the file cut short?") from error
    if not isinstance(value, list):
        raise DataError(f"{uri}: holds a {type(value).__name__}, expected a list of rows")
    return value


def list_files(root: str) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted."""
    fs, inner = resolve(root)
    inner = inner.rstrip("/")
    try:
        infos = fs.get_file_info(pafs.FileSelector(inner, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{root}: can't be listed ({error})") from error
    try:
        return sorted(info.path[len(inner) + 1 :] for info in infos if info.type == pafs.FileType.File)
    except UnicodeDecodeError as error:
        raise DataError(f"{root}: a file name below it is not UTF-8: {error.object!r}; rename it") from error


def find_tasks(root: str, marker: str, names: Sequence[str] | None) -> dict[str, str]:
    """{display name: folder} of the task folders below ``root``: those that hold a file ``marker``.

    A task answers to its folder's name or to its path below ``root``. The display name is the folder's name,
    or the path where two chosen folders share a name. DataError for unknown and ambiguous names and repeats.
    """
    base = root.rstrip("/")
    paths = [path.rpartition("/")[0] for path in list_files(base) if path.rpartition("/")[2] == marker]
    if not paths:
        raise DataError(f"{root}: no folder with a {marker} below it")
    leaf = {path: (path or base).rpartition("/")[2] for path in paths}
    chosen = paths if names is None else [_one(root, name, leaf) for name in names]
    found: dict[str, str] = {}
    for path in chosen:
        alone = sum(leaf[other] == leaf[path] for other in set(chosen)) == 1
        display = leaf[path] if alone else path
        if display in found:
            raise DataError(f"{root}: task {display!r} is asked for twice; name it once")
        found[display] = join(base, path) if path else base
    return found


def _one(root: str, name: str, leaf: Mapping[str, str]) -> str:
    matches = [path for path, last in leaf.items() if path and name.strip("/") == path]
    matches = matches or [path for path, last in leaf.items() if name == last]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise DataError(f"{root}: {name!r} could be {' or '.join(matches)}; give the longer name")
    raise DataError(f"{root}: no task {name!r}; there are {', '.join(sorted(leaf.values()))}")


def split_files(folder: str, suffix: str, options: Options) -> dict[str, str]:
    """{our split: file} of a task folder; DataError where train or test is missing.

    ``options["splits"]``, such as {"test": "dev"}, says which of the source's splits to take for ours.
    """
    here = {path for path in list_files(folder) if "/" not in path}
    found = choose_splits(folder, [name.removesuffix(suffix) for name in here if name.endswith(suffix)], options)
    return {split: join(folder, f"{source}{suffix}") for split, source in found.items()}


def choose_splits(where: str, available: Iterable[str], options: Options) -> dict[str, str]:
    """{our split: the source's split name}; see ``split_files``."""
    there = set(available)
    asked = options.get("splits", {})
    if unknown := set(asked) - set(SPLITS):
        raise ConfigError(f"options.splits names {sorted(unknown)}; our splits are {', '.join(SPLITS)}")
    found: dict[str, str] = {}
    for split in SPLITS:
        candidates = (asked[split],) if split in asked else SPLIT_NAMES[split]
        name = next((candidate for candidate in candidates if candidate in there), None)
        if name is not None:
            found[split] = name
        elif split != "validation" or split in asked:
            raise DataError(
                f"{where}: no {split} split ({' or '.join(candidates)}); there are {sorted(there)}. "
                f"Choose one with options.splits.{split}"
            )
    return found


def json_rows(uri: str, columns: Mapping[str, str]) -> Iterator[RawRow]:
    """Rows of a JSON list of objects; see ``object_rows``."""
    return object_rows(uri, enumerate(read_json_list(uri)), columns)


def object_rows(where: str, items: Iterable[tuple[int, Any]], columns: Mapping[str, str]) -> Iterator[RawRow]:
    """Rows from (index, object); ``columns`` maps prompt, answer, choices and id to keys of the object.

    DataError where the first object lacks the prompt's or the answer's key: that's a wrong column, not a row.
    """
    checked = False
    for index, item in items:
        if isinstance(item, RawRow):
            yield item
            continue
        if not isinstance(item, Mapping):
            yield RawRow(index, None, None, problem="row is not an object")
            continue
        if not checked:
            for key in ("prompt", "answer"):
                if columns[key] not in item:
                    raise DataError(
                        f"{where}: row {index}: no column '{columns[key]}' for the {key}; found "
                        f"{sorted(item)}. Name it with options.columns.{key}"
                    )
            checked = True
        get = {key: item.get(column) for key, column in columns.items()}
        yield RawRow(index, get["prompt"], get["answer"], get.get("choices"), get.get("id"))
