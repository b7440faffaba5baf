"""The study's file, and the jobs that it turns into."""

import re
from pathlib import Path

import pytest
import yaml

from tests.support.study_runs import STUDY
from treelora.errors import ConfigError
from treelora.methods import METHODS
from treelora_platform.studies.spec import Bench, Study, load_study, reduce_study
from treelora_platform.studies.tuning import tuning_jobs

SHIPPED = sorted((Path(__file__).parents[2] / "benchmarks" / "studies").glob("*.yaml"))
PLAIN = yaml.safe_load(STUDY)


@pytest.fixture
def study():
    return Study.model_validate(PLAIN)


@pytest.fixture
def bench(study, tmp_path):
    return Bench(study, tmp_path / "runs")


def settings(study, value=0.002):
    return {name: {"train.learning_rate": value} for name in study.variants}


def test_the_comparison_has_a_job_for_each_variant_order_and_seed(bench, study):
    jobs = bench.compared(study.variants, settings(study))
    found = [(job.seed, job.order, job.variant) for job in jobs]
    # joint training and the frozen model don't depend on the order, so they are run on the first of the two
    expected = [
        (seed, order, variant)
        for seed in (0, 1)
        for order in (1, 2)
        for variant in (
            ("treelora", "routed", "sequential", "joint", "frozen")
            if order == 1
            else ("treelora", "routed", "sequential")
        )
    ]
    assert found == expected
    assert {job.steps for job in jobs} == {8}


def test_bounds_are_run_on_every_other_set_of_tasks():
    orders = [["a", "b"], ["b", "a"], ["a", "c"]]
    study = Study.model_validate({**PLAIN, "orders": orders})
    assert study.places("joint") == study.places("frozen") == [1, 3]
    assert study.places("sequential") == [1, 2, 3]


def test_a_job_is_what_the_study_and_the_variant_say(bench, study):
    setting = {"train.learning_rate": 0.004, "treelora.strength": 0.5}
    job = bench.job("routed", ("mood-colours", "time-colours"), 2, 1, 4, setting)
    config = job.config
    assert (config.method, config.treelora.preset, config.treelora.inference) == ("treelora", "plus", "routed")
    assert (config.train.learning_rate, config.treelora.strength, config.train.steps) == (0.004, 0.5, 4)
    assert (config.seed, config.stream.seed, config.stream.order) == (1, 1, ("mood-colours", "time-colours"))
    assert config.output_dir == str(bench.runs)
    assert config.name == f"treelora-s1-{config.lasting_digest()[:12]}"
    assert job.label == "routed, order 2, seed 1, 4 steps, learning_rate 0.004, strength 0.5"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_runs_of_a_study_have_the_dtype_that_fits_this_machine(bench, dtype, monkeypatch):
    monkeypatch.setattr("treelora_platform.precision.fitting_dtype", lambda device: dtype)
    tasks, setting = ("mood-colours", "time-colours"), {"train.learning_rate": 0.004}
    made, kept = (bench.job("treelora", tasks, 1, 1, 4, setting, asked) for asked in ({}, {"model.dtype": "bfloat16"}))
    assert (made.config.model.dtype, kept.config.model.dtype) == (dtype, "bfloat16")
    assert (made.config.name == kept.config.name) == (dtype == "bfloat16")


def test_runs_are_named_by_what_they_compute(bench, study):
    def name(variant="treelora", seed=0, steps=8, rate=0.001, tasks=("mood-colours", "time-colours")):
        return bench.job(variant, tasks, 1, seed, steps, {"train.learning_rate": rate}).config.name

    others = [name("routed"), name(seed=1), name(steps=4), name(rate=0.002), name(tasks=("time-colours",))]
    assert len({name(), *others}) == 6
    # settings of methods that aren't used make no other run
    assert bench.job("sequential", ("a",), 1, 0, 8, {"treelora.strength": 0.5}).config.name == (
        bench.job("sequential", ("a",), 1, 0, 8, {}).config.name
    )


def test_the_quality_jobs_are_those_of_the_other_steps(bench, study):
    jobs = bench.quality(study.variants, settings(study))
    assert {(job.variant, job.steps) for job in jobs} == {("treelora", 4), ("sequential", 4)}
    assert len(jobs) == 8
    assert bench.quality(["joint", "routed"], settings(study)) == []
    every = Study.model_validate({**PLAIN, "quality": [], "steps": [2, 4, 8]})
    assert {job.variant for job in Bench(every, bench.runs).quality(every.variants, {})} == {
        "treelora", "routed", "sequential",
    }  # fmt: skip


def test_the_person_s_overrides_go_to_every_run_but_change_nothing_that_is_the_study_s(study, tmp_path):
    bench = Bench(study, tmp_path, ("stream.test_rows=5",))
    assert {job.config.stream.test_rows for job in bench.compared(study.variants, {})} == {5}
    with pytest.raises(ConfigError, match=r"'seed=3'.*study's to set"):
        Bench(study, tmp_path, ("seed=3",))
    with pytest.raises(ConfigError, match=r"train\.steps"):
        Bench(study, tmp_path, ("train.steps=3",))


def test_a_variant_that_can_not_be_run_is_named(study, tmp_path):
    wrong = Study.model_validate(PLAIN | {"variants": PLAIN["variants"] | {"odd": {"method": "no-such-method"}}})
    with pytest.raises(ConfigError, match=r"variant 'odd'.*\n? *method: .*no-such-method"):
        Bench(wrong, tmp_path).compared(["odd"], {})


