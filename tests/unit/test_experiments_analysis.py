import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from tests.support.records import record
from treelora.errors import DataError
from treelora.methods import METHODS
from treelora_platform.experiments.analysis import (
    BOUNDS,
    choose_reference,
    compare_groups,
    mean_of,
    score_of,
)
from treelora_platform.experiments.groups import select

# OP by seed; BWT 2 s below 20, seconds 100 + s
SEQUENTIAL = (50.0, 54.0, 40.0)
TREELORA = (56.0, 57.0, 49.0)


def experiment(**more):
    runs = [
        record(method, seed=s, op={"last": op, "routed": op + 1}, bwt=20 - 2 * s, seconds=100 + s)
        for method, scores in (("treelora", TREELORA), ("sequential", SEQUENTIAL))
        for s, op in enumerate(scores)
    ]
    return compare_groups("exp", select(runs + more.pop("others", []), ["method"]), **more)


def one(found, **wanted):
    fitting = [item for item in found if all(getattr(item, key) == value for key, value in wanted.items())]
    assert len(fitting) == 1
    return fitting[0]


def test_means_by_hand():
    found = experiment()
    assert [(s.group, s.mode, s.runs) for s in found.standings] == [
        ("sequential", "last", 3), ("treelora", "last", 3), ("sequential", "routed", 3), ("treelora", "routed", 3),
    ]  # fmt: skip
    mine = one(found.standings, group="sequential", mode="last")
    assert mine.op.value == 48.0
    # sd of 50, 54, 40 is sqrt(52), the 97.5 % quantile of t with 2 degrees of freedom 4.30265
    half = 4.302652729911275 * math.sqrt(52 / 3)
    assert (mine.op.t.low, mine.op.t.high) == pytest.approx((48 - half, 48 + half))
    # a resample of three is all 40 with probability 1/27 > 2.5 %
    assert (mine.op.bootstrap.low, mine.op.bootstrap.high) == (40.0, 54.0)
    assert mine.bwt.value == 18.0
    assert mine.fwt is None
    assert mine.seconds.value == 101.0
    assert mine.tokens.value == 1000.0
    assert one(found.standings, group="treelora", mode="routed").op.value == 55.0


def test_paired_differences_by_hand():
    found = experiment()
    assert found.reference == "sequential"
    mine = one(found.differences, mode="last", metric="op")
    assert (mine.group, mine.reference, mine.family) == ("treelora", "sequential", 1)
    # 6, 3 and 9 points
    assert (mine.found.pairs, mine.found.t.value) == (3, 6.0)
    oracle = ttest_1samp([6, 3, 9], 0).confidence_interval()
    assert (mine.found.t.low, mine.found.t.high) == pytest.approx((oracle.low, oracle.high))
    assert mine.found.p == mine.found.smallest_p == mine.corrected_p == 0.25
    # (2.8 x 3 / 6)^2 + 2 = 3.96
    assert mine.found.pairs_needed == 4
    assert one(found.differences, mode="last", metric="bwt").found.t.value == 0.0
    assert one(found.differences, mode="all", metric="seconds").found.pairs == 3
    assert {(d.mode, d.metric) for d in found.differences} == {
        ("last", "op"), ("last", "bwt"), ("routed", "op"), ("all", "seconds"),
    }  # fmt: skip


def test_p_is_corrected_within_a_family():
    others = [record("ewc", seed=s, op=op) for s, op in enumerate((51.0, 53.0, 41.0))]
    found = experiment(others=others)
    ewc, tree = (one(found.differences, group=g, mode="last", metric="op") for g in ("ewc", "treelora"))
    # ewc differs by 1, -1, 1: six of the eight patterns of signs are as far from zero as that
    assert (ewc.found.p, tree.found.p) == (1.0, 0.25)
    assert (ewc.corrected_p, tree.corrected_p, ewc.family) == (1.0, 0.5, 2)
    assert one(found.differences, mode="routed", metric="op").family == 1


def test_the_reference_can_be_chosen():
    runs = [record(m, lora__rank=r, seed=s) for m, r, s in product(("treelora", "ewc"), (4, 8), (0, 1))]
    groups = select(runs, ["method", "lora.rank"]).groups
    by = ("method", "lora.rank")
    assert choose_reference(groups, by, None).label == "ewc, lora.rank=4"
    asked = ["treelora, lora.rank=4", "method=treelora, lora.rank=4", "lora.rank=4,method=treelora"]
    assert {choose_reference(groups, by, text).label for text in asked} == {"treelora, lora.rank=4"}
    with pytest.raises(DataError, match=r"reference 'lora.rank=4' is several of the groups; there are: ewc, lora"):
        choose_reference(groups, by, "lora.rank=4")
    with pytest.raises(DataError, match=r"reference 'gem' is none of the groups; there are: ewc; treelora$"):
        choose_reference(select(runs, ["method"]).groups, ("method",), "gem")
    ranks = select(runs, ["lora.rank"]).groups
    assert choose_reference(ranks, ("lora.rank",), "8").label == "lora.rank=8"
    assert experiment(reference="treelora").differences[0].found.t.value == -6.0


