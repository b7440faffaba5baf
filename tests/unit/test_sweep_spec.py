"""What a sweep may ask for, and what is refused before anything starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from treelora.errors import ConfigError
from treelora_platform.sweep.space import check_rungs, check_space, decode, draw, draws, encode, grid, wire_name
from treelora_platform.sweep.spec import Range, SweepSpec, load_sweep, parse_sweep, template, trial_config

import random  # isort: skip

BASE: dict[str, Any] = {"name": "s", "recipe": "demo", "space": {"lora.rank": [2, 4]}}


def spec(**changes: Any) -> SweepSpec:
    return parse_sweep(BASE | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spaces": {}}, "spaces: no such key; did you mean 'space'"),
        ({"space": {}}, "space: .*at least 1"),
        ({"space": {"lora.rank": []}}, "space.lora.rank: has no values to choose from"),
        ({"space": {"lora.rank": [4, 4]}}, "space.lora.rank: a value is there twice"),
        ({"space": {"name": ["a"]}}, "space: 'name' is the sweep's to set"),
        ({"space": {"tracking.uri": ["a"]}}, "space: 'tracking.uri' is the sweep's to set"),
        ({"overrides": {"lora.rank": 8}}, "overrides: 'lora.rank' is searched"),
        ({"space": {"lora.rank": {"low": 4, "high": 2}}}, "low 4 must be below high 2"),
        ({"space": {"lora.alpha": {"low": 0, "high": 2, "log": True}}}, "log needs low above 0, not 0"),
        ({"search": "grid", "space": {"lora.rank": {"low": 1, "high": 2}}}, "a grid needs a list of values"),
        ({"search": "grid", "space": {"seed": list(range(1001))}}, "more than 1000 combinations"),
        ({"objectives": {"op": "min"}}, "objectives.op: better is 'max', not 'min'"),
        ({"objectives": {"accuracy": "max"}}, "objectives.accuracy.*'op', 'bwt', 'seconds'"),
        ({"scheduler": {"kind": "asha", "grace": 1}}, "scheduler.asha.grace: no such key"),
        ({"scheduler": {"kind": "hyperband"}}, "scheduler: .*'asha', 'none'"),
        ({"trials": 0}, "trials: .*greater than or equal to 1"),
        ({"search": "bayes"}, "search: .*'grid', 'random' or 'optuna'"),
    ],
)
def test_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        spec(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"space": {"lora.rnk": [2]}}, r"space: no field 'lora.rnk' in the configuration; did you mean 'lora.rank'\?"),
        ({"space": {"lora.rank": [2, 0]}}, r"space.lora.rank = 0 .*lora.rank: .*greater than or equal to 1"),
        ({"space": {"treelora.exploration": {"low": -1.0, "high": 1.0}}}, r"space.treelora.exploration = -1.0"),
        ({"recipe": "nowhere"}, "recipe: 'nowhere' is neither a file nor the name of a recipe"),
        ({"overrides": {"train.stepz": 3}}, "train.stepz: no such key; did you mean 'steps'"),
        (
            {"search": "grid", "space": {"cluster.workers": [1, 2], "train.accumulation": [1, 8]}},
            "this combination of the space can't be run .*cluster.workers=2, train.accumulation=8.*multiple of 16",
        ),
        ({"mode": "merged", "overrides": {"evaluation.modes": ["last", "routed"]}}, "mode: 'merged' isn't scored"),
        (
            {"scheduler": {"kind": "asha"}, "objectives": {"seconds": "min", "op": "max"}},
            "asha stops trials by op or bwt; put one of them before 'seconds'",
        ),
    ],
)
def test_a_space_that_cannot_be_run_is_refused(changes: dict[str, Any], said: str) -> None:
    asked = spec(**changes)
    with pytest.raises(ConfigError, match=said):
        check_space(asked, template(asked))


def test_a_stream_too_short_for_halving() -> None:
    halving = spec(scheduler={"kind": "asha", "grace_tasks": 3})
    check_rungs(halving, 4)
    check_rungs(spec(), 1)
    with pytest.raises(ConfigError, match="grace_tasks: 3 of 3 tasks leave nothing to stop early"):
        check_rungs(halving, 3)


def test_every_example_is_valid() -> None:
    folder = Path(__file__).parents[2] / "jobs" / "configs" / "sweeps"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for path in files:
        asked = load_sweep(path)
        assert check_space(asked, template(asked)).name


def test_a_file_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(BASE | {"overrides": {"lora.alpha": 1}}), encoding="utf-8")
    found = load_sweep(path, ["trials=3", "overrides.train.steps=5", "space.seed=[1, 2]", "objectives={bwt: min}"])
    assert (found.trials, found.primary) == (3, "bwt")
    assert found.overrides == {"lora.alpha": 1, "train.steps": 5}
    assert found.space == {"lora.rank": [2, 4], "seed": [1, 2]}
    for text, said in (("trials", "write key=value"), ("name.x=1", "'name' holds 's', not a mapping")):
        with pytest.raises(ConfigError, match=said):
            load_sweep(path, [text])
    path.write_text("- a", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a list; a sweep is a mapping"):
        load_sweep(path)
    path.write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_sweep(path)
    with pytest.raises(ConfigError, match="there is no such file"):
        load_sweep(tmp_path / "other.yaml")


def test_a_grid_in_order() -> None:
    found = spec(search="grid", space={"lora.rank": [2, 4], "method": ["treelora", "ewc"], "seed": [7]})
    assert found.count() == 4
    assert list(grid(found)) == [
        {"lora.rank": 2, "method": "treelora", "seed": 7},
        {"lora.rank": 2, "method": "ewc", "seed": 7},
        {"lora.rank": 4, "method": "treelora", "seed": 7},
        {"lora.rank": 4, "method": "ewc", "seed": 7},
    ]


def test_draws_are_spread_as_asked_and_repeatable() -> None:
    space = {
        "lora.rank": {"low": 2, "high": 5},
        "treelora.exploration": {"low": 0.01, "high": 1.0, "log": True},
        "lora.dropout": {"low": 0.0, "high": 0.5},
    }
    found = spec(space=space, seed=3)
    drawn = list(draws(found, 3000))
    assert drawn[:5] == list(draws(found, 5))
    assert drawn[:5] != list(draws(spec(space=space, seed=4), 5))
    ranks = [one["lora.rank"] for one in drawn]
    assert set(ranks) == {2, 3, 4, 5}
    assert all(abs(ranks.count(rank) - 750) < 100 for rank in (2, 3, 4, 5))
    decade = sum(one["treelora.exploration"] < 0.1 for one in drawn)
    assert abs(decade - 1500) < 130  # half of the drawn lie in each decade
    assert abs(sum(one["lora.dropout"] for one in drawn) / 3000 - 0.25) < 0.01


@given(
    low=st.floats(1e-6, 1e3),
    factor=st.floats(1.001, 1e4),
    log=st.booleans(),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_draws_stay_inside(low: float, factor: float, log: bool, whole: bool, seed: int) -> None:
    ends = (math.ceil(low), math.ceil(low * factor) + 1) if whole else (low, low * factor)
    value = draw(Range(low=ends[0], high=ends[1], log=log), random.Random(seed))
    assert ends[0] <= value <= ends[1]
    assert isinstance(value, int) == whole


def test_values_survive_the_way_through_tune() -> None:
    orders = [["a", "b"], ["b", "a"]]
    found = spec(
        space={"stream.order": orders, "lora.layers": [None, [1]], "lora.rank": {"low": 1, "high": 9}, "seed": [0]}
    )
    sampled = {
        wire_name("stream.order"): encode(orders[1]),
        wire_name("lora.layers"): encode(None),
        wire_name("lora.rank"): 3,
        wire_name("seed"): encode(0),
    }
    assert not any("." in key or "/" in key for key in sampled)
    expected = {"stream.order": ["b", "a"], "lora.layers": None, "lora.rank": 3, "seed": 0}
    assert decode(found, sampled) == expected


def test_a_trial_gets_what_its_preset_fills_in() -> None:
    base = template(spec(overrides={"treelora.sketch_size": 32}))
    default, paper, fresh = (
        trial_config(base, values).treelora
        for values in ({"lora.rank": 2}, {"treelora.preset": "paper"}, {"treelora.start": "fresh"})
    )
    assert (default.penalty, default.guard, default.sketch_size) == ("prox", 1e5, 32)
    assert (paper.signature, paper.penalty, paper.guard, paper.sketch_size) == ("query", "exact", None, 32)
    assert (fresh.penalty, fresh.guard) == ("prox", None)


def test_a_trial_is_named_by_what_it_computes(tmp_path: Path) -> None:
    base = template(spec(overrides={"train.steps": 3}))
    one = trial_config(base, {"lora.rank": 2})
    assert one.train.steps == 3
    assert one.lora.rank == 2
    assert one.name == f"treelora-s0-{one.digest()[:12]}"
    assert trial_config(base, {"lora.rank": 2}, str(tmp_path)).name == one.name
    assert trial_config(base, {"lora.rank": 4}).name != one.name
    assert base["lora"]["rank"] != 2  # what all trials share stays as it was
