"""Which rows are learnt from and judged on, and the batches that they become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.streams import TASKS
from treelora.data.batches import BatchPlan
from treelora.data.builtin import write_builtin
from treelora.data.task import Task
from treelora.data.tokenize import PromptStyle, TokenizedRows, tokenize_split
from treelora.errors import DataError
from treelora.models.tiny import tiny_tokenizer
from treelora.training_data import Split, TextCollator, Unit, choose_rows, test_split


@given(labels=st.lists(st.integers(-1, 4), max_size=60), limit=st.integers(1, 70) | st.none(), seed=st.integers(0, 99))
def test_chosen_rows_are_balanced_and_repeatable(labels: list[int], limit: int | None, seed: int) -> None:
    chosen = choose_rows(labels, limit, seed)
    assert chosen.tolist() == choose_rows(np.array(labels, np.int64), limit, seed).tolist()
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == min(len(labels), limit if limit is not None else len(labels))
    assert all(0 <= row < len(labels) for row in chosen)
    # waterfilling: no label has more than another, but where that other has no row left
    taken = {label: sum(labels[row] == label for row in chosen) for label in set(labels)}
    for one, count in taken.items():
        assert all(count <= taken[other] + 1 or taken[other] == labels.count(other) for other in taken), one


def test_the_seed_decides() -> None:
    choices = {tuple(choose_rows([0] * 20, 5, seed)) for seed in range(20)}
    assert len(choices) > 15
    counts = np.bincount(np.concatenate([choose_rows([0] * 20, 5, seed) for seed in range(400)]), minlength=20)
    assert counts.sum() == 2000
    assert 60 < counts.min() <= counts.max() < 140  # 100 expected, deviation 8.7


def test_the_order_of_the_file_is_kept() -> None:
    assert choose_rows([1, 0, 1], None, 0).tolist() == [0, 1, 2]
    assert choose_rows([1, 0, 1], 3, 0).tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    return write_builtin(tmp_path_factory.mktemp("tasks"), list(TASKS[:2]), seed=0, train_rows=12, test_rows=10)


def tokens(task: Task, split: str, folder: Path) -> TokenizedRows:
    return tokenize_split(task, split, tiny_tokenizer(), PromptStyle("plain", None), 512, folder)


def test_test_split_keeps_texts_and_tokens_together(tasks: list[Task], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    test = test_split(tasks[0], tokens(tasks[0], "test", tmp_path), 6, seed=3)
    assert len(test) == 6
    assert len(test.examples) == 6
    texts = {example.id: example for example in tasks[0].read("test")}
    for row, example in zip(test.chosen, test.examples, strict=True):
        assert texts[test.rows.row_id(int(row))] == example
        assert example.prompt in tokenizer.decode(test.rows.prompt_ids(int(row)))
    answers = [example.answer for example in test.examples]
    assert sorted(answers.count(choice) for choice in tasks[0].choices) == [3, 3]


def unit(tasks: list[Task], folder: Path, accumulation: int = 1) -> Unit:
    splits = []
    for task, limit in zip(tasks, (5, 7), strict=True):
        rows = tokens(task, "train", folder)
        splits.append(Split(rows, choose_rows(rows.labels, limit, 1)))
    plan = BatchPlan(12, 8, max_steps=3, seed=0, task_index=0)
    return Unit("both", (0, 1), tuple(splits), plan, TextCollator(256), accumulation)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_workers_share_a_global_batch(tasks: list[Task], tmp_path: Path, world: int, accumulation: int) -> None:
    both = unit(tasks, tmp_path, accumulation)
    rows = [
        (split.rows.prompt_ids(int(i)).tolist(), split.rows.answer_ids(int(i)).tolist())
        for split in both.splits
        for i in split.chosen
    ]
    device = torch.device("cpu")
    for step in range(3):
        expected = sorted(rows[row] for row in both.plan.rows(step))
        found, answers = [], 0
        for rank in range(world):
            batches = both.micro_batches(step, rank, world, device)
            assert [len(batch["input_ids"]) for batch in batches] == [8 // (world * accumulation)] * accumulation
            for batch in batches:
                for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                    answer = int((labels != -100).sum())
                    row = ids[mask.bool()].tolist()
                    found.append((row[:-answer], row[-answer:]))
                    answers += answer
        assert sorted(found) == expected
        assert both.normaliser(step, world) * world == answers
        assert both.tokens(step) == sum(len(p) + len(a) for p, a in expected)


def test_nothing_to_learn_from_is_refused_by_name(tasks: list[Task], tmp_path: Path) -> None:
    rows = tokens(tasks[0], "train", tmp_path)
    empty = Split(rows, np.zeros(0, np.int64))
    with pytest.raises(DataError, match="task 'hollow': no training row is left"):
        Unit("hollow", (0,), (empty,), BatchPlan(1, 1, max_steps=1, seed=0, task_index=0), TextCollator(256))
