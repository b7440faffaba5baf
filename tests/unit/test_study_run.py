"""Running a study: nothing twice, failures beside the others, and tuning; no training."""

import json
import shutil

import pytest
import yaml
from pydantic import ValidationError

from tests.support.study_runs import STUDY, break_run, fake_run
from treelora.errors import DataError
from treelora_platform.prepare import run_folder
from treelora_platform.studies.finished import FILE, finished, log_of
from treelora_platform.studies.run import Entry, distinct, estimate, missing, run_jobs
from treelora_platform.studies.spec import Bench, Study
from treelora_platform.studies.tuning import (
    Trial,
    choose,
    read_tuned,
    settings_for,
    settings_of,
    tuned_from_runs,
    tuning_jobs,
    write_tuned,
)

PLAIN = yaml.safe_load(STUDY)


@pytest.fixture
def bench(tmp_path):
    return Bench(Study.model_validate(PLAIN), tmp_path / "runs")


def shown(tmp_path):
    return (tmp_path / "console.txt").read_text()


def by_rate(config):
    """The best learning rate is 0.002; strength 0.5 costs a point."""
    penalty = 1 if config.method == "treelora" and config.treelora.strength == 0.5 else 0
    return {0.001: 60, 0.002: 80, 0.004: 70}.get(config.train.learning_rate, 50) - penalty


def test_what_is_done_is_not_repeated(bench, log, console, tmp_path):
    jobs, seen = bench.compared(["treelora", "sequential"], {}), []
    run = fake_run(lambda config: 80, seen)
    assert run_jobs(jobs, log, console, run) == []
    assert seen == [job.config.name for job in jobs]
    assert all(finished(job.config) for job in jobs)
    assert run_jobs(jobs, log, console, run) == []
    assert len(seen) == len(jobs) == 8
    # last: learnt at 80, the first of two tasks loses 10
    assert "done: OP last 75.0, routed 80.0" in shown(tmp_path)
    assert "[8/8] sequential, order 2, seed 1, 8 steps" in shown(tmp_path)


def test_an_interrupted_run_is_gone_on_with(bench, log, console):
    jobs = bench.compared(["sequential"], {})
    for job in jobs:
        fake_run(lambda config: 80)(job.config, console)
    break_run(jobs[2].config)
    assert missing(jobs) == [jobs[2]]
    seen = []

    def go_on(config, console):
        seen.append(config.name)
        record = json.loads((run_folder(config) / "run.json").read_text()) | {"status": "FINISHED"}
        (run_folder(config) / "run.json").write_text(json.dumps(record))

    run_jobs(jobs, log, console, go_on)
    assert seen == [jobs[2].config.name]


def test_a_run_of_another_configuration_is_not_complete(bench, log, console):
    [job, *_] = bench.compared(["sequential"], {})
    fake_run(lambda config: 80)(job.config, console)
    path = run_folder(job.config) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config_hash": "another"}))
    assert not finished(job.config)


def test_the_line_of_a_run_outlives_its_folder(bench, log, console, tmp_path):
    jobs, seen = bench.compared(["treelora"], {}), []
    run = fake_run(lambda config: 80, seen)
    run_jobs(jobs, log, console, run)
    before = [finished(job.config) for job in jobs]
    shutil.rmtree(tmp_path / "runs")
    assert [finished(job.config) for job in jobs] == before
    assert before[0].modes["routed"].op == 80
    assert before[0].modes["last"].matrix == ((80.0, 70.0), (None, 80.0))
    assert run_jobs(jobs, log, console, run) == []
    assert len(seen) == len(log_of(jobs[0].config).entries()) == 4  # nothing twice, on disk neither
    (tmp_path / FILE).write_text("")
    assert missing(jobs) == jobs


def test_lines_are_found_wherever_the_data_lie(log, console, tmp_path):
    imported = PLAIN | {"recipe": "cl-benchmark-small", "overrides": {"stream.path": "here"}}
    here, there = (
        Bench(Study.model_validate(imported), tmp_path),
        Bench(Study.model_validate(imported), tmp_path, ("stream.path=/elsewhere",)),
    )
    runs = [b.compared(["sequential"], {}) for b in (here, there)]
    run_jobs(runs[0], log, console, fake_run(lambda config: 80))
    assert [job.config.digest() for job in runs[0]] != [job.config.digest() for job in runs[1]]
    assert [job.config.name for job in runs[0]] == [job.config.name for job in runs[1]]
    assert missing(runs[1]) == []
    twin = {"twin": {"method": "sequential", "set": {"stream.path": "elsewhere"}}}
    with pytest.raises(ValidationError, match=r"variants.twin.set: 'stream.path' is the same for all runs"):
        Study.model_validate(imported | {"variants": PLAIN["variants"] | twin})


