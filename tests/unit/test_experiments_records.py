import math

import pytest

from tests.support.records import record
from treelora_platform.experiments.records import ModeScores, record_from
from treelora_platform.tracking_state import CUT, order_tag, tasks_of


def made(status="FINISHED", metrics=None, params=None, tags=None):
    return record_from(
        run_id="1", name="n", status=status, start_unix_ms=1, end_unix_ms=2, params=params or {}, tags=tags or {},
        metrics=metrics or {}, artifact_uri="",
    )  # fmt: skip


def test_scores_of_the_end_count_once_the_run_has_ended():
    metrics = {
        "final/op/last": 40.0, "op/last": 30.0, "bwt/last": 5.0, "op/routed": 60.0, "final/fwt/last": 1.5,
        "final/seconds": 12.5, "final/tokens": 1e3, "final/tokens_per_second": 80.0, "final/stored_bytes": 4096.0,
    }  # fmt: skip
    ended = made("FAILED", metrics)
    assert ended.scores == {"last": ModeScores(40.0, 5.0, 1.5), "routed": ModeScores(60.0)}
    assert (ended.seconds, ended.tokens, ended.tokens_per_second, ended.stored_bytes) == (12.5, 1000, 80.0, 4096)
    # a run that was extended goes on, with the final numbers of its first end still there
    assert made("RUNNING", metrics).scores["last"] == ModeScores(30.0, 5.0, 1.5)
    assert made().scores == {}
    assert made().stored_bytes is None


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.7976931348623157e308])
def test_what_is_no_number_was_not_measured(value):
    assert made(metrics={"final/op/last": value, "final/bwt/last": 1.0}).scores == {"last": ModeScores(None, 1.0)}


def test_tasks_scores_by_way_of_inference():
    metrics = {"score/last/a": 1.0, "score/last/b": 2.0, "score/routed/a": 3.0, "score/": 4.0, "loss": 5.0}
    assert made(metrics=metrics).task_scores == {"last": {"a": 1.0, "b": 2.0}, "routed": {"a": 3.0}}


def test_properties_come_from_parameters_and_tags():
    run = made(
        params={"method": "ewc", "seed": "7"},
        tags={"order": "Task B, a", "mlflow.parentRunId": "p", "mlflow.user": "u", "treelora.sweep": "s",
              "treelora.trial": "t3", "seed": "8"},
    )  # fmt: skip
    assert (run.method, run.seed, run.tasks, run.parent_id) == ("ewc", 7, ("Task B", "a"), "p")
    assert (run.sweep, run.trial, run.is_sweep) == ("s", "t3", False)
    assert run.task_set == {"task-b", "a"}
    assert "mlflow.user" not in run.tags
    assert made(tags={"treelora.kind": "sweep"}).is_sweep
    assert (made().method, made().seed, made().tasks) == ("unknown", None, ())


def test_values_are_fields_before_tags():
    run = made(params={"seed": "7", "lora.rank": "8"}, tags={"seed": "8", "team": "x", "order": "a"})
    asked = ["seed", "tags.seed", "lora.rank", "tags.lora.rank", "team", "order", "nothing"]
    assert [run.value(key) for key in asked] == ["7", "8", "8", None, "x", "a", None]


def test_all_tasks_of_a_stream_that_is_too_long_for_a_tag():
    run = made(tags={"order": "one, two, thr…"}, metrics={f"score/last/{t}": 1.0 for t in ("one", "two", "three")})
    assert run.tasks == ("one", "two")
    assert run.task_set == {"one", "two", "three"}


def test_settings_of_other_methods_are_idle():
    run = record("ewc", ewc__strength=1, treelora__strength=2, lora__rank=3)
    assert [run.is_idle(key) for key in ("ewc.strength", "treelora.strength", "lora.rank", "method")] == [
        False, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("names", [("a", "b"), ("red, green", "b"), ('say "so", now', "ü"), ("[x", "y")])
def test_tasks_come_back_from_the_tag_of_their_order(names):
    assert tasks_of(order_tag(names)) == names
    assert made(tags={"order": order_tag(names)}).tasks == names


def test_of_an_order_that_was_cut_the_whole_names_are_left():
    names = [f"task, {i}" for i in range(9)]
    text = order_tag(names)
    for end in range(len(text)):
        found = tasks_of(text[:end] + CUT)
        assert list(found) == names[: len(found)]
    assert len(tasks_of(text[:60] + CUT)) >= 3


def test_streams_of_the_same_classes_can_be_compared_in_any_cut():
    one, other = (made(tags={"order": order, "classes": "6 classes (ab), 3 tasks"}) for order in ("a, b", "c, d"))
    assert one.task_set != other.task_set
    assert one.stream_set == other.stream_set != made(tags={"order": "a, b"}).stream_set
    assert made(tags={"order": "b, a"}).stream_set == made(tags={"order": "a, b"}).stream_set
