"""Prompts in, answers out: text, JSONL and Parquet; a table for people. No label is ever read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.markup import escape
from rich.table import Table

from treelora.errors import ConfigError, DataError

STDIN = "-"
FORMATS = ("text", "jsonl", "parquet")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Prompt:
    """One request: a text, or an image."""

    where: str
    """File and line or row, for messages."""
    id: str | int
    text: str
    choices: tuple[str, ...] | None = None
    """What may be answered; (): free text; None: not said."""
    image: bytes | None = None
    """An encoded image, in place of the file that `text` names."""


@dataclass(frozen=True)
class Answer:
    """What came of a prompt; a line of the output."""

    id: str | int
    prompt: str
    answer: str
    task: str | None
    """The learnt task that the prompt was taken for; None where no task was chosen."""
    margin: float | None
    """Log-likelihood of that task less that of the runner-up; None without a router, or with one task."""
    runner_up: str | None
    fallback: bool
    """Whether the average answered, because the margin was too small."""
    ms: float
    """Milliseconds: its share of routing, of loading the adapter, and of its batch."""


def read_prompts(source: str, form: str | None = None) -> list[Prompt]:
    """All prompts of a file, a URI, or of standard input (`-`).

    Args:
        source: Where they are.
        form: text (a prompt a line), jsonl (`prompt`, optional `choices` and `id`; other keys are passed over) or
            parquet (a split of a task). None: by the name's ending; standard input is JSONL if it begins with `{`.

    Raises:
        DataError: it can't be read, holds no prompt, or a line or row is wrong: the message names it.
        ConfigError: no such form.
    """
    if form not in (None, *FORMATS):
        raise ConfigError(f"format {form!r}: use {', '.join(FORMATS)}")
    name = "standard input" if source == STDIN else source
    form = form or _SUFFIXES.get(Path(source).suffix.lower())
    if form == "parquet":
        if source == STDIN:
            raise ConfigError("Parquet can't be read from standard input; name the file")
        prompts = list(_parquet(source))
    else:
        text = _text(source, name)
        if form is None and source == STDIN and text.lstrip().startswith("{"):
            form = "jsonl"
        lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        parse = _json_prompt if form == "jsonl" else _text_prompt
        prompts = [parse(f"{name}: line {number}", number, line) for number, line in lines]
    if not prompts:
        raise DataError(f"{name}: holds no prompt; write one a line")
    return prompts


def checked_prompt(where: str, row_id: str | int, text: object, choices: Any) -> Prompt:
    """A prompt of values that may be anything. Raises: DataError, naming `where`."""
    if choices is not None:
        choices = tuple(choices) if isinstance(choices, list) else choices
        if fault := _fault(choices):
            raise DataError(f"{where}: `choices` {fault}")
    return Prompt(where, row_id, _checked(where, text), choices)


def split_choices(text: str) -> tuple[str, ...]:
    """`a,b,c` as choices; an empty text: free text. Raises: ConfigError for blank or repeated ones."""
    if not text.strip():
        return ()
    choices = tuple(choice.strip() for choice in text.split(","))
    if fault := _fault(choices):
        raise ConfigError(f"choices {text!r}: {fault}")
    return choices


@contextmanager
def answer_lines(out: Path | None) -> Iterator[TextIO]:
    """Where answers are written as JSONL: standard output, or a file that appears whole or not at all."""
    if out is None:
        yield sys.stdout
        return
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            yield file
        os.replace(scratch, out)
    except OSError as error:
        raise ConfigError(f"{out}: can't be written ({error.strerror or error})") from None
    finally:
        scratch.unlink(missing_ok=True)


def as_line(answer: Answer) -> str:
    """An answer as a line of JSON."""
    return json.dumps(asdict(answer), ensure_ascii=False, allow_nan=False) + "\n"


def answer_table(answers: Sequence[Answer], inference: str) -> Table:
    """Answers for a terminal."""
    each = sum(answer.ms for answer in answers) / len(answers)
    table = Table(title=f"{len(answers)} prompts, inference {inference}, {each:.1f} ms each")
    routed = any(answer.task is not None for answer in answers)
    for column in ("id", "prompt", *(("taken for", "margin", "runner-up") if routed else ()), "answer", "ms"):
        number = column in ("margin", "ms")
        table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for answer in answers:
        margin = "" if answer.margin is None else f"{answer.margin:.1f}" + (" avg" if answer.fallback else "")
        route = (answer.task or "", margin, answer.runner_up or "") if routed else ()
        shown = (str(answer.id), _shortened(answer.prompt), *route, answer.answer, f"{answer.ms:.1f}")
        table.add_row(*(escape(cell) for cell in shown))
    if any(answer.fallback for answer in answers):
        table.caption = "avg: the margin was too small, so the average of the tasks around both answered"
    return table


def _shortened(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _text(source: str, name: str) -> str:
    from treelora.data.importers.common import read_bytes

    if source == STDIN and sys.stdin.isatty():
        print("type prompts, one a line; Ctrl-D ends", file=sys.stderr)
    raw = sys.stdin.buffer.read() if source == STDIN else read_bytes(source)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{name}: line {line}: is not UTF-8 ({error.reason}); re-encode it") from None


def _text_prompt(where: str, number: int, line: str) -> Prompt:
    return Prompt(where, number, line.rstrip("\r"))


def _json_prompt(where: str, number: int, line: str) -> Prompt:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({error})") from None
    if not isinstance(item, dict):
        raise DataError(f"{where}: holds a {type(item).__name__}, expected an object with a `prompt`")
    row_id = item.get("id", number)
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise DataError(f"{where}: `id` is {row_id!r}; use a text or a whole number")
    return checked_prompt(where, row_id, item.get("prompt"), item.get("choices"))


def _parquet(path: str) -> Iterable[Prompt]:
    from treelora.data.parquet import open_columns, read_meta

    meta, _ = read_meta(path)
    table, _ = open_columns(path, ["id", "prompt", "choices"])
    if missing := {"id", "prompt"} - set(table.column_names):
        raise DataError(f"{path}: has no column {sorted(missing)[0]!r}")
    rows: list[dict[str, Any]] = table.to_pylist()
    for number, row in enumerate(rows):
        where = f"{path}: row {number}"
        choices = tuple(_decoded(where, choice) for choice in row.get("choices") or ()) or meta.choices
        text = _checked(where, _decoded(where, row["prompt"]))
        yield Prompt(where, _decoded(where, row["id"]), text, choices if meta.kind == "choice" else ())


def _decoded(where: str, value: Any) -> str:
    if not isinstance(value, bytes):
        raise DataError(f"{where}: holds {value!r} where text is expected; import the task again")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 ({error.reason}); import the task again") from None


def _checked(where: str, prompt: object) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: `prompt` is {prompt!r}; it must be a text that isn't blank")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: `prompt` holds half a character (a lone surrogate); mend it") from None
    return prompt


def _fault(choices: object) -> str | None:
    if not isinstance(choices, tuple) or not all(isinstance(choice, str) for choice in choices):
        return f"is {choices!r}; use a list of texts"
    if not all(choice.strip() for choice in choices):
        return "has a blank choice; remove it"
    if len(set(choices)) != len(choices):
        return f"repeats {next(choice for choice in choices if choices.count(choice) > 1)!r}; name each once"
    return None
