import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.records import record
from treelora.errors import DataError
from treelora_platform.config import ExperimentConfig
from treelora_platform.experiments.fields import (
    as_number,
    check_keys,
    field,
    matching,
    parse_condition,
    settings,
    show_values,
    sort_key,
)
from treelora_platform.tracking_state import loggable_params

RUNS = [
    record("treelora", seed=0, name="t4", lora__rank=4, train__learning_rate="0.001", treelora__search="lcb"),
    record("treelora", seed=1, name="t8", lora__rank=8, train__learning_rate="1e-3", treelora__search="lcb"),
    record("ewc", seed=0, name="e16", lora__rank=16, train__learning_rate="0.002", treelora__search="lcb"),
    record("frozen", seed=0, name="f", tags={"team": "x"}),
]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["lora.rank=8"], ["t8"]),
        (["lora.rank==8.0"], ["t8"]),
        (["lora.rank!=8"], ["t4", "e16", "f"]),
        (["lora.rank<16"], ["t4", "t8"]),
        (["lora.rank <= 8"], ["t4", "t8"]),
        (["lora.rank>=8"], ["t8", "e16"]),
        (["lora.rank>4", "method=treelora"], ["t8"]),
        (["train.learning_rate=0.001"], ["t4", "t8"]),
        (["method!=treelora"], ["e16", "f"]),
        (["team=x"], ["f"]),
        (["tags.team!=x"], ["t4", "t8", "e16"]),
        (["tasks=a, b"], ["t4", "t8", "e16", "f"]),
        (["treelora.search=lcb"], ["t4", "t8"]),  # of ewc it is idle
        ([], ["t4", "t8", "e16", "f"]),
    ],
)
def test_conditions(conditions, expected):
    assert [run.name for run in matching(RUNS, conditions)] == expected


@pytest.mark.parametrize("text", ["lora.rank", "=8", "", "lora.rank~8", "a=b<c=", "<3"])
def test_what_is_no_condition_is_told_what_is(text):
    if text == "a=b<c=":  # the value may hold anything
        assert parse_condition(text).text == "b<c="
        return
    with pytest.raises(DataError, match="write key=value, key!=value or key<number"):
        parse_condition(text)


def test_only_numbers_are_less_or_greater():
    with pytest.raises(DataError, match=r"filter 'lora.rank<eight': < wants a number"):
        parse_condition("lora.rank<eight")
    with pytest.raises(DataError, match=r"fits none of 4 runs; method there is ewc, frozen, treelora"):
        matching(RUNS, ["method>3"])


def test_a_condition_that_nothing_fits_names_what_is_there():
    with pytest.raises(DataError, match=r"filter 'lora.rank=5': fits none of 2 runs; lora.rank there is 4, 8"):
        matching(RUNS, ["method=treelora", "lora.rank=5"])


def test_a_field_that_no_run_has_names_those_that_exist():
    with pytest.raises(DataError, match=r"filter 'lora.rnak=4': no run has .* 'lora.rnak'; did you mean 'lora.rank'"):
        matching(RUNS, ["lora.rnak=4"])
    with pytest.raises(DataError, match=r"--by: .* fields that differ between the runs: data_hash, lora.rank, method"):
        check_keys(["zzzzzz"], RUNS, "--by")
    check_keys(["tasks", "order", "tags.team", "method"], RUNS, "--by")


def test_settings_of_other_methods_have_no_value():
    assert [field(run, "treelora.search") for run in RUNS] == ["lcb", "lcb", None, None]
    # a tag is no setting, whatever its name looks like
    assert field(record("ewc", tags={"treelora.sweep": "s"}), "treelora.sweep") == "s"


def test_settings_are_what_bears_on_scores():
    everything = loggable_params(ExperimentConfig(method="ewc", name="x").as_dict())
    fields = {key.replace(".", "__"): value for key, value in everything.items() if "." in key}
    run = record("ewc", "b, a", 3, **fields)
    found = settings(run)
    assert found["order"] == "b, a"
    assert found["data_hash"] == "data of b, a 3"
    assert found["lora.rank"] == everything["lora.rank"]
    assert any(key.startswith("ewc.") for key in found)
    sections = {key.split(".")[0] for key in found}
    assert not sections & {"name", "output_dir", "tracking", "checkpoint", "cluster", "engine", "treelora", "gem"}
    assert not found.keys() & {"evaluation.modes", "stream.order", "stream.path"}
    assert found.keys() >= {"method", "seed", "model.name", "train.learning_rate", "evaluation.router_layer"}


def test_a_field_that_is_newer_than_the_run_has_the_default():
    defaults = loggable_params(ExperimentConfig().as_dict())
    old = settings(record(lora__rank=4))
    assert old["lora.alpha"] == defaults["lora.alpha"]
    assert old["lora.rank"] == "4"
    assert "train.learning_rate" not in old  # nothing of that section was recorded: nobody knows


@given(st.floats(allow_nan=False))
def test_numbers_are_read_back(value):
    assert as_number(repr(value)) == value


@pytest.mark.parametrize("text", ["", "nan", "null", "[1]", "8 rows"])
def test_what_is_no_number(text):
    assert as_number(text) is None


def test_values_are_sorted_by_size():
    assert sorted(["16", "a", None, "4", "1e1"], key=sort_key) == ["4", "1e1", "16", "a", None]
    assert show_values(["8", "16", "8", None, "4"]) == "4, 8, 16, none"
    assert show_values(map(str, range(9))) == "0, 1, 2, 3, 4, 5 and 3 more"