def test_variants_that_amount_to_the_same_are_run_once(log, console, tmp_path):
    same = {"twin": {"method": "treelora", "set": {"treelora.search": "tree_lcb"}}}
    bench = Bench(Study.model_validate(PLAIN | {"variants": PLAIN["variants"] | same}), tmp_path)
    jobs = bench.compared(["treelora", "twin"], {})
    seen = []
    run_jobs(jobs, log, console, fake_run(lambda config: 80, seen))
    assert (len(jobs), len(distinct(jobs)), len(seen)) == (8, 4, 4)


def test_a_run_that_fails_is_recorded_and_the_others_go_on(bench, log, console, tmp_path):
    jobs = bench.compared(["treelora", "sequential"], {})
    good = fake_run(lambda config: 80)

    def run(config, console):
        if config.name == jobs[1].config.name:
            raise RuntimeError("the disk is [full]")
        if config.name != jobs[3].config.name:  # this one ends without having done anything
            good(config, console)

    assert run_jobs(jobs, log, console, run) == [jobs[1], jobs[3]]
    assert [bool(finished(job.config)) for job in jobs] == [True, False, True, False, True, True, True, True]
    failures = log.failures(jobs)
    assert [job for job, _ in failures] == [jobs[1], jobs[3]]
    assert failures[0][1] == "the disk is [full]"
    assert "isn't complete" in failures[1][1]
    assert "failed: the disk is [full]" in shown(tmp_path)
    # tried again at the next call, and then no failure any more
    assert run_jobs(jobs, log, console, good) == []
    assert log.failures(jobs) == []


def test_control_c_ends_it_at_any_run(bench, log, console):
    jobs = bench.compared(["sequential"], {})
    good = fake_run(lambda config: 80)

    def run(config, console):
        if config.name == jobs[2].config.name:
            raise KeyboardInterrupt
        good(config, console)

    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, log, console, run)
    assert missing(jobs) == jobs[2:]
    assert len(log.entries()) == 2


def entry(variant, work, seconds, status="done"):
    return Entry("run", variant, work, status, seconds, "", 0.0)


def test_the_time_left_is_told_from_finished_runs(bench):
    jobs = bench.compared(["treelora", "sequential"], {})[:2]  # 2 tasks x 8 steps each: work 16
    assert estimate(jobs, []) is None
    assert estimate([], []) == 0.0
    done = [entry("treelora", 16, 100), entry("treelora", 32, 140), entry("treelora", 1, 9, "failed")]
    # 240 s for 48: 5 s each; of sequential nothing is known, so treelora's stand for it
    assert estimate(jobs, done) == pytest.approx(160)
    assert estimate(jobs, [*done, entry("sequential", 16, 32)]) == pytest.approx(80 + 32)


def test_the_log_survives_a_torn_line_and_refuses_another_file(log):
    log.add(entry("a", 1, 2.0))
    with log.path.open("a") as file:
        file.write('{"run": "torn')
    assert log.entries() == [entry("a", 1, 2.0)]
    log.path.write_text("hello\n")
    with pytest.raises(DataError, match="is not a study's log"):
        log.entries()


def test_the_grid_is_the_product_of_the_shared_and_the_own_one(bench):
    rates = [0.001, 0.002, 0.004]
    assert settings_of(bench.study, "sequential") == [{"train.learning_rate": rate} for rate in rates]
    assert settings_of(bench.study, "treelora") == [
        {"train.learning_rate": rate, "treelora.strength": strength} for rate in rates for strength in (0.1, 0.5)
    ]
    assert settings_of(bench.study, "frozen") == []
    jobs = tuning_jobs(bench, ["treelora", "frozen"])
    assert [(job.order, job.seed, job.steps) for job in jobs] == [(1, 7, 8)] * 6
    assert {job.config.stream.order for job in jobs} == {("subject-colours", "mood-colours")}


def trial(op, **setting):
    return Trial(setting, op, ())


