"""The layout of TRACE (Wang et al. 2023, arXiv 2310.06762).

``<root>/<task>/{train,eval,test}.json``: lists of {"prompt", "answer"}.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from treelora.data.importers.common import Options, RawRow, RawTask, find_tasks, json_rows, split_files
from treelora.data.schema import Kind

_COLUMNS = {"prompt": "prompt", "answer": "answer"}
_MAX_CHOICES = 10
_MAX_CHOICE_CHARS = 24
_LONG_ANSWER_WORDS = 4


@dataclass(frozen=True)
class _Known:
    kind: Kind
    metric: str
    choices: tuple[str, ...] = ()


# Metrics as in TRACE's table 1. ScienceQA's answers are a letter and an explanation; the letter is scored.
_KNOWN = {
    "C-STANCE": _Known("choice", "accuracy", ("A", "B", "C")),
    "FOMC": _Known("choice", "accuracy", ("A", "B", "C")),
    "MeetingBank": _Known("generation", "rouge_l"),
    "Py150": _Known("generation", "edit_similarity"),
    "ScienceQA": _Known("choice", "accuracy", ("A", "B", "C", "D", "E")),
    "NumGLUE-cm": _Known("generation", "exact_match"),
    "NumGLUE-ds": _Known("generation", "exact_match"),
    "20Minuten": _Known("generation", "sari"),
}


def read(path: str, names: Sequence[str] | None, options: Options) -> Iterator[RawTask]:
    """One task for each folder; tasks that TRACE doesn't have are sorted by the look of their answers."""
    for name, folder in find_tasks(path, "train.json", names).items():
        files = split_files(folder, ".json", options)
        splits: dict[str, list[RawRow]] = {s: list(json_rows(f, _COLUMNS)) for s, f in files.items()}
        known = _KNOWN.get(name) or guess(splits["train"])
        if known.kind == "choice" and all(len(choice) == 1 for choice in known.choices):
            splits = {split: list(_lettered(rows, known.choices)) for split, rows in splits.items()}
        yield RawTask(name, folder, known.kind, known.choices, known.metric, splits)


def _lettered(rows: Iterable[RawRow], letters: Sequence[str]) -> Iterator[RawRow]:
    """Rows whose answer is its leading letter alone, where a letter stands there by itself."""
    for row in rows:
        answer = row.answer.strip() if isinstance(row.answer, str) else ""
        alone = answer[:1] in letters and not answer[1:2].isalnum()
        yield replace(row, answer=answer[0]) if answer and alone else row


def guess(rows: Iterable[RawRow]) -> _Known:
    """Choice where the answers are few and short; else generation, scored by how long they are."""
    answers = [row.answer.strip() for row in rows if isinstance(row.answer, str) and row.answer.strip()]
    distinct = sorted(set(answers))
    short = all(len(answer) <= _MAX_CHOICE_CHARS for answer in islice(distinct, _MAX_CHOICES + 1))
    if 2 <= len(distinct) <= _MAX_CHOICES and short and len(answers) >= 2 * len(distinct):
        return _Known("choice", "accuracy", tuple(distinct))
    words = sum(len(answer.split()) for answer in answers) / max(len(answers), 1)
    return _Known("generation", "rouge_l" if words >= _LONG_ANSWER_WORDS else "exact_match")
