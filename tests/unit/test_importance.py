import numpy as np
import pytest
from sklearn.ensemble import RandomForestRegressor

from treelora_platform.experiments.importance import (
    MIN_R2,
    TREES,
    Parameter,
    _Forest,
    importance,
    number,
    runs_needed,
    shown,
    varying,
)
from treelora_platform.experiments.records import RunRecord


def record(params, run=0, tags=None):
    return RunRecord(
        run_id=f"r{run}", name=f"run {run}", status="FINISHED", parent_id=None, start_unix_ms=0, end_unix_ms=1,
        params=params, tags=tags or {}, scores={}, seconds=None, tokens=None, tokens_per_second=None,
        stored_bytes=None, artifact_uri="",
    )  # fmt: skip


def column(key, values):
    return Parameter(key, tuple(None if value is None else str(value) for value in values))


@pytest.fixture(scope="module")
def searched():
    """Rank decides most, the rate some, the depth nothing; 120 runs."""
    rng = np.random.default_rng(3)
    rank, rate, depth = rng.choice([2, 4, 8, 16], 120), rng.uniform(0.001, 0.1, 120), rng.choice(["a", "b", "c"], 120)
    scores = 3 * np.log2(rank) + 20 * rate + rng.normal(0, 0.3, 120)
    return [column("rank", rank), column("rate", rate), column("depth", depth)], scores.tolist()


def test_what_decides_comes_first_and_noise_is_worth_nothing(searched):
    parameters, scores = searched
    found = importance(parameters, scores)
    assert found.withheld is None
    assert found.runs == 120
    assert found.r2 > 0.9
    assert [parameter.key for parameter, _, _ in found.losses] == ["rank", "rate", "depth"]
    losses = [loss for _, loss, _ in found.losses]
    assert losses[0] > 10 * losses[1]
    assert abs(losses[2]) < 0.02


def test_r2_is_the_one_that_scikit_learn_finds_out_of_the_bag(searched):
    parameters, scores = searched
    x = np.column_stack([[float(v) for v in parameters[0].values], [float(v) for v in parameters[1].values]])
    theirs = RandomForestRegressor(TREES, min_samples_leaf=2, random_state=5, oob_score=True).fit(x, scores)
    assert _Forest(x, np.array(scores), 5).r2(x) == pytest.approx(theirs.oob_score_, abs=1e-12)


def test_a_shuffled_parameter_that_decides_all_leaves_nothing():
    rng = np.random.default_rng(0)
    values = rng.permutation(np.repeat([0.0, 1.0], 50))
    found = importance([column("x", values)], values.tolist())
    assert found.r2 == pytest.approx(1.0)
    # a shuffle is right in about half of the runs; squared error 0.5 over variance 0.25: R2 is -1 then
    assert found.losses[0][1] == pytest.approx(2.0, abs=0.15)


def test_the_same_seed_gives_the_same_numbers(searched):
    assert importance(*searched, seed=4) == importance(*searched, seed=4)
    assert importance(*searched, seed=4) != importance(*searched, seed=5)


def test_unset_is_a_value_of_its_own():
    scores = [10.0 if i % 2 else 50.0 for i in range(40)]
    found = importance([column("x", [None if i % 2 else 3 for i in range(40)])], scores)
    assert found.r2 == pytest.approx(1.0)


def test_noise_is_withheld():
    rng = np.random.default_rng(1)
    found = importance([column("x", rng.normal(size=60))], rng.normal(size=60).tolist())
    assert found.r2 < MIN_R2
    assert found.losses == ()
    assert "explains too little" in found.withheld
    assert f"{found.r2:.2f}" in found.withheld


def test_too_few_runs_are_withheld_and_the_number_needed_is_said():
    scores = [float(i) for i in range(19)] + [None] * 30
    found = importance([column("x", range(49))], scores)
    assert (found.runs, found.r2, found.losses) == (19, None, ())
    assert found.withheld == "19 scored runs are too few for 1 parameter; it takes 20"
    assert [runs_needed(n) for n in (1, 3, 4, 10)] == [20, 20, 24, 60]


def test_equal_scores_and_no_parameter_are_withheld():
    assert importance([column("x", range(30))], [5.0] * 30).withheld == "all runs have the same score"
    assert importance([], [1.0] * 30).withheld == "no parameter differs between the runs"


def test_what_varies():
    runs = [
        {"seed": s, "lora.rank": r, "lora.alpha": 4 * r, "name": f"n{s}{r}", "model.name": "tiny", "sweep.lora.rank": r}
        for s in range(2)
        for r in (4, 8)
    ]
    found = varying([record({k: str(v) for k, v in run.items()}) for run in runs])
    assert [(p.key, p.searched, p.together) for p in found] == [
        ("lora.rank", True, ("lora.alpha",)),
        ("seed", False, ()),
    ]
    assert found[0].values == ("4", "8", "4", "8")


def test_settings_of_another_method_are_unset():
    runs = [
        {"method": "ewc", "ewc.strength": "1", "treelora.depth": "3"},
        {"method": "ewc", "ewc.strength": "2", "treelora.depth": "4"},
        {"method": "treelora", "ewc.strength": "2", "treelora.depth": "5"},
    ]
    found = {p.key: p.values for p in varying([record(run) for run in runs])}
    assert found == {"method": ("ewc", "ewc", "treelora"), "ewc.strength": ("1", "2", None)}


def test_texts_that_no_two_runs_share_are_left_out_but_numbers_are_not():
    runs = [{"out": f"folder {i}", "train.learning_rate": f"{i}e-3", "train.decay": f"0.{i}"} for i in range(1, 5)]
    assert [p.key for p in varying([record(run) for run in runs])] == ["train.decay", "train.learning_rate"]


def test_one_run_and_one_value_have_nothing_that_varies():
    assert varying([record({"seed": "1"})]) == []
    assert varying([record({"seed": "1", "lora.rank": "8"}), record({"seed": "1"})]) == []


def test_values_in_order():
    assert column("x", ["10", "9", "1e2"]).distinct == ["9", "10", "1e2"]
    assert column("x", ["b", "10", "a", None]).distinct == ["10", "a", "b"]
    assert column("x", ["10", None]).is_number
    assert not column("x", ["10", "nan"]).is_number


def test_values_for_people():
    assert [number(text) for text in ("1e-3", "nan", "inf", "x", None)] == [0.001, None, None, None, None]
    assert shown('["q_proj", "v_proj"]') == "q_proj, v_proj"
    assert shown('["cut off by the server') == '["cut off by the server'
    assert shown("x" * 40, 10) == "x" * 9 + "…"
    assert shown(None) == "unset"
