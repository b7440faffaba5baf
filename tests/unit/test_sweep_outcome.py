"""The journal of a sweep, its ranking and its Pareto set."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from treelora.errors import DataError
from treelora_platform.sweep.child import last_words
from treelora_platform.sweep.journal import Entry, Journal
from treelora_platform.sweep.outcome import dominates, pareto, ranked, show_sweep, trials_sheet, write_sweep
from treelora_platform.sweep.spec import parse_sweep

SPEC = parse_sweep(
    {"name": "s", "recipe": "demo", "space": {"lora.rank": [1, 2, 4]}, "objectives": {"op": "max", "seconds": "min"}}
)


def entry(run: str, op: float | None, seconds: float | None, status: Any = "done", tasks: int = 3) -> Entry:
    return Entry(f"treelora-s0-{run}", {"lora.rank": 2}, status, tasks, {"op": op, "seconds": seconds}, time=0.0)


ENTRIES = [
    entry("slowbest", 60.0, 90.0),
    entry("quick", 50.0, 10.0),
    entry("worse", 45.0, 20.0),
    entry("equal", 50.0, 10.0),
    entry("early", 70.0, 5.0, "stopped", 1),
    entry("later", 10.0, 5.0, "stopped", 2),
    entry("broken", None, None, "failed", 0),
    entry("blank", None, 1.0),
]


def test_pareto_by_hand() -> None:
    assert [e.run.rpartition("-")[2] for e in pareto(ENTRIES, SPEC.objectives)] == ["slowbest", "quick", "equal"]
    names = [e.run.rpartition("-")[2] for e in ranked(SPEC, ENTRIES)]
    assert names == ["slowbest", "quick", "equal", "worse", "blank", "later", "early", "broken"]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_pareto_against_the_definition(points: list[tuple[int, int]]) -> None:
    entries = [entry(str(i), float(op), float(seconds)) for i, (op, seconds) in enumerate(points)]
    front = {e.run for e in pareto(entries, SPEC.objectives)}
    for (i, (op, seconds)), one in zip(enumerate(points), entries, strict=True):
        beaten = any(o >= op and s <= seconds and (o > op or s < seconds) for j, (o, s) in enumerate(points) if j != i)
        assert (one.run in front) == (not beaten)
    for one, other in itertools.combinations(entries, 2):
        assert not (
            dominates(one.scores, other.scores, SPEC.objectives)
            and dominates(other.scores, one.scores, SPEC.objectives)
        )


def test_the_table_says_what_is_not_comparable(tmp_path: Path) -> None:
    sheet = trials_sheet(SPEC, ENTRIES)
    assert sheet.columns[:3] == ("trial", "rank", "tasks")
    assert sheet.cells[0] == ("slowbest", "2", "3", "60.00", "1 min 30 s", "–", "*", "done")
    assert any("stopped early are of fewer tasks" in note for note in sheet.notes)
    files = write_sweep(SPEC, ENTRIES, tmp_path)
    table = pq.read_table(next(path for path in files if path.suffix == ".parquet"))
    assert table["pareto"].to_pylist() == [True, True, True, False, False, False, False, False]
    assert table["op"].to_pylist()[:2] == [60.0, 50.0]
    console = Console(record=True, width=140)
    show_sweep(SPEC, ENTRIES, tmp_path, console)
    assert "runs/treelora-s0-slowbest" in console.export_text().replace("\n", "")


def test_the_journal_keeps_the_last_word_and_survives_a_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "sub" / "trials.jsonl")
    assert journal.latest() == {}
    journal.add(entry("a", None, None, "begun", 0))
    journal.add(entry("b", None, None, "begun", 0))
    journal.add(entry("a", 5.0, 1.0))
    with journal.path.open("a") as file:
        file.write('{"run": "treelora-s0-b", "val')
    assert [(e.run[-1], e.status) for e in journal.latest().values()] == [("a", "done"), ("b", "begun")]
    journal.path.write_text('{"other": 1}\n')
    with pytest.raises(DataError, match="is not a sweep's journal"):
        journal.entries()


def test_a_torn_line_is_replaced(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "trials.jsonl")
    journal.path.write_text('{"run": "x", "val')
    journal.add(entry("a", 5.0, 1.0))
    assert [found.run[-1] for found in journal.entries()] == ["a"]


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("loading\nerror: task 'a': loss nan\n", "task 'a': loss nan"),
        ("error: first\nagain\nerror: second\n\n", "second"),
        ("Traceback\n  File x\nKilled\n", "Traceback / File x / Killed"),
    ],
)
def test_last_words(tmp_path: Path, log: str, said: str) -> None:
    path = tmp_path / "trial.log"
    path.write_text(log, encoding="utf-8")
    assert last_words(path) == said
