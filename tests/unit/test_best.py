"""The best configuration: means over replicates, what is said of them, and YAML that makes the run again."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.mlflow_runs import add_run, final_metrics, run_tags
from tests.support.streams import tiny_config
from treelora.errors import ConfigError, DataError
from treelora_platform.config import ExperimentConfig, load_config, parse_config
from treelora_platform.experiments.best import (
    RERUN_TAG,
    Best,
    find_best,
    own_mode,
    rank,
    settings_of,
)
from treelora_platform.experiments.best_output import config_from_params, config_of, said, show_best, write_best
from treelora_platform.experiments.records import RunRecord, record_from
from treelora_platform.tracking_query import History
from treelora_platform.tracking_state import loggable_params

ORDERS = (("alpha", "beta"), ("beta", "alpha"))


def record(run_id: str, params: dict[str, Any], op: float | dict[str, float], **more: Any) -> RunRecord:
    """A finished run with these fields, all others as by default."""
    config = parse_config(params)
    tags = run_tags(config.method, more.pop("tasks", ORDERS[0]), config.seed, **more.pop("tags", {}))
    metrics = {key: float(value) for key, value in final_metrics(op, **more).items() if isinstance(value, float | int)}
    return record_from(
        run_id=run_id,
        name=config.name,
        status="FINISHED",
        start_unix_ms=1000,
        end_unix_ms=2000,
        params=loggable_params(config.as_dict()),
        tags=tags,
        metrics=metrics,
        artifact_uri="",
    )


class Runs:
    """A history of runs that are given."""

    def __init__(self, *runs: RunRecord) -> None:
        self.all = list(runs)

    def runs(self, experiment: str, filter_string: str = "", finished_only: bool = False) -> list[RunRecord]:
        return self.all


def best_of(*runs: RunRecord, **options: Any) -> Best:
    return find_best(Runs(*runs), "exp", **options)


def test_the_mean_over_replicates_decides() -> None:
    """Rank 4 has the luckiest run, rank 16 the better mean: 70 against (90 + 40) / 2 = 65."""
    runs = [
        record("a", {"lora": {"rank": 4}, "name": "a"}, 90.0),
        record("b", {"lora": {"rank": 4}, "name": "b", "seed": 1}, 40.0),
        record("c", {"lora": {"rank": 16}, "name": "c"}, 72.0),
        record("d", {"lora": {"rank": 16}, "name": "d", "seed": 1}, 68.0),
        record("e", {"name": "e"}, 10.0),
    ]
    best = best_of(*runs)
    assert [config.mean for config in best.ranking] == [70.0, 65.0, 10.0]
    assert [dict(config.settings) for config in best.ranking] == [{"lora.rank": "16"}, {"lora.rank": "4"}, {}]
    assert best.run.run_id == "c"
    assert best.winner.deviation == pytest.approx(8**0.5)  # (72 - 70)^2 + (68 - 70)^2 = 8, by n - 1 = 1
    # Student's t with one degree of freedom at 97.5 %: 12.7062; standard error 2
    assert (best.winner.interval.low, best.winner.interval.high) == pytest.approx(
        (70 - 25.4124, 70 + 25.4124), abs=1e-3
    )
    assert said(best.winner, best) == "70.00 % [44.59, 95.41] over 2 runs (sd 2.83)"
    assert said(best.ranking[2], best) == "10.00 % over 1 run"
    assert best.warnings == ()


@pytest.mark.parametrize(
    ("metric", "winner"),
    [("op", "a"), ("bwt", "b"), ("fwt", "a"), ("seconds", "b"), ("tokens", "b"), ("tokens_per_second", "a"),
     ("stored_bytes", "b")],
)  # fmt: skip
def test_what_is_better_depends_on_the_metric(metric: str, winner: str) -> None:
    """Run a: OP 60, BWT 5, FWT 2, 20 s, 4000 tokens (200 /s), 900 bytes; run b: 50, 4, 1, 10 s, 1000 (100 /s), 800."""
    runs = [
        record("a", {"lora": {"rank": 4}}, 60.0, bwt=5.0, fwt=2.0, seconds=20.0, tokens=4000, stored_bytes=900),
        record("b", {"lora": {"rank": 2}}, 50.0, bwt=4.0, fwt=1.0, seconds=10.0, tokens=1000, stored_bytes=800),
    ]
    assert best_of(*runs, metric=metric).run.run_id == winner
    assert best_of(*reversed(runs), metric=metric).run.run_id == winner


def test_of_the_winners_runs_the_best_one_is_taken() -> None:
    runs = [record(str(seed), {"seed": seed}, 50.0, bwt=value) for seed, value in enumerate((7.0, 3.0, 5.0))]
    assert best_of(*runs, metric="bwt").run.run_id == "1"


def test_equals_are_told_apart_by_time() -> None:
    slow, fast = record("a", {"lora": {"rank": 4}}, 60.0), record("b", {"lora": {"rank": 2}}, 60.0, seconds=5.0)
    assert best_of(slow, fast).run.run_id == best_of(fast, slow).run.run_id == "b"
    assert best_of(slow, fast).warnings[1].startswith("1 more configurations have the same mean: the one that took")


def test_each_run_is_judged_by_its_own_way_of_inference() -> None:
    routed = record("a", {"treelora": {"inference": "routed"}}, {"last": 20.0, "routed": 80.0})
    last = record("b", {"treelora": {"inference": "last"}}, {"last": 50.0, "routed": 99.0})
    peer = record("c", {"method": "sequential"}, {"last": 40.0, "routed": 99.0})
    assert [own_mode(run) for run in (routed, last, peer)] == ["routed", "last", "last"]
    best = best_of(routed, last, peer)
    assert [config.mean for config in best.ranking] == [80.0, 50.0, 40.0]
    assert best.label == "op (last or routed)"
    asked = best_of(routed, last, peer, mode="last")
    assert [config.mean for config in asked.ranking] == [50.0, 40.0, 20.0]
    assert asked.label == "op (last)"


def test_other_methods_settings_and_a_trials_marks_make_no_configuration() -> None:
    """As a run of an earlier version, which logged less, and a trial, which logs `sweep.` as well."""
    plain = record("a", {"method": "ewc", "ewc": {"strength": 100}}, 1.0)
    more = plain.params | {"sweep.ewc.strength": "100.0", "treelora.strength": "0.9", "checkpoint.keep": "9"}
    less = {key: value for key, value in plain.params.items() if not key.startswith(("treelora.", "evaluation."))}
    for params in (more, less):
        assert settings_of(replace(plain, params=params)) == {"method": "ewc", "ewc.strength": "100.0"}


def test_reruns_do_not_count_twice() -> None:
    runs = [record("a", {}, 50.0), record("b", {}, 50.0, tags={RERUN_TAG: "a"})]
    assert [run.run_id for run in best_of(*runs).winner.runs] == ["a"]


def test_warnings() -> None:
    one, two = {"lora": {"rank": 4}}, {"lora": {"rank": 2}}
    alone = best_of(record("a", one, 60.0), record("b", two, 50.0))
    assert [warning.split(":")[0] for warning in alone.warnings] == ["the winner rests on one run"]
    pairs = [record("a", one, 60.0), record("b", one | {"seed": 1}, 60.0), record("c", two, 50.0)]
    assert [w.split(" were")[0] for w in best_of(*pairs).warnings] == ["winner and runner-up"]
    other = [record("c", two, 50.0, tasks=("alpha", "gamma")), record("d", two, 50.0, tasks=("beta", "alpha"))]
    assert any("2 different sets of tasks (of 2, 2)" in warning for warning in best_of(*pairs, *other).warnings)
    # the same tasks in another order are replicates
    orders = [record(str(i), one, 60.0, tasks=tasks) for i, tasks in enumerate(ORDERS)]
    assert best_of(*orders).warnings == ()
    unmeasured = record("z", two | {"seed": 3}, {})
    assert best_of(*pairs, unmeasured).warnings[0] == "1 of 4 finished runs lack op of its own way of inference"


def test_filters() -> None:
    runs = [
        record("a", {"train": {"steps": 4, "learning_rate": 2e-4}}, 60.0, tags={"team": "x"}),
        record("b", {"method": "sequential"}, 70.0),
    ]
    assert best_of(*runs).run.run_id == "b"
    for text in ("method=treelora", "train.learning_rate<1e-3", "train.steps=4.0", "team=x", "tags.team = x"):
        assert best_of(*runs, filters=(text,)).run.run_id == "a", text
    with pytest.raises(DataError, match="filter 'method=ewc': fits none of 2 runs"):
        best_of(*runs, filters=("method=ewc",))


def test_bounds_are_not_ranked_where_there_is_something_else() -> None:
    """`joint` sees all tasks at once: no method to use next."""
    runs = [record("a", {}, 60.0), record("b", {"method": "joint"}, 90.0), record("c", {"method": "frozen"}, 70.0)]
    best = best_of(*runs)
    assert (best.run.run_id, len(best.ranking)) == ("a", 1)
    assert best.warnings[0] == "2 runs of frozen and joint are bounds, and not ranked"
    assert best_of(*runs[1:]).run.run_id == "b"


def test_times_of_other_machines_are_no_replicates() -> None:
    """Two workers: 10 s and 50 %, one worker: 20 s and 70 %."""
    two = record("a", {"cluster": {"workers": 2}}, 50.0)
    one = record("b", {"seed": 1}, 70.0, seconds=20.0)
    assert [config.mean for config in best_of(one, two).ranking] == [60.0]
    assert [config.mean for config in best_of(one, two, metric="seconds").ranking] == [10.0, 20.0]


def test_an_unknown_metric_or_mode_names_what_there_is() -> None:
    runs = [record("a", {}, {"last": 60.0, "routed": 70.0}, bwt=3.0)]
    with pytest.raises(ConfigError, match="no metric 'accuracy'; use one of op, bwt, fwt, seconds, "):
        best_of(*runs, metric="accuracy")
    with pytest.raises(DataError, match="has op/merged; there are op/last, op/routed, bwt/last, seconds, tokens,"):
        best_of(*runs, mode="merged")
    with pytest.raises(DataError, match="has fwt of its own way of inference; there are op/last"):
        best_of(*runs, metric="fwt")


def test_rank_of_many_keeps_everything() -> None:
    runs = [record(f"{r}-{s}", {"lora": {"rank": r}, "seed": s}, 10.0 * r + s) for r in (1, 2, 3) for s in range(4)]
    ranking = rank([(run, run.scores["last"].op or 0) for run in runs], larger=False)
    assert [[run.run_id for run in config.runs] for config in ranking] == [
        [f"{r}-{s}" for s in range(4)] for r in (1, 2, 3)
    ]


def test_parameters_give_the_configuration_back() -> None:
    plain = tiny_config(Path("elsewhere"), treelora={"preset": "paper", "budget_mib": 0.5}).as_dict()
    plain["name"], plain["model"]["system_prompt"] = "12", "[1.5]"  # texts that read as JSON
    plain["stream"]["path"], plain["lora"]["layers"] = None, [0, 2]
    config = parse_config(plain)
    found = config_from_params(record("a", plain, 1.0))
    assert found.digest() == config.digest()
    assert (found.name, found.lora.layers, found.output_dir) == ("12", (0, 2), ExperimentConfig().output_dir)


def test_a_parameter_that_was_cut_is_refused() -> None:
    run = record("a", {"stream": {"order": [f"a task with a long name {i}" for i in range(40)]}}, 1.0)
    with pytest.raises(DataError, match=r"run a: MLflow has only the beginning of stream\.order"):
        config_from_params(run)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def test_from_mlflow_to_yaml_and_back(tmp_path: Path, database: str) -> None:
    """Of three configurations the second wins; its YAML is the same experiment, in this machine's folders."""
    configs = {}
    for rank_, op in ((2, 50.0), (16, 80.0), (4, 60.0)):
        for seed in (0, 1):
            changes = {
                "lora": {"rank": rank_},
                "seed": seed,
                "name": f"r{rank_}-{seed}",
                "tracking": {"uri": "http://x"},
            }
            config = tiny_config(tmp_path / "far", **changes)
            folder = tmp_path / f"{rank_}-{seed}"
            folder.mkdir()
            (folder / "config.yaml").write_text(config.as_yaml())
            params, tags = loggable_params(config.as_dict()), run_tags("treelora", config.stream.order, seed)
            run_id = add_run(database, "exp", config.name, params, tags, final_metrics(op + seed), folder)
            configs[run_id] = config
    add_run(database, "exp", "stopped", {"lora.rank": 64}, {}, final_metrics(99.0), status="KILLED")
    history = History(database)
    best = find_best(history, "exp")
    assert (best.winner.mean, len(best.ranking), best.run.name) == (80.5, 3, "r16-1")

    path = write_best(best, config_of(history, best.run), tmp_path / "best.yaml")
    text = path.read_text()
    found = load_config(path)
    assert found.digest() == configs[best.run.run_id].digest()
    assert (found.name, found.output_dir, found.tracking.uri) == ("best-r16-1", "runs", None)
    assert "ewc" not in text
    assert text.splitlines()[0] == (
        "# The best of experiment exp by op (last), larger is better: 80.50 % [74.15, 86.85] over 2 runs (sd 0.71)."
    )
    assert f"# Run {best.run.run_id} (r16-1, seed 1), ended 2023-11-14." in text
    assert "# Runner-up: 60.50 % [54.15, 66.85] over 2 runs (sd 0.71); run " in text
    write_best(best, found, path)  # its own file is replaced
    assert load_config(path).name == "best-best-r16-1"
    path.write_text("name: mine\n")
    with pytest.raises(ConfigError, match=r"best.yaml: is a file of yours"):
        write_best(best, found, path)
    assert path.read_text() == "name: mine\n"


