"""What search algorithms are told, and how many trials a cluster has room for."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from treelora.errors import ConfigError
from treelora_platform.sweep import driver
from treelora_platform.sweep.journal import Entry
from treelora_platform.sweep.search import optuna_search
from treelora_platform.sweep.space import decode, tune_space
from treelora_platform.sweep.spec import SweepSpec, parse_sweep, template, trial_config

SPACE = {
    "stream.order": [["a", "b"], ["b", "a"]],
    "treelora.exploration": {"low": 0.01, "high": 1.0, "log": True},
    "lora.rank": {"low": 2, "high": 9},
}


def spec(**changes: Any) -> SweepSpec:
    return parse_sweep({"name": "s", "recipe": "demo", "space": SPACE, "search": "optuna", **changes})


def nested(sampled: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("values/"): value for key, value in sampled.items()}


@pytest.mark.parametrize("objectives", [{"op": "max"}, {"op": "max", "seconds": "min"}])
def test_optuna_is_told_of_earlier_trials_and_then_searches_on(objectives: dict[str, Any]) -> None:
    asked = spec(objectives=objectives)
    known = [
        {"stream.order": ["b", "a"], "treelora.exploration": 0.25, "lora.rank": 3},
        {"stream.order": ["a", "b"], "treelora.exploration": 0.5, "lora.rank": 9},
    ]
    entries = [Entry(str(i), values, "done") for i, values in enumerate(known)]
    search = optuna_search(asked, entries)
    search.set_search_properties(None, None, {"values": tune_space(asked), "constant": 1})
    drawn = [decode(asked, search.suggest(str(i))["values"]) for i in range(12)]
    assert drawn[:2] == known
    assert len({str(values) for values in drawn}) == 12
    for values in drawn:
        assert values["stream.order"] in SPACE["stream.order"]
        assert 0.01 <= values["treelora.exploration"] <= 1.0
        assert values["lora.rank"] in range(2, 10)
    assert 9 in {values["lora.rank"] for values in drawn}  # the upper end is inside


@pytest.mark.parametrize(
    ("cluster", "have", "changes", "expected"),
    [
        ({"workers": 2}, {"CPU": 7}, {}, 3),
        ({"workers": 2}, {"CPU": 7}, {"concurrency": 2}, 2),
        ({"workers": 2}, {"CPU": 100}, {"trials": 5}, 5),
        ({"workers": 1, "gpus_per_worker": 0.5}, {"CPU": 8, "GPU": 2}, {}, 4),
        ({"workers": 1}, {"CPU": 8}, {"space": {"cluster.workers": [1, 4]}}, 2),
    ],
)
def test_room(
    monkeypatch: pytest.MonkeyPatch,
    cluster: dict[str, Any],
    have: dict[str, float],
    changes: dict[str, Any],
    expected: int,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: have)
    asked = spec(**changes)
    base = trial_config(template(asked), {f"cluster.{key}": value for key, value in cluster.items()})
    assert driver.room_for(base, asked) == expected


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    base = trial_config(template(spec()), {"cluster.gpus_per_worker": 1, "cluster.workers": 2})
    with pytest.raises(ConfigError, match="one trial needs 2 GPUs, the cluster has 0"):
        driver.room_for(base, spec())