def test_one_group_has_nothing_to_compare_with():
    found = compare_groups("exp", select([record(seed=s) for s in (0, 1)], ["method"]))
    assert (found.differences, found.reference) == ((), None)
    assert found.remarks == (
        "There is one group only, method=treelora: nothing to compare with; change --by, or filter less.",
    )
    assert found.standings[0].op.value == 50.0


def test_groups_without_shared_pairs_say_what_parts_them():
    runs = [record("treelora", seed=s) for s in (0, 1)] + [record("sequential", seed=s) for s in (2, 3)]
    found = compare_groups("exp", select(runs, ["method"]))
    assert found.differences == ()
    assert found.remarks == (
        "Pairs with sequential, which agree in data_hash, seed: treelora 0 (of 2 runs); sequential has 2 runs.",
        "treelora and sequential share no pair: no two runs agree in data_hash, seed.",
    )


def test_what_else_parts_the_groups_is_told():
    runs = [record("treelora", seed=s, train__clip=1) for s in (0, 1)]
    runs += [record("sequential", seed=s, train__clip=2) for s in (0, 1)]
    found = compare_groups("exp", select(runs, ["method"]))
    assert (
        "treelora differs from sequential in train.clip (1 against 2) as well; the differences are of all of it."
        in (found.remarks)
    )
    assert found.differences[0].found.pairs == 2


def test_several_runs_on_a_side_count_with_their_mean():
    runs = [record("treelora", seed=s, op=50 + 10 * x, treelora__strength=x) for s, x in product((0, 1), (0, 1, 2))]
    runs += [record("sequential", seed=s, op=55.0) for s in (0, 1)]
    found = one(compare_groups("exp", select(runs, ["method"])).differences, metric="op")
    assert (found.found.pairs, found.found.t.value) == (2, 5.0)


def test_what_was_not_measured_is_not_averaged():
    runs = [record("treelora", seed=s, op=50.0 + s, bwt=1.0 if s else None) for s in (0, 1)]
    runs += [record("sequential", seed=s, op={"routed": 40.0} if s else 30.0, bwt=3.0) for s in (0, 1)]
    found = compare_groups("exp", select(runs, ["method"]))
    mine = one(found.standings, group="treelora", mode="last")
    assert (mine.op.n, mine.bwt.n, mine.seconds) == (2, 1, None)
    assert math.isnan(mine.bwt.t.low)
    assert one(found.standings, group="sequential", mode="routed").runs == 1
    difference = one(found.differences, metric="op", mode="last")  # of seed 1 the other has another mode only
    assert (difference.found.pairs, difference.found.t.value) == (1, 20.0)
    assert mean_of([None, None]) is None
    assert score_of(runs[0], "routed", "op") is None


def test_runs_on_different_tasks_meet_on_the_common_ones():
    runs = [record("treelora", "a, b", s, tasks={"a": 60.0 + s, "b": 10.0}) for s in (0, 1, 2)]
    runs += [record("treelora", "a, b, c", 0, tasks={"a": 50.0, "b": 40.0, "c": 90.0})]
    runs += [record("ewc", "b, a", 0, tasks={"a": 30.0, "b": 50.0})]
    runs += [record("ewc", "c, a, b", 0, tasks={"a": 30.0, "b": 20.0, "c": 0.0})]
    found = compare_groups("exp", select(runs, ["method"]))
    assert found.common_tasks == ("a", "b")
    assert [(c.group, c.mode, c.tasks, c.runs, c.score.value) for c in found.common] == [
        ("ewc", "last", 2, 1, 40.0), ("ewc", "last", 3, 1, 25.0),
        ("treelora", "last", 2, 3, 35.5), ("treelora", "last", 3, 1, 45.0),
    ]  # fmt: skip
    assert sum(s.runs for s in found.standings) == len(found.records) == 4


def test_bounds_are_the_methods_that_do_not_learn_in_order():
    assert {name for name, method in METHODS.items() if method.at_once} == BOUNDS
    found = compare_groups("exp", select([record("joint"), record("ewc")], ["method"]))
    assert [(s.group, s.bound) for s in found.standings] == [("ewc", False), ("joint", True)]


scores = st.lists(st.floats(0, 100), min_size=1, max_size=12)


@given(scores, st.floats(-50, 50))
def test_a_constant_shift_is_the_difference(values, shift):
    runs = [record("sequential", seed=s, op=v) for s, v in enumerate(values)]
    runs += [record("treelora", seed=s, op=v + shift) for s, v in enumerate(values)]
    found = compare_groups("exp", select(runs, ["method"]))
    assert one(found.standings, group="sequential").op.value == pytest.approx(np.mean(values))
    difference = one(found.differences, metric="op").found
    assert difference.pairs == len(values)
    assert difference.t.value == pytest.approx(shift, abs=1e-9)