def test_without_config_yaml_the_parameters_serve(tmp_path: Path, database: str) -> None:
    config = tiny_config(tmp_path)
    add_run(
        database, "bare", "bare", loggable_params(config.as_dict()), run_tags("treelora", ("a",)), final_metrics(5.0)
    )
    history = History(database)
    found = config_of(history, find_best(history, "bare").run)
    assert found.digest() == config.digest()


def test_experiments_without_finished_runs_are_refused(tmp_path: Path, database: str) -> None:
    add_run(database, "going on", "x", {}, {}, {"op/last": 5.0}, status="RUNNING")
    with pytest.raises(DataError, match="'going on' has no finished run"):
        find_best(History(database), "going on")
    with pytest.raises(DataError, match="'nowhere' does not exist"):
        find_best(History(database), "nowhere")


def test_what_is_shown() -> None:
    runs = [record("a", {"lora": {"rank": 16}, "stream": {"train_rows": 9}}, 70.0),
            record("b", {"treelora": {"penalty": "none"}, "stream": {"train_rows": 9}}, 60.0)]  # fmt: skip
    out = io.StringIO()
    show_best(best_of(*runs), Console(file=out, width=120), Path("best-exp.yaml"))
    text = out.getvalue()
    assert "op (last), larger is better: 2 configurations, 2 finished runs of exp" in text
    assert "best: 70.00 % over 1 run\n" in text
    rows = {cells[0]: cells[1:] for line in text.splitlines() if len(cells := line.replace("│", " ").split()) == 4}
    assert rows["lora.rank"] == ["16", "8", "8"]
    assert rows["treelora.penalty"] == ["prox", "none", "prox"]
    assert "stream.train_rows" not in rows
    assert "the winner rests on one run" in text
    assert text.splitlines()[-1] == "treelora run best-exp.yaml"
