"""Tokenised splits: made once, cached by content hash as Arrow, memory-mapped by every worker."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from treelora.data.prompting import (
    Frame,
    PromptStyle,
    Tokenizer,
    answer_with_end,
    cut_left,
    encode,
    resolve_frame,
    tokenizer_fingerprint,
)
from treelora.data.schema import Example
from treelora.data.sealed import read_sealed, write_sealed
from treelora.data.task import Task
from treelora.errors import ConfigError, DataError

__all__ = ["PromptStyle", "TokenizedRows", "tokenize_split"]

log = logging.getLogger(__name__)

CACHE_FORMAT = 2
Ids = npt.NDArray[np.int32]

_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("answer_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("choice_ids", pa.list_(pa.list_(pa.int32())), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
    ]
)


class TokenizedRows:
    """A memory-mapped tokenised split.

    Arrays are read-only views into the file. ``answer_ids`` and ``choice_ids`` end in the end-of-answer
    token. lengths, prompt_lengths, answer_lengths: int64 [rows], in tokens. truncated: rows whose prompt was
    cut. skipped: {reason: rows} left out because the tokenizer makes nothing of them. key: the file's name.
    """

    def __init__(self, path: Path, batch: pa.RecordBatch, info: dict[str, Any]) -> None:
        self.path = path
        self.key = path.stem
        self.truncated: int = info["truncated"]
        self.skipped: dict[str, int] = info["skipped"]
        self.max_length: int = info["max_length"]
        self._ids = batch.column("id")
        self._prompts = _Lists(batch.column("prompt_ids"))
        self._answers = _Lists(batch.column("answer_ids"))
        self._row_choices = np.asarray(batch.column("choice_ids").offsets)
        self._choices = _Lists(batch.column("choice_ids").values)
        self.labels: Ids = np.asarray(batch.column("label"))
        self.prompt_lengths = self._prompts.lengths
        self.answer_lengths = self._answers.lengths
        self.lengths = self.prompt_lengths + self.answer_lengths

    @classmethod
    def open(cls, path: str | Path) -> "TokenizedRows":
        """Map a cache file; DataError where its checksum or its schema is not what was written."""
        path = Path(path)
        batches, info = read_sealed(path)
        if [batch.schema.remove_metadata() for batch in batches] != [_SCHEMA] or info.get("format") != CACHE_FORMAT:
            raise DataError(f"{path}: not a cache file of this version; delete it")
        return cls(path, batches[0], info)

    def __len__(self) -> int:
        return len(self._ids)

    def row_id(self, i: int) -> str:
        """The example's id."""
        return str(self._ids[i].as_py())

    def prompt_ids(self, i: int) -> Ids:
        """int32 [P]."""
        return self._prompts[i]

    def answer_ids(self, i: int) -> Ids:
        """int32 [A], the end-of-answer token included."""
        return self._answers[i]

    def item(self, i: int) -> tuple[Ids, Ids]:
        """What ``collate`` takes of a row."""
        return self.prompt_ids(i), self.answer_ids(i)

    def choice_ids(self, i: int) -> list[Ids]:
        """One int32 [A_c] for each choice, as ``answer_ids`` would be; [] for generation."""
        return [self._choices[j] for j in range(self._row_choices[i], self._row_choices[i + 1])]

    def label(self, i: int) -> int:
        """Index of the answer among the choices; -1 for generation."""
        return int(self.labels[i])

    def pairs(self, indices: Iterable[int]) -> list[tuple[Ids, Ids]]:
        """(prompt_ids, answer_ids) of some rows, as ``collate`` takes them."""
        return [self.item(int(i)) for i in indices]


class _Lists:
    """Item access to an Arrow list<int32> without building Python objects."""

    def __init__(self, column: pa.ListArray) -> None:
        self._offsets = np.asarray(column.offsets)
        self._values: Ids = np.asarray(column.values)
        self.lengths: npt.NDArray[np.int64] = np.diff(self._offsets).astype(np.int64)

    def __getitem__(self, i: int) -> Ids:
        if not 0 <= i < len(self.lengths):
            raise IndexError(f"row {i} of {len(self.lengths)}")
        return self._values[self._offsets[i] : self._offsets[i + 1]]


