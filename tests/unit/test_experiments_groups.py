from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.records import record
from treelora.errors import DataError
from treelora_platform.experiments.groups import pair_up, select

ORDERS = ("a, b", "b, a")


def names(group):
    return [run.name for run in group.runs]


def remark(selection, start):
    return next(text for text in selection.remarks if text.startswith(start))


def pairs_of(selection, first=0, second=1):
    one, two = selection.groups[first], selection.groups[second]
    return pair_up(one, two, selection.by, selection.settings)


def test_groups_hold_their_replicates_and_are_sorted_by_value():
    runs = [record("treelora", o, s, lora__rank=r) for o, s, r in product(ORDERS, (0, 1), (16, 4))]
    runs += [record("ewc", lora__rank=4)]
    found = select(runs, ["method", "lora.rank"])
    assert [group.label for group in found.groups] == [
        "ewc, lora.rank=4",
        "treelora, lora.rank=4",
        "treelora, lora.rank=16",
    ]
    assert found.groups[0].name == "method=ewc, lora.rank=4"
    assert [len(group.runs) for group in found.groups] == [1, 4, 4]
    assert found.remarks == ()


def test_only_what_finished_with_scores_counts_and_the_rest_is_named():
    runs = [
        record(name="good"),
        record(name="dead", status="FAILED"),
        record(name="busy", status="RUNNING"),
        record(name="bare", op=None, seed=1),
        record(name="short", order="a, b, c", tasks={"a": 1.0, "b": 2.0}),
    ]
    found = select(runs, ["method"])
    assert names(found.groups[0]) == ["good"]
    assert found.remarks == (
        "Left out, because they have not finished: 2 runs (dead (FAILED), busy (RUNNING)).",
        "Left out, because they ended before the last task: 1 run (short).",
        "Left out, because they have no scores: 1 run (bare).",
    )
    with pytest.raises(DataError, match=r"no run is left to compare; Left out, because they have no scores: 1 run"):
        select([record(op=None)], ["method"])


def test_of_a_run_that_was_repeated_the_newest_finished_one_counts():
    runs = [
        record(name="new", start=30),
        record(name="old", start=10),
        record(name="broken", start=40, status="FAILED"),
        record(name="other seed", seed=1, start=5),
        record(name="other workers", start=20, cluster__workers=2),
    ]
    found = select(runs, ["method"])
    assert names(found.groups[0]) == ["other seed", "new"]
    assert remark(found, "Left out, because they were done again") == (
        "Left out, because they were done again later with the same settings: 2 runs (old, other workers)."
    )


def test_fields_that_vary_within_a_group_are_told():
    runs = [record("treelora", seed=s, lora__rank=r, treelora__strength=0.5) for s, r in product((0, 1), (4, 8))]
    runs += [record("sequential", seed=s, lora__rank=4, treelora__strength=0.1 * s) for s in (0, 1)]
    found = select(runs, ["method"])
    assert found.remarks == (
        "lora.rank varies within method=treelora (4, 8): means are over all of these; add it to --by, or filter.",
    )
    assert select(runs, ["method"], ["lora.rank=4"]).remarks == ()


def test_a_seed_that_follows_the_experiments_is_no_other_field():
    runs = [record("treelora", seed=s, treelora__seed=s, stream__seed=s) for s in (0, 1)]
    assert select(runs, ["method"]).remarks == ()
    runs[1] = record("treelora", seed=1, treelora__seed=1, stream__seed=5)
    assert select(runs, ["method"]).remarks == (
        "stream.seed varies within method=treelora (0, 5): means are over all of these; add it to --by, or filter.",
    )


def test_machines_and_states_of_the_source_are_told():
    runs = [
        record(seed=s, cluster__workers=1 + s, tags={"version.commit": f"c{s}", "version.hardware": "2 x x86_64"})
        for s in (0, 1)
    ]
    assert select(runs, ["method"]).remarks == (
        "cluster.workers differs (1, 2): compare scores, not times.",
        "The runs were made with 2 states of the source: c0, c1.",
    )


def test_data_that_changed_are_told():
    runs = [record(tags={"data_hash": text}) for text in ("x", "y")]
    found = select(runs, ["method"])
    assert found.remarks == (
        "Runs that agree in all settings have different data (data_hash), in 1 case: all of them count.",
    )
    assert len(found.groups[0].runs) == 2


