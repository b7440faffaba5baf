"""Jobs as the cluster remembers them, and names that were used before."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora.errors import ConfigError
from treelora_platform.submit.records import Job, metadata_of, next_attempt, same_name, submission_id
from treelora_platform.submit.submission import Needs, Submission

THIS = Submission("experiment", "tiny", "a" * 64, {"seed": 1, "lora.rank": 4}, {}, (), Needs("/mnt/runs"))
OTHER = replace(THIS, digest="b" * 64, settings={"lora.rank": 8, "train.steps": 3})


def job(submission: Submission = THIS, attempt: int = 1, status: str = "SUCCEEDED", code: int | None = None) -> Job:
    versions = {"treelora": "0.1.0", "commit": "c0ffee"}
    metadata = metadata_of(submission, "d" * 64, versions, attempt)
    return Job(submission_id(submission.name, attempt), status, metadata, driver_exit_code=code)


def refusal(jobs: list[Job], submission: Submission = THIS, anew: bool = False) -> str:
    with pytest.raises(ConfigError) as refused:
        next_attempt(jobs, submission, anew, " --address X")
    return str(refused.value)


def test_what_is_kept_with_a_job() -> None:
    assert job().metadata == {
        "treelora.kind": "experiment",
        "treelora.name": "tiny",
        "treelora.attempt": "1",
        "treelora.config_hash": "a" * 64,
        "treelora.package_hash": "d" * 64,
        "treelora.version": "0.1.0",
        "treelora.commit": "c0ffee",
        "treelora.output_dir": "/mnt/runs",
        "treelora.settings": '{"lora.rank": 4, "seed": 1}',
    }
    long = replace(THIS, settings={"model.system_prompt": "x" * 9000})
    assert "treelora.settings" not in job(long).metadata


def test_the_first_and_the_next() -> None:
    assert next_attempt([], THIS, False, "") == 1
    ended = [job(attempt=1, status="FAILED", code=1), job(attempt=10, status="STOPPED"), job(attempt=2)]
    assert next_attempt(ended, THIS, False, "") == 11
    others = [job(replace(THIS, name="tiny-2")), Job("tiny-7", "SUCCEEDED"), job(replace(THIS, name="other"), 30)]
    assert next_attempt(others, THIS, False, "") == 1


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
@pytest.mark.parametrize("anew", [False, True])
def test_one_that_is_live_is_pointed_out(status: str, anew: bool) -> None:
    assert refusal([job(attempt=3, status=status)], anew=anew) == (
        f"'tiny' is {status.lower()} as tiny-3; `treelora jobs logs tiny-3 --follow --address X` follows it, `treelora "
        "jobs stop tiny-3 --address X` stops it"
    )
    live_and_other = refusal([job(OTHER, 3, status)], anew=anew)
    assert "as tiny-3 with another configuration (bbbbbbbbbbbb, now aaaaaaaaaaaa): lora.rank: 8 -> 4" in live_and_other


def test_another_configuration_of_that_name_is_refused_with_the_difference() -> None:
    assert refusal([job(OTHER)]) == (
        "'tiny' was submitted before with another configuration (bbbbbbbbbbbb, now aaaaaaaaaaaa): lora.rank: 8 -> 4, "
        "train.steps: 3 -> default, seed: default -> 1; choose another name, --fresh to begin anew, or --force to go "
        "on all the same"
    )
    assert next_attempt([job(OTHER)], THIS, True, "") == 2


def test_both_hashes_are_named_where_the_difference_is_not_known() -> None:
    bare = job(OTHER)
    for settings in (None, "{", "{}"):
        metadata = {**bare.metadata, "treelora.settings": settings} if settings else dict(bare.metadata)
        if settings is None:
            del metadata["treelora.settings"]
        found = refusal([replace(bare, metadata=metadata)])
        assert "another configuration (bbbbbbbbbbbb, now aaaaaaaaaaaa); choose another name" in found


def test_many_differences_are_counted() -> None:
    many = replace(OTHER, settings={f"k{i}": i for i in range(9)})
    assert refusal([job(many)]).count(" -> default") == 5
    assert "and 6 more" in refusal([job(many)])


def test_the_newest_one_decides() -> None:
    assert next_attempt([job(OTHER, 1), job(THIS, 2)], THIS, False, "") == 3
    assert "submitted before" in refusal([job(THIS, 1), job(OTHER, 2)])


def test_one_that_was_refused_had_not_begun() -> None:
    refused = job(OTHER, 2, "FAILED", code=2)
    assert next_attempt([refused], THIS, False, "") == 3
    assert next_attempt([job(THIS, 1), refused], THIS, False, "") == 3
    assert "submitted before" in refusal([job(OTHER, 1), job(THIS, 2, "FAILED", code=2)])


def test_a_name_is_of_one_kind() -> None:
    sweep = replace(THIS, kind="sweep")
    assert refusal([job(sweep)]) == "'tiny' was a sweep (tiny-1); choose another name"


def test_comparisons_are_made_as_often_as_one_likes() -> None:
    one = replace(THIS, kind="comparison", name="compare-x")
    two = replace(OTHER, kind="comparison", name="compare-x")
    assert next_attempt([job(one)], two, False, "") == 2
    assert "is running as compare-x-1" in refusal([job(one, status="RUNNING")], two)


@given(st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=2, unique=True))
def test_names_that_differ_in_more_than_case_do_not_meet(names: list[str]) -> None:
    one, other = names
    if one.replace("_", "-").replace(" ", "-").lower() == other.replace("_", "-").replace(" ", "-").lower():
        return
    jobs = [job(replace(THIS, name=one), 1, "RUNNING")]
    assert same_name(jobs, one) == jobs
    assert same_name(jobs, other) == []


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 130, 130),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("FAILED", 0, 1),
        ("STOPPED", None, 130),
    ],
)
def test_the_exit_code_is_the_commands_own(status: str, driver: int | None, code: int) -> None:
    assert Job("x-1", status, driver_exit_code=driver).exit_code == code


def test_what_a_job_said_last() -> None:
    message = "Job entrypoint command failed with exit code 2, last available logs:\n...\nerror: lora.rank: 0\nbye\n"
    assert Job("x-1", "FAILED", message=message, driver_exit_code=2).said() == "exit 2, error: lora.rank: 0"
    killed = "Job entrypoint command failed with exit code -9, last available logs:\nstep 3\n"
    assert Job("x-1", "FAILED", message=killed, driver_exit_code=-9).said() == "exit 137, step 3"
    setup = "runtime_env setup failed: no space left\nTraceback"
    assert Job("x-1", "FAILED", message=setup).said() == "runtime_env setup failed: no space left"
    assert Job("x-1", "RUNNING", message="Job is currently running.").said() == "Job is currently running."


def test_how_long_it_took() -> None:
    assert Job("x-1", "SUCCEEDED", begun_ms=1_000, ended_ms=3_500).seconds() == 2.5
    assert Job("x-1", "PENDING").seconds() == 0.0


def test_settings_are_compared_as_json_has_them() -> None:
    tuples = replace(THIS, settings={"stream.order": ("a", "b")})
    assert json.loads(job(tuples).metadata["treelora.settings"]) == {"stream.order": ["a", "b"]}
    changed = replace(tuples, digest="e" * 64, settings={"stream.order": ("a", "b"), "seed": 3})
    assert "): seed: default -> 3; choose" in refusal([job(tuples)], changed)
