"""The built-in stream: crossed, balanced, disjoint, repeatable, and only the question tells tasks apart."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from treelora.data import TaskStream
from treelora.data.builtin import builtin_names, generate, write_builtin
from treelora.errors import DataError

SIZES = {"train": 160, "test": 64}


def test_rules_and_vocabularies_are_crossed() -> None:
    metas = [generate(name, {"train": 2}, 0)["train"][1] for name in builtin_names()]
    cells = {(meta.family, meta.vocabulary) for meta in metas}
    rules, words = {rule for rule, _ in cells}, {vocabulary for _, vocabulary in cells}
    assert len(metas) == len(cells) == len(rules) * len(words) == 6
    assert (len(rules), len(words)) == (3, 2)
    neighbours = pairwise(metas)
    assert all(a.family != b.family and a.vocabulary != b.vocabulary for a, b in neighbours)


@pytest.mark.parametrize("name", builtin_names())
def test_rows(name: str) -> None:
    splits = generate(name, SIZES, 3)
    prompts = [row.prompt for rows, _ in splits.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == 224
    for split, (rows, meta) in splits.items():
        assert len(rows) == SIZES[split]
        assert Counter(row.answer for row in rows) == {answer: len(rows) // 2 for answer in meta.choices}
        assert max(len(row.prompt.split()) for row in rows) <= 24
    assert generate(name, SIZES, 3) == splits
    assert generate(name, SIZES, 4) != splits


def test_the_question_names_the_task() -> None:
    questions = {
        name: {row.prompt.split(". ")[1] for row in generate(name, SIZES, 0)["train"][0]} for name in builtin_names()
    }
    assert all(len(asked) == 1 for asked in questions.values())
    assert len(set.union(*questions.values())) == len(questions)


def test_other_rules_say_nothing_about_the_answer() -> None:
    # If mood followed time, one rule could stand in for another and no task would be forgotten.
    rows = generate("time-colours", {"train": 2000}, 0)["train"][0]
    sad = [row for row in rows if " sad" in row.prompt]
    share = sum(row.answer == "red" for row in sad) / len(sad)
    assert abs(share - 0.5) < 0.06  # five standard errors of about 1,000 draws are 0.08, two are 0.03


def test_write(tmp_path: Path) -> None:
    tasks = write_builtin(tmp_path, ["mood-colours", "time-directions"], train_rows=10, test_rows=4, seed=1)
    assert TaskStream(tasks).names == ("mood-colours", "time-directions")
    assert [(len(t.read("train")), len(t.read("test"))) for t in tasks] == [(10, 4)] * 2
    assert tasks[0].choices == ("blue", "red")
    again = write_builtin(tmp_path / "again", ["mood-colours"], train_rows=10, test_rows=4, seed=1)
    assert again[0].fingerprint("train") == tasks[0].fingerprint("train")


def test_refusals() -> None:
    with pytest.raises(DataError, match="no built-in task 'poetry'; there are time-colours"):
        generate("poetry", SIZES, 0)
    with pytest.raises(DataError, match="at most"):
        generate("mood-colours", {"train": 10**6}, 0)