def test_runs_without_the_field_are_left_out():
    runs = [record("treelora", treelora__search=s, seed=i) for i, s in enumerate(("lcb", "mean"))]
    runs.append(record("sequential", treelora__search="lcb", name="plain"))
    found = select(runs, ["treelora.search"])
    assert [group.label for group in found.groups] == ["treelora.search=lcb", "treelora.search=mean"]
    assert remark(found, "Left out, because they have no treelora.search") == (
        "Left out, because they have no treelora.search: 1 run (plain)."
    )
    both = select(runs, ["method", "treelora.search"])
    assert [group.label for group in both.groups] == [
        "sequential", "treelora, treelora.search=lcb", "treelora, treelora.search=mean",
    ]  # fmt: skip


def test_runs_on_different_tasks_are_not_averaged():
    runs = [record(m, o, s, tasks={"a": 1, "b": 2}) for m, o, s in product(("treelora", "ewc"), ORDERS, (0, 1))]
    runs += [record("treelora", "a, c", s, tasks={"a": 3, "c": 4}) for s in range(9)]  # more, but of one group
    found = select(runs, ["method"])
    assert {run.task_set for group in found.groups for run in group.runs} == {frozenset({"a", "b"})}
    assert found.common == ("a",)
    assert [len(group.runs) for group in found.everyone] == [4, 13]
    assert found.remarks == (
        "The runs are on different tasks. Compared are 8 on a, b. Left out: 9 runs on a, c; on a, which all have, "
        "their last scores are beside each other below.",
    )
    other = select([*runs, record("gem", "d, e")], ["method"])
    assert other.common == ()
    assert other.remarks[0].endswith("9 runs on a, c; 1 run on d, e; no task is in all of them.")


def test_pairs_have_order_and_seed_in_common():
    runs = [record("treelora", o, s, name=f"t {o} {s}") for o, s in product(ORDERS, (0, 1, 2))]
    runs += [record("sequential", o, s, name=f"s {o} {s}") for o, s in product(ORDERS, (1, 2, 3))]
    found = pairs_of(select(runs, ["method"]))
    assert [(a[0].name, b[0].name) for a, b in found.pairs] == [
        (f"s {o} {s}", f"t {o} {s}") for o, s in product(ORDERS, (1, 2))
    ]
    assert found.keys == ("data_hash", "order", "seed")
    assert (found.also, found.parted) == ({}, ())


def test_a_field_that_varies_parts_pairs_and_one_that_does_not_is_told():
    runs = [record("treelora", seed=s, lora__rank=r, train__clip=1) for s, r in product((0, 1), (4, 8))]
    runs += [record("ewc", seed=s, lora__rank=8, train__clip=2, ewc__strength=3) for s in (0, 1)]
    found = pairs_of(select(runs, ["method"]))
    assert found.keys == ("data_hash", "lora.rank", "seed")
    assert [(a[0].value("lora.rank"), b[0].value("lora.rank"), a[0].seed) for a, b in found.pairs] == [
        ("8", "8", 0), ("8", "8", 1),
    ]  # fmt: skip
    assert found.also == {"train.clip": ("2", "1")}


def test_settings_that_the_other_method_lacks_are_averaged_over():
    runs = [record("treelora", seed=s, treelora__strength=x) for s, x in product((0, 1), (0.1, 0.5))]
    runs += [record("sequential", seed=s) for s in (0, 1)]
    found = pairs_of(select(runs, ["method"]))
    assert [(len(a), len(b)) for a, b in found.pairs] == [(1, 2), (1, 2)]


def test_other_data_are_no_pair():
    runs = [record("treelora", tags={"data_hash": "x"}), record("ewc", tags={"data_hash": "y"})]
    found = pairs_of(select(runs, ["method"]))
    assert found.pairs == ()
    assert found.parted == ("data_hash",)


def test_groups_by_order_pair_by_seed():
    runs = [record("treelora", o, s) for o, s in product(ORDERS, (0, 1))]
    found = pairs_of(select(runs, ["order"]))
    assert found.keys == ("seed",)
    assert [(a[0].seed, b[0].seed) for a, b in found.pairs] == [(0, 0), (1, 1)]


cells = st.lists(
    st.tuples(st.sampled_from(["treelora", "ewc"]), st.sampled_from(ORDERS), st.integers(0, 4)), min_size=2
)


@given(cells)
def test_pairs_are_exactly_the_shared_orders_and_seeds(drawn):
    found = select([record(method, order, seed) for method, order, seed in drawn], ["method"])
    assert sum(len(group.runs) for group in found.groups) == len(set(drawn))
    if len(found.groups) == 2:
        mine, theirs = ({(o, s) for m, o, s in drawn if m == method} for method in ("ewc", "treelora"))
        pairing = pairs_of(found)
        paired = [
            ({(r.tags["order"], r.seed) for r in a}, {(r.tags["order"], r.seed) for r in b}) for a, b in pairing.pairs
        ]
        assert all(a == b and len(a) == 1 for a, b in paired)
        assert {cell for a, _ in paired for cell in a} == mine & theirs