def test_the_best_setting_is_chosen_and_of_equals_the_smaller():
    assert choose([trial(70, a=2), trial(75, a=4), trial(74, a=1)]) == trial(75, a=4)
    assert choose([trial(75, a=4, b=1), trial(75, a=2, b=9), trial(75, a=2, b=3)]) == trial(75, a=2, b=3)
    assert choose([trial(None, a=1), trial(10, a=2)]) == trial(10, a=2)
    assert choose([trial(None, a=1)]) is None


def test_tuning_judges_by_the_variant_s_own_way_of_inference(bench, log, console):
    jobs = tuning_jobs(bench, ["treelora", "routed"])
    run_jobs(jobs, log, console, fake_run(by_rate))
    tuned = tuned_from_runs(bench, ["treelora", "routed"], [])
    assert tuned["treelora"].setting == {"train.learning_rate": 0.002, "treelora.strength": 0.1}
    # two tasks: last is 80 and 70, routed 80 and 80
    assert (tuned["treelora"].mode, tuned["treelora"].op) == ("last", 75.0)
    assert (tuned["routed"].mode, tuned["routed"].op) == ("routed", 80.0)
    assert [t.op for t in tuned["treelora"].trials] == [55.0, 54.0, 75.0, 74.0, 65.0, 64.0]
    assert tuned["treelora"].at_edge == ("treelora.strength",)
    assert tuned["routed"].at_edge == ()


def test_a_setting_that_fails_is_no_candidate_and_one_not_tried_keeps_the_variant_untuned(bench, log, console):
    jobs = tuning_jobs(bench, ["sequential"])
    good = fake_run(by_rate)

    def diverges(config, console):
        if config.train.learning_rate == 0.002:
            raise RuntimeError("not finite")
        good(config, console)

    run_jobs(jobs[:2], log, console, diverges)
    assert tuned_from_runs(bench, ["sequential"], [jobs[1].config.name]) == {}
    run_jobs(jobs, log, console, diverges)
    found = tuned_from_runs(bench, ["sequential"], [jobs[1].config.name])["sequential"]
    assert found.setting == {"train.learning_rate": 0.004}
    assert [t.op for t in found.trials] == [55.0, None, 65.0]


def test_tuned_json_holds_all_and_is_checked(bench, log, console, tmp_path):
    run_jobs(tuning_jobs(bench, ["treelora"]), log, console, fake_run(by_rate))
    tuned = tuned_from_runs(bench, ["treelora"], [])
    write_tuned(tmp_path / "tuned.json", tuned)
    assert read_tuned(tmp_path / "tuned.json") == tuned
    assert read_tuned(tmp_path / "none.json") == {}
    (tmp_path / "bad.json").write_text('{"treelora": {"mode": 3}}')
    with pytest.raises(DataError, match=r"bad\.json: treelora\.mode: .*run the phase `tune` again"):
        read_tuned(tmp_path / "bad.json")


def test_what_was_tuned_under_other_conditions_is_not_used(bench, log, console):
    run_jobs(tuning_jobs(bench, ["treelora"]), log, console, fake_run(by_rate))
    tuned = tuned_from_runs(bench, ["treelora"], [])
    settings, lacking = settings_for(bench, ["treelora", "sequential", "frozen"], tuned)
    assert settings == {"treelora": tuned["treelora"].setting, "frozen": {}}
    assert list(lacking) == ["sequential"]
    other = Bench(bench.study, bench.runs, ("stream.test_rows=5",))
    assert "under other conditions" in settings_for(other, ["treelora"], tuned)[1]["treelora"]


def test_a_variant_may_take_over_what_was_chosen_for_another(tmp_path):
    heir = {"heir": {"method": "treelora", "tuned_as": "treelora", "set": {"treelora.strength": 0.0}}}
    bench = Bench(Study.model_validate(PLAIN | {"variants": PLAIN["variants"] | heir}), tmp_path)
    assert settings_of(bench.study, "heir") == []
    assert settings_for(bench, ["heir"], {}) == ({}, {"heir": "treelora is not tuned yet; run the phase `tune`"})
    setting = {"train.learning_rate": 0.002, "treelora.strength": 0.5}
    [job, *_] = bench.compared(["heir"], {"heir": setting})
    # the variant's own value wins
    assert (job.config.train.learning_rate, job.config.treelora.strength) == (0.002, 0.0)