def change(**parts):
    return PLAIN | parts


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (change(sedes=[1]), r"sedes: no such key"),
        (change(reference="plus"), r"reference: no variant 'plus'; there are treelora"),
        (change(quality=["ewc"]), r"quality: no variant 'ewc'"),
        (change(ablation={"a": "ewc"}), r"ablation: no variant 'ewc'"),
        (change(seeds=[]), r"seeds: .*at least 1"),
        (change(seeds=[1, 1]), r"seeds: 1 is there twice"),
        (change(orders=[["a", "b"], ["a", "b"]]), r"orders: .* is there twice"),
        (change(steps=[8, 4]), r"steps: \[8, 4\] must be positive and increase"),
        (change(tuning=PLAIN["tuning"] | {"orders": [["time-colours", "mood-directions"]]}), r"tune on another order"),
        (change(tuning=PLAIN["tuning"] | {"seeds": [1]}), r"tuning\.seeds: 1 is also compared on"),
        (change(tuning=PLAIN["tuning"] | {"grid": {"train.learning_rate": []}}), r"'train.learning_rate' has no val"),
        (change(tuning=PLAIN["tuning"] | {"extra": {"ewc": {"ewc.strength": [1]}}}), r"tuning.extra: no variant 'ewc'"),
        (change(overrides={"seed": 1}), r"overrides: 'seed' is the study's to set"),
    ],
)
def test_mistakes_in_a_study_are_named(tmp_path, plain, message):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(plain, sort_keys=False))
    with pytest.raises(ConfigError, match=message) as caught:
        load_study(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"method": "treelora", "set": {"train.steps": 3}}, r"variants.odd.set: 'train.steps' is the study's"),
        (
            {"method": "treelora", "set": {"train.learning_rate": 3}},
            r"variants.odd.set: 'train.learning_rate' is tuned",
        ),
        ({"method": "sequential", "replay": True}, r"variants.odd.replay: sequential never sees earlier rows"),
        ({"method": "sequential", "tuned_as": "nobody"}, r"tuned_as: no variant 'nobody'"),
        ({"method": "sequential", "mode": "best"}, r"variants.odd.mode: Input should be"),
    ],
)
def test_mistakes_in_a_variant_are_named(tmp_path, variant, message):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(change(variants=PLAIN["variants"] | {"odd": variant})))
    with pytest.raises(ConfigError, match=message):
        load_study(path)


def test_what_is_no_study_file_is_refused(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [")
    for name, said in (("broken.yaml", "is not YAML"), ("missing.yaml", "there is no such file")):
        with pytest.raises(ConfigError, match=rf"{re.escape(name)}: {said}"):
            load_study(tmp_path / name)
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ConfigError, match=r"list\.yaml: holds a list; a study is a mapping"):
        load_study(tmp_path / "list.yaml")


def test_settings_are_taken_over_from_one_variant_only(tmp_path):
    chain = {"a": {"method": "sequential", "tuned_as": "b"}, "b": {"method": "sequential", "tuned_as": "treelora"}}
    with pytest.raises(ValueError, match=r"tuned_as: 'b' takes its settings over itself"):
        Study.model_validate(change(variants=PLAIN["variants"] | chain))


def test_a_reduced_study_is_small(tmp_path):
    plain = change(
        reduced={"tasks": 2, "steps": [1, 2], "overrides": {"stream.test_rows": 4}}, orders=[["a", "b", "c"]]
    )
    small = reduce_study(Study.model_validate(plain))
    assert (small.orders, small.seeds, small.steps, small.tuning) == ((("a", "b"),), (0,), (1, 2), None)
    [job, *_] = Bench(small, tmp_path).compared(["treelora"], {})
    assert job.config.stream.test_rows == 4


def shipped_variants():
    for path in SHIPPED:
        for name, variant in load_study(path).variants.items():
            missing = variant.method not in METHODS
            marks = [pytest.mark.xfail(reason="method not registered", strict=True)] if missing else []
            yield pytest.param(path, name, marks=marks, id=f"{path.stem}-{name}")


@pytest.mark.parametrize(("path", "variant"), shipped_variants())
def test_every_variant_of_the_shipped_studies_can_be_run(path, variant, tmp_path):
    study = load_study(path)
    for small in (study, reduce_study(study)):
        jobs = Bench(small, tmp_path).compared([variant], {})
        assert jobs[0].config.method == study.variants[variant].method
        assert study.variants[variant].mode in jobs[0].config.evaluation.modes
        # what a method draws by itself follows the run's seed
        assert all(job.config.flat().get(f"{job.config.method}.seed", job.seed) == job.seed for job in jobs)
    trials = tuning_jobs(Bench(study, tmp_path), [variant])
    assert all(job.config.flat()[key] == value for job in trials for key, value in job.setting.items())


def test_the_page_s_example_is_a_study():
    page = (Path(__file__).parents[2] / "docs" / "comparison.md").read_text()
    example = Study.model_validate(yaml.safe_load(page.split("```yaml")[1].split("```")[0]))
    assert example.variants["plus"].mode == "routed"


def test_the_shipped_studies_meet_confusable_pairs_and_share_their_runs(tmp_path):
    studies = {path.stem: load_study(path) for path in SHIPPED}
    pairs = ({"MNLI", "CB"}, {"SST-2", "amazon"})
    orders = [set(order) for order in studies["cl_benchmark"].orders]
    assert all(any(pair <= order for order in orders) for pair in pairs)
    for stems in (("cl_benchmark", "ablation"), ("builtin_methods", "builtin_parts")):
        names = [
            {job.config.name for job in Bench(studies[stem], tmp_path).compared(["treelora"], {})} for stem in stems
        ]
        assert names[1]
        assert names[1] <= names[0]