def tokenize_split(
    task: Task,
    split: str,
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_length: int,
    cache_dir: str | Path,
    *,
    refuse_long: bool = False,
) -> TokenizedRows:
    """The tokenised rows of a split, from the cache where it has them.

    A prompt that leaves no room for its answer (or its longest choice) within ``max_length`` tokens is cut on
    the left, behind the template's head; the answer is never cut. Raises DataError naming the row whose
    answer alone doesn't fit and, with ``refuse_long``, where any prompt would be cut; ConfigError for a
    ``max_length`` below 2.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; a prompt and an answer need at least 2 tokens")
    style_key = [style.template, style.system]
    key_parts = [
        CACHE_FORMAT,
        task.fingerprint(split),
        tokenizer_fingerprint(tokenizer),
        style_key,
        max_length,
    ]
    key = hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()
    path = Path(cache_dir) / f"{key}.arrow"
    rows = _cached(path)
    if rows is None:
        batch, info = _tokenise(task, split, tokenizer, resolve_frame(tokenizer, style), max_length)
        write_sealed(path, _SCHEMA, [batch], info)
        rows = TokenizedRows.open(path)
    if refuse_long and rows.truncated:
        raise DataError(
            f"{task.path(split)}: {rows.truncated} of {len(rows)} prompts don't fit into max_length "
            f"{max_length}; raise it or allow long prompts to be cut"
        )
    return rows


def _cached(path: Path) -> TokenizedRows | None:
    """The cache file's rows; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        return TokenizedRows.open(path)
    except DataError as error:
        log.warning("%s; tokenising again", error)
        return None


def _tokenise(
    task: Task, split: str, tokenizer: Tokenizer, frame: Frame, max_length: int
) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """The rows, and what there is to say of them."""
    examples = task.read(split)
    texts = [frame.prompt_text(row.prompt) for row in examples]
    known: dict[tuple[bool, str], list[int]] = {}
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    truncated, skipped = 0, 0
    for row, text, ids in zip(examples, texts, encode(tokenizer, texts), strict=True):
        prompt = [*frame.bos_ids, *ids]
        if not prompt:
            skipped += 1
            continue
        where = f"{task.path(split)}: row {row.id!r}"
        answer, choices = _answers(where, tokenizer, frame, text, row, known)
        room = max_length - max(len(ids) for ids in (answer, *choices))
        if room < 1:
            raise DataError(
                f"{where}: its answer (or a choice) has {max_length - room} tokens, max_length is "
                f"{max_length}; raise max_length or remove the row"
            )
        truncated += len(prompt) > room
        columns["id"].append(row.id)
        columns["prompt_ids"].append(cut_left(prompt, frame.head_ids, room))
        columns["answer_ids"].append(answer)
        columns["choice_ids"].append(choices)
        columns["label"].append(row.choices.index(row.answer) if row.choices else -1)
    if not columns["id"]:
        raise DataError(f"{task.path(split)}: no row of task {task.name!r} has a prompt that makes tokens")
    info = {
        "format": CACHE_FORMAT,
        "task": task.name,
        "split": split,
        "truncated": truncated,
        "skipped": {"prompt has no tokens": skipped} if skipped else {},
        "max_length": max_length,
    }
    arrays = [pa.array(columns[field.name], field.type) for field in _SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA), info


def _answers(
    where: str,
    tokenizer: Tokenizer,
    frame: Frame,
    prompt_text: str,
    row: Example,
    known: dict[tuple[bool, str], list[int]],
) -> tuple[list[int], list[list[int]]]:
    """Ids of a row's answer and choices; equal texts are tokenised once."""

    def ids_of(answer: str) -> list[int]:
        key = (prompt_text[-1:].isspace(), answer)
        if key not in known:
            try:
                known[key] = answer_with_end(tokenizer, frame, prompt_text, answer)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
        return known[key]

    choices = [ids_of(choice) for choice in row.choices]
    _refuse_equal(where, row.choices, choices)
    return ids_of(row.answer), choices


def _refuse_equal(where: str, names: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for name, tokens in zip(names, ids, strict=True):
        if (other := seen.setdefault(tuple(tokens), name)) != name:
            raise DataError(f"{where}: choices {other!r} and {name!r} have the same tokens; rename one")
