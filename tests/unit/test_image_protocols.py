"""Protocols: which classes make which task, and how a data set without splits is split."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora.data.images.importing import balanced_quota
from treelora.data.images.protocols import class_names, class_order, cut, plan_tasks
from treelora.data.images.sources.common import ImageRow, RawSplit, natural, permutation, split_by_share
from treelora.data.names import slugify
from treelora.errors import ConfigError, DataError

TEN = [str(i) for i in range(10)]


def plan(classes: Sequence[str] = TEN, domains: Sequence[str] = (), **options: Any) -> Any:
    return plan_tasks("here", classes, domains, options, {})


class TestOrder:
    def test_natural(self) -> None:
        assert class_order(["10", "9", "b2", "b10", "B3", "2"], None) == ("2", "9", "10", "b2", "B3", "b10")
        assert sorted(["1", "01", "001"], key=natural) == ["001", "01", "1"]
        long = "9" * 5000
        assert sorted(["1" + long, long, "a0", "0a", "", "-3"], key=natural) == ["", "0a", long, "1" + long, "-3", "a0"]

    @given(numbers=st.lists(st.integers(0, 10**30), min_size=2, max_size=8, unique=True))
    def test_numbers_are_in_the_order_of_their_values(self, numbers: list[int]) -> None:
        names = [f"x{number}y" for number in numbers]
        assert sorted(names, key=natural) == [f"x{number}y" for number in sorted(numbers)]

    def test_seeded_is_a_pure_permutation(self) -> None:
        orders = [class_order(TEN, seed) for seed in range(20)]
        assert all(sorted(order) == TEN for order in orders)
        assert len(set(orders)) == 20
        assert class_order(reversed(TEN), 3) == class_order(set(TEN), 3) == orders[3]

    def test_the_permutation_is_the_order_of_philox_numbers(self) -> None:
        """Written out, so that no version of numpy may change which classes a seed puts together."""
        assert permutation(10, "classes", 0).tolist() == PERMUTATION_OF_SEED_0
        assert sorted(permutation(1000, "a").tolist()) == list(range(1000))
        assert permutation(1000, "ab", "c").tolist() != permutation(1000, "a", "bc").tolist()


PERMUTATION_OF_SEED_0 = [9, 6, 3, 5, 2, 8, 1, 0, 7, 4]


class TestCut:
    def test_by_hand(self) -> None:
        assert cut(TEN[:5], None, 3) == [("0", "1", "2"), ("3", "4")]
        assert cut(TEN, 5, None) == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7"), ("8", "9")]
        assert cut(TEN[:8], 3, None) == [("0", "1", "2"), ("3", "4", "5"), ("6", "7")]

    @pytest.mark.parametrize(
        ("classes", "tasks", "size", "message"),
        [
            (10, None, 3, "10 classes in tasks of 3 leave a task with the single class '9'"),
            (10, 4, None, "10 classes in 4 tasks leave a task with the single class '9'"),
            (10, 10, None, "single class '0'"),
            (6, 5, None, "6 classes can't make 5 tasks: 3 of 2 hold them all"),
            (3, 4, None, "3 classes can't make 4 tasks"),
            (5, None, 1, "single class '0', where there is nothing to tell apart"),
        ],
    )
    def test_refused(self, classes: int, tasks: int | None, size: int | None, message: str) -> None:
        with pytest.raises(DataError, match=message):
            cut(TEN[:classes], tasks, size)

    def test_one_number_of_the_two(self) -> None:
        for tasks, size in ((None, None), (2, 2)):
            with pytest.raises(ConfigError, match=r"one of options\.tasks and options\.classes_per_task"):
                cut(TEN, tasks, size)

    @settings(max_examples=200, deadline=None)
    @given(n=st.integers(2, 60), data=st.data())
    def test_every_class_in_exactly_one_task(self, n: int, data: st.DataObject) -> None:
        names = [f"class {i}" for i in range(n)]
        options = {data.draw(st.sampled_from(["tasks", "classes_per_task"])): data.draw(st.integers(1, n))}
        options["class_seed"] = data.draw(st.integers(0, 2**40))
        options["base_classes"] = data.draw(st.integers(0, n - 2))
        try:
            made = plan(names, **options)
        except DataError:
            return
        assert made == plan(names[::-1], **options)
        spread = [label for task in made.tasks for label in task.choices]
        assert sorted([*spread, *made.base]) == sorted(names)
        assert len(made.base) == options["base_classes"]
        sizes = [len(task.choices) for task in made.tasks]
        assert min(sizes) >= 2
        assert len(set(sizes[:-1])) <= 1
        assert sizes[-1] <= sizes[0]
        assert sizes[0] == options.get("classes_per_task", sizes[0]) or len(sizes) == 1
        assert len(sizes) == options.get("tasks", len(sizes))
        slugs = {slugify(task.name) for task in made.tasks}
        assert len(slugs) == len({task.name for task in made.tasks}) == len(sizes)


class TestNames:
    def test_short_ones_are_spelt_out(self) -> None:
        assert class_names([("0", "1"), ("2", "3")]) == ["classes 0 and 1", "classes 2 and 3"]

    def test_else_all_are_positions(self) -> None:
        parts = [("a", "b"), ("c", "x" * 40), ("e", "f", "g")]
        assert class_names(parts) == ["classes 1-2", "classes 3-4", "classes 5-7"]
        # "classes " and " and " are 13 characters: 27 letters make 40, 28 make one too many.
        assert class_names([("a" * 13, "b" * 14)]) == [f"classes {'a' * 13} and {'b' * 14}"]
        assert class_names([("a" * 14, "b" * 14)]) == ["classes 1-2"]

    def test_names_that_differ_in_their_parts_have_folders_of_their_own(self) -> None:
        one, other = class_names([("a", "b c")]) + class_names([("a b", "c")])
        assert slugify(one) != slugify(other)


class TestPlan:
    def test_base_classes_come_first_in_the_order(self) -> None:
        made = plan(class_seed=5, base_classes=4, classes_per_task=2)
        order = class_order(TEN, 5)
        assert made.base == order[:4]
        assert [task.choices for task in made.tasks] == [order[4:6], order[6:8], order[8:]]
        assert made.protocol == "class_incremental"

    def test_task_incremental_has_the_same_tasks(self) -> None:
        one, other = plan(tasks=5), plan(tasks=5, protocol="task_incremental")
        assert (one.tasks, other.protocol) == (other.tasks, "task_incremental")

    def test_domain_incremental(self) -> None:
        made = plan(["b", "a", "c"], ["sketch", "photo 10", "photo 9"], protocol="domain_incremental", base_classes=1)
        assert [task.name for task in made.tasks] == ["photo 9", "photo 10", "sketch"]
        assert {task.choices for task in made.tasks} == {("b", "c")}
        assert [task.domain for task in made.tasks] == [task.name for task in made.tasks]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, r"say how its 10 classes make tasks: options\.tasks or classes_per_task"),
            ({"protocol": "online"}, r"options\.protocol is 'online'; use one of class_incremental, domain"),
            ({"tasks": 0}, r"options\.tasks is 0; use a whole number of at least 1"),
            ({"tasks": True}, r"options\.tasks is True"),
            ({"classes_per_task": "2"}, r"options\.classes_per_task is '2'"),
            ({"class_seed": -1, "tasks": 2}, r"options\.class_seed is -1"),
            ({"protocol": "domain_incremental"}, "domain_incremental needs domains"),
            ({"protocol": "domain_incremental", "tasks": 2, "domains": ["a"]}, "domains make tasks"),
        ],
    )
    def test_refused_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            plan(**options)

    def test_too_few_classes(self) -> None:
        with pytest.raises(DataError, match="here: 1 of 1 classes are left for tasks after 0 base classes"):
            plan(["a"], tasks=1)
        with pytest.raises(DataError, match="here: 1 of 10 classes are left for tasks after 9 base classes"):
            plan(base_classes=9, tasks=1)


def split_of(labels: Sequence[str], domains: Sequence[str | None] | None = None) -> RawSplit:
    domains = domains or [None] * len(labels)
    rows = [ImageRow(str(i), str(i), label, d) for i, (label, d) in enumerate(zip(labels, domains, strict=True))]
    return RawSplit(rows, lambda wanted: ((lambda i=i: str(i).encode()) for i in wanted))


class TestShare:
    @settings(max_examples=100, deadline=None)
    @given(
        labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=60),
        share=st.floats(0.05, 0.95),
        seed=st.integers(0, 9),
    )
    def test_a_partition_with_the_share_of_each_class(self, labels: list[str], share: float, seed: int) -> None:
        parts = split_by_share(split_of(labels), share, seed)
        ids = {split: [int(row.id) for row in part.rows] for split, part in parts.items()}
        assert sorted(ids["train"] + ids["test"]) == list(range(len(labels)))
        assert all(part == sorted(part) for part in ids.values())
        for label in set(labels):
            n = labels.count(label)
            want = 0 if n == 1 else min(max(round(share * n), 1), n - 1)
            assert sum(labels[i] == label for i in ids["test"]) == want
        again = split_by_share(split_of(labels), share, seed)
        assert [row.id for row in again["test"].rows] == [row.id for row in parts["test"].rows]

    def test_seeds_differ_and_classes_do_not_meddle(self) -> None:
        labels = ["a"] * 20 + ["b"] * 20

        def test_ids(labels: Sequence[str], seed: int) -> set[str]:
            return {row.id for row in split_by_share(split_of(labels), 0.3, seed)["test"].rows if row.label == "a"}

        assert len({frozenset(test_ids(labels, seed)) for seed in range(10)}) > 5
        assert test_ids(labels, 1) == test_ids(labels[:20], 1)

    def test_rows_with_a_problem_do_not_move_the_others(self) -> None:
        whole = split_of(["a"] * 20)
        odd = RawSplit([ImageRow("odd", "odd", "a", problem="file is missing"), *whole.rows], whole.load)
        parts = split_by_share(odd, 0.3, 0)
        assert [row.id for row in parts["test"].rows] == [row.id for row in split_by_share(whole, 0.3, 0)["test"].rows]
        assert parts["train"].rows[0].id == "odd"

    def test_parts_load_what_they_hold(self) -> None:
        part = split_of("abcdef").part([1, 3, 5]).part([0, 2])
        assert [load() for load in part.load([0, 1])] == [b"1", b"5"]
        assert [row.label for row in part.rows] == ["b", "f"]

    def test_domains_are_shared_out_apart(self) -> None:
        parts = split_by_share(split_of(["a"] * 20, ["x", "y"] * 10), 0.3, 0)
        assert sorted(str(row.domain) for row in parts["test"].rows) == ["x"] * 3 + ["y"] * 3


class TestQuota:
    def test_by_hand(self) -> None:
        assert balanced_quota({"a": 5, "b": 5, "c": 1}, 7) == {"a": 3, "b": 3, "c": 1}
        assert balanced_quota({"a": 5, "b": 5}, 3) == {"a": 2, "b": 1}
        assert balanced_quota({"a": 2, "b": 0}, 9) == {"a": 2, "b": 0}

    @given(counts=st.dictionaries(st.text(max_size=3), st.integers(0, 50), max_size=6), limit=st.integers(0, 200))
    def test_as_even_as_can_be(self, counts: dict[str, int], limit: int) -> None:
        quota = balanced_quota(counts, limit)
        assert sum(quota.values()) == min(limit, sum(counts.values()))
        assert all(quota[name] <= counts[name] for name in counts)
        cut_short = [quota[name] for name in counts if quota[name] < counts[name]]
        if cut_short:
            assert max(quota.values()) - min(cut_short) <= 1
        assert np.all([value >= 0 for value in quota.values()])
