"""What is said of a study's rows, against numbers worked out by hand."""

import csv
import dataclasses
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from tests.support.study_runs import STUDY, fake_run
from treelora.simulation.statistics import Interval
from treelora_platform.sheets import Sheet, markdown, records_table, render, show_interval, write_sheets
from treelora_platform.statistics import mean_interval, paired
from treelora_platform.studies.analysis import (
    ablation,
    against_champion,
    differences,
    standings,
)
from treelora_platform.studies.figures import group_of, study_figures
from treelora_platform.studies.finished import Finished, Scores
from treelora_platform.studies.quality import champion_quality, cost_to_reach, equal_quality
from treelora_platform.studies.rows import Row, at_equal_steps, collect, rows_table
from treelora_platform.studies.rows import rows_of as finished_rows
from treelora_platform.studies.run import Log, run_jobs
from treelora_platform.studies.spec import Bench, Study
from treelora_platform.studies.tables import ablation_sheet, differences_sheet, quality_sheet, standings_sheet

PLAIN = yaml.safe_load(STUDY)
PAIRS = ((1, 0), (2, 0), (1, 1), (2, 1))


@pytest.fixture
def study():
    return Study.model_validate(PLAIN)


def row(variant, op, pair=(1, 0), *, mode="last", steps=8, seconds=10.0, passes=16, bwt=1.0):
    matrix = ((op + 2 * (bwt or 0.0), op), (None, op))
    return Row(
        variant=variant, method="m", mode=mode, order=pair[0], seed=pair[1], steps=steps, op=op, bwt=bwt, fwt=None,
        seconds=seconds, passes=passes, passes_per_step=1.0, tokens=100, stored_bytes=2048, router_accuracy=None,
        settings="{}", run=f"{variant}-{pair}", commit="4f70d1d", tasks=("a", "b"), matrix=matrix,
    )  # fmt: skip


def rows_of(variant, ops, **options):
    return [row(variant, op, pair, **options) for op, pair in zip(ops, PAIRS, strict=False)]


def test_rows_of_finished_runs(study, tmp_path):
    bench = Bench(study, tmp_path / "runs", ("cluster.workers=1", "train.accumulation=2"))
    jobs = bench.compared(study.variants, {"treelora": {"train.learning_rate": 0.004}})
    with open(tmp_path / "log.txt", "w") as file:
        run_jobs(jobs[:5], Log(tmp_path / "log.jsonl"), Console(file=file), fake_run(lambda config: 80))
    rows = collect(study, jobs)
    # bounds are shown in their own way of inference only; runs that are missing give no rows
    assert [(r.variant, r.mode) for r in rows] == [
        ("treelora", "last"), ("treelora", "routed"), ("routed", "last"), ("routed", "routed"), ("sequential", "last"),
        ("sequential", "routed"), ("joint", "last"), ("frozen", "last"),
    ]  # fmt: skip
    first = rows[0]
    assert (first.op, first.bwt, first.fwt) == (75.0, 5.0, None)
    assert (first.steps, first.tokens, first.commit) == (8, 1600, "4f70d1d")
    # 0.5 s a step; 8 passes for 8 steps of two micro-batches
    assert (first.seconds, first.passes, first.passes_per_step) == (8.0, 16, 0.5)
    assert first.settings == '{"train.learning_rate": 0.004}'
    assert first.matrix == ((80.0, 70.0), (None, 80.0))
    assert first.router_accuracy == 90.0
    frozen = rows[-1]
    assert (frozen.op, frozen.bwt, frozen.passes_per_step, frozen.tokens) == (80.0, None, None, 0)


def test_ways_of_inference_that_were_not_scored_at_the_end_give_no_rows(study, tmp_path):
    job = Bench(study, tmp_path / "runs", ()).compared(["treelora"], {})[0]
    modes = {
        "merged": Scores(60.0, 10.0, None, ((60.0, 50.0), (None, 70.0))),
        "last": Scores(30.0, None, None, ((None, None), (45.0, None))),  # the second task before it was learnt, for FWT
    }
    run = Finished("run", "", "", "4f70d1d", {}, 8, 10.0, 16, 1.0, 100, 2048, None, modes)
    assert [(row.mode, row.op) for row in finished_rows(job, run)] == [("merged", 60.0)]
    untrained = dataclasses.replace(run, modes={"last": Scores(30.0, None, None, ((None, None), (None, None)))})
    assert [(row.mode, row.op) for row in finished_rows(job, untrained)] == [("last", 30.0)]


def test_standings_are_means_with_intervals(study):
    ops = [70.0, 60.0, 65.0, 61.0]
    rows = rows_of("treelora", ops) + rows_of("routed", ops, mode="routed") + [row("joint", 90.0, bwt=None)]
    found = {one.variant: one for one in standings(study, rows)}
    assert found["treelora"].op == mean_interval(ops)
    assert (found["treelora"].op.value, found["treelora"].runs) == (64.0, 4)
    assert {name: (one.own, one.given) for name, one in found.items()} == {
        "treelora": (True, ""),
        "routed": (True, "router"),
        "joint": (True, "all rows at once"),
    }
    assert (found["joint"].bwt, found["treelora"].fwt) == (None, None)
    assert math.isnan(found["joint"].op.low)


def test_what_a_variant_is_given_is_told(study):
    variants = {"er": {"method": "future", "replay": True}}
    variants["fix"] = {"method": "frozen", "set": {"evaluation.in_context_examples": 2}}
    study = Study.model_validate(PLAIN | {"variants": PLAIN["variants"] | variants})
    rows = [row("er", 1.0, mode="routed"), row("fix", 1.0, mode="routed")]
    assert [one.given for one in standings(study, rows)] == ["past rows, router", "router, the task"]
    assert [group_of(study, name) for name in ("er", "fix", "treelora", "sequential", "joint")] == [
        "sees past rows", "bound", "TreeLoRA", "replay-free peer", "bound",
    ]  # fmt: skip


def test_differences_are_paired_and_corrected_within_mode_and_score(study):
    base = [70.0, 60.0, 65.0, 61.0]
    rows = rows_of("treelora", base) + rows_of("sequential", [71.0, 62.0, 66.0, 63.0], bwt=3.0)
    # routed has three of the four pairs, the third one in another place; joint is a bound and no rival
    rows += [row("routed", op, pair) for op, pair in ((60.0, (2, 1)), (69.0, (1, 0)), (64.0, (1, 1)))]
    rows += rows_of("joint", [90.0, 90.0, 90.0, 90.0], bwt=None)
    found = {(one.variant, one.metric): one for one in differences(study, rows)}
    assert list(found) == [("routed", "op"), ("sequential", "op"), ("routed", "bwt"), ("sequential", "bwt")]
    sequential, routed = found["sequential", "op"], found["routed", "op"]
    assert sequential.found == paired([1.0, 1.0, 2.0, 2.0])
    assert routed.found == paired([-1.0, -1.0, -1.0])
    # p: 2/16 and 2/8; Holm over two: 0.25 and max(0.25, 0.25)
    assert (sequential.found.p, routed.found.p) == (0.125, 0.25)
    assert (sequential.corrected_p, routed.corrected_p, sequential.family) == (0.25, 0.25, 2)
    assert found["sequential", "bwt"].found.bootstrap == Interval(2.0, 2.0, 2.0)
    text = "\n".join(differences_sheet(study, list(found.values())).notes)
    assert "with n = 4 pairs the smallest attainable p is 2/2^4 = 0.125, after Holm over 2 comparisons 0.25" in text
    assert "it takes 7 pairs at least" in text  # 2 x 2/2^7 = 0.031, 2 x 2/2^6 = 0.0625


def test_other_ways_of_inference_are_other_comparisons(study):
    rows = rows_of("treelora", [50.0]) + rows_of("sequential", [60.0], mode="routed")
    assert differences(study, rows) == []


def test_the_champion_meets_each_in_its_own_way_of_inference():
    more = {
        "plus": {"method": "treelora", "tuned_as": "treelora", "mode": "routed"},
        "hidelora": {"method": "hidelora", "mode": "routed"},
    }
    study = Study.model_validate(PLAIN | {"variants": PLAIN["variants"] | more, "champion": "plus"})
    rows = rows_of("treelora", [50.0, 52.0, 54.0, 56.0]) + rows_of("plus", [70.0, 72.0, 74.0, 76.0], mode="routed")
    rows += rows_of("sequential", [60.0, 61.0, 62.0, 63.0], bwt=9.0) + rows_of("sequential", [99.0] * 4, mode="routed")
    rows += rows_of("hidelora", [71.0, 71.0, 75.0, 75.0], mode="routed") + rows_of("hidelora", [1.0] * 4)
    rows += rows_of("joint", [90.0] * 4, bwt=None)
    found = {(one.variant, one.metric): one for one in against_champion(study, rows)}
    # neither bounds nor other rows of its own method
    assert list(found) == [("sequential", "op"), ("hidelora", "op"), ("sequential", "bwt"), ("hidelora", "bwt")]
    assert found["sequential", "op"].found == paired([-10.0, -11.0, -12.0, -13.0])
    assert found["hidelora", "op"].found == paired([1.0, -1.0, 1.0, -1.0])
    assert found["sequential", "bwt"].found.bootstrap == Interval(8.0, 8.0, 8.0)
    assert [one.mode for one in found.values()] == ["last", "routed", "last", "routed"]
    sheet = differences_sheet(study, list(found.values()), champion=True)
    assert (sheet.title, sheet.notes[0].split(",")[0]) == ("small: differences from plus", "variant less plus")
    # the champion's runs are the reference's: no rival of it, and shown in one way of inference only
    assert study.twin_of_reference("plus")
    assert ("plus", "routed") not in {(one.variant, one.mode) for one in differences(study, rows)}


def test_the_twin_of_the_reference_is_run_once_and_shown_in_its_own_way(tmp_path):
    more = {"plus": {"method": "treelora", "tuned_as": "treelora", "mode": "routed"}}
    study = Study.model_validate(PLAIN | {"variants": {**PLAIN["variants"], **more}, "champion": "plus"})
    jobs, seen = Bench(study, tmp_path / "runs").compared(["treelora", "plus"], {}), []
    with open(tmp_path / "log.txt", "w") as file:
        run_jobs(jobs, Log(tmp_path / "log.jsonl"), Console(file=file), fake_run(lambda config: 80, seen))
    assert (len(jobs), len(seen)) == (8, 4)
    found = [(row.variant, row.mode) for row in collect(study, jobs[:2])]
    assert found == [("treelora", "last"), ("treelora", "routed"), ("plus", "routed")]


def test_the_ablation_holds_each_row_against_the_first(study):
    rows = rows_of("treelora", [70.0, 66.0]) + rows_of("sequential", [60.0, 62.0])
    first, second = ablation(study, rows)
    assert (first.label, first.op.value, first.change) == ("neither", 61.0, None)
    assert (second.label, second.variant, second.op.value) == ("both", "treelora", 68.0)
    assert second.change == paired([10.0, 4.0])
    assert ablation_sheet(study, [first, second]).cells[1][:4] == ("both", "treelora", "last", "68.0 [66.0, 70.0]")
    assert ablation(study, []) == []


def test_the_ablation_has_a_first_row_in_every_way_of_inference(study):
    rows = rows_of("treelora", [70.0, 66.0]) + rows_of("sequential", [60.0, 62.0])
    rows += rows_of("treelora", [80.0, 81.0], mode="routed") + rows_of("sequential", [79.0, 83.0], mode="routed")
    rows += rows_of("treelora", [50.0], mode="merged")
    found = ablation(study, rows)
    # merged: only one of the two was scored so, and is held against nothing
    assert [(one.mode, one.label) for one in found] == [
        *(("last", "neither"), ("last", "both")),
        *(("routed", "neither"), ("routed", "both")),
        ("merged", "both"),
    ]
    assert [one.change for one in found] == [None, paired([10.0, 4.0]), None, paired([1.0, -2.0]), None]
    assert ablation_sheet(study, found).cells[2] == ()


def test_the_cost_of_a_score_by_hand():
    costs, scores = [10.0, 20.0, 40.0], [50.0, 60.0, 62.0]
    assert cost_to_reach(costs, scores, 55.0) == (15.0, False)
    assert cost_to_reach(costs, scores, 61.0) == (30.0, False)
    assert cost_to_reach(costs, scores, 60.0) == (20.0, False)
    assert cost_to_reach(costs, scores, 62.0) == (40.0, False)
    assert cost_to_reach(costs, scores, 62.1) == (None, False)
    assert cost_to_reach(costs, scores, 50.0) == (10.0, True)
    # a dip after the first time doesn't count, nor one before it
    assert cost_to_reach(costs, [50.0, 70.0, 40.0], 60.0) == (15.0, False)
    assert cost_to_reach(costs, [50.0, 40.0, 60.0], 50.1) == (pytest.approx(20 + 20 * 10.1 / 20), False)


def test_equal_quality_is_held_against_the_best_replay_free_peer(study):
    # treelora: 40 s and 50 % with 4 steps, 80 s and 70 % with 8; sequential, the peer: 60 s, 40 % and 100 s, 60 %
    rows = rows_of("treelora", [50.0, 50.0], steps=4, seconds=40.0, passes=4)
    rows += rows_of("treelora", [70.0, 70.0], seconds=80.0, passes=8)
    rows += rows_of("sequential", [40.0, 40.0], steps=4, seconds=60.0, passes=4)
    rows += rows_of("sequential", [60.0, 60.0], seconds=100.0, passes=8)
    rows += rows_of("routed", [99.0, 99.0]) + rows_of("joint", [99.0, 99.0])
    full = [r for r in rows if r.steps == 8]
    ours, theirs = equal_quality(study, rows, full)
    assert (ours.variant, ours.peer, ours.target, ours.pairs) == ("treelora", "sequential", 60.0, 2)
    assert (ours.cost, ours.peer_cost, ours.ratio, ours.reached) == (60.0, 100.0, Interval(*[100 / 60] * 3), 1.0)
    assert (theirs.variant, theirs.cost, theirs.ratio.value) == ("sequential", 100.0, 1.0)
    by_passes, _ = equal_quality(study, rows, full, "passes")
    assert (by_passes.cost, by_passes.ratio.value) == (6.0, pytest.approx(8 / 6))


def test_a_quality_that_is_not_reached_is_said_so(study):
    rows = rows_of("treelora", [50.0, 58.0], steps=4, seconds=40.0) + rows_of("treelora", [52.0, 60.0], seconds=80.0)
    rows += rows_of("sequential", [40.0, 40.0], steps=4, seconds=60.0) + rows_of("sequential", [57.0, 59.0])
    found = equal_quality(study, rows, [r for r in rows if r.steps == 8])[0]
    assert (found.target, found.cost, found.ratio.value) == (58.0, None, 0.0)
    # only the resample of the second pair alone, a quarter of all, reaches its 59
    assert found.reached == pytest.approx(0.25, abs=0.03)
    assert quality_sheet(study, [found]).cells[0][5:8] == ("not reached", "10", "–")


def test_the_fewest_steps_may_be_enough(study):
    rows = rows_of("treelora", [70.0], steps=4, seconds=40.0) + rows_of("treelora", [72.0], seconds=80.0)
    rows += rows_of("sequential", [60.0], seconds=100.0)
    found = equal_quality(study, rows, [r for r in rows if r.steps == 8])[0]
    assert (found.cost, found.at_most, found.ratio.value) == (40.0, True, 2.5)
    assert quality_sheet(study, [found]).cells[0][5:8] == ("≤ 40", "100", "2.50")


def test_pairs_that_lack_a_number_of_steps_are_left_out(study):
    rows = rows_of("treelora", [50.0, 50.0], steps=4, seconds=40.0) + rows_of("treelora", [70.0, 70.0, 9.0])
    rows += rows_of("sequential", [60.0, 60.0, 60.0])
    assert equal_quality(study, rows, [r for r in rows if r.steps == 8])[0].pairs == 2


def test_the_champion_is_held_against_the_best_peer_of_each_way_of_inference(study):
    # routed, the champion: 70 % after 40 s, 90 % after 80 s; sequential's newest adapter: 80 % after 100 s
    champion = Study.model_validate(PLAIN | {"champion": "routed"})
    rows = rows_of("routed", [70.0, 70.0], mode="routed", steps=4, seconds=40.0)
    rows += rows_of("routed", [90.0, 90.0], mode="routed", seconds=80.0)
    rows += rows_of("sequential", [80.0, 80.0], seconds=100.0) + rows_of("sequential", [99.0, 99.0], mode="routed")
    rows += rows_of("treelora", [99.0, 99.0], seconds=1.0)
    full = [r for r in rows if r.steps == 8]
    # no peer of this study is meant for the router, so there is one comparison
    (found,) = champion_quality(champion, rows, full)
    assert (found.variant, found.mode, found.peer, found.peer_mode) == ("routed", "routed", "sequential", "last")
    assert (found.target, found.cost, found.peer_cost, found.ratio.value) == (80.0, 60.0, 100.0, 100 / 60)
    assert quality_sheet(champion, [found]).cells[0][:5] == ("routed", "routed", "seconds", "sequential (last)", "80.0")
    with_peer = {"variants": PLAIN["variants"] | {"ewc": {"method": "ewc", "mode": "routed"}}}
    both = Study.model_validate(PLAIN | with_peer | {"champion": "routed"})
    rows += rows_of("ewc", [90.0, 90.0], mode="routed", seconds=160.0)
    ways = champion_quality(both, rows, [r for r in rows if r.steps == 8])
    assert [(one.peer, one.peer_mode, one.cost) for one in ways] == [
        ("sequential", "last", 60.0),
        ("ewc", "routed", 80.0),
    ]
    assert champion_quality(study, rows, full) == []
    assert champion_quality(champion, rows_of("routed", [90.0], mode="routed"), full[:1]) == []


def test_no_peer_no_equal_quality(study):
    rows = rows_of("treelora", [50.0])
    assert equal_quality(study, rows, rows) == []


def test_rows_of_other_steps_are_no_part_of_the_comparison(study, tmp_path):
    jobs = Bench(study, tmp_path).compared(["sequential"], {})
    rows = [dataclasses.replace(row("sequential", 1.0), run=job.config.name) for job in jobs] + [row("sequential", 2.0)]
    assert at_equal_steps(rows, jobs) == rows[:4]


def test_tables_are_written_as_parquet_csv_and_markdown(study, tmp_path):
    rows = rows_of("treelora", [70.0, 60.0]) + rows_of("sequential", [71.0, 62.0])
    sheets = [standings_sheet(study, standings(study, rows)), differences_sheet(study, differences(study, rows))]
    paths = write_sheets(tmp_path, sheets)
    assert [path.name for path in paths] == [
        "standings.parquet", "standings.csv", "differences.parquet", "differences.csv",
    ]  # fmt: skip
    first = pq.read_table(paths[0]).to_pylist()[0]
    assert (first["variant"], first["op"], first["op_low"], first["fwt"]) == ("treelora", 65.0, 60.0, None)
    with paths[3].open() as file:
        [line, _] = csv.DictReader(file)
    assert (line["variant"], float(line["found_bootstrap"]), float(line["found_p"])) == ("sequential", 1.5, 0.5)
    page = markdown(sheets, "A study", ["Not complete."])
    assert page.startswith("# A study\n\n- Not complete.\n\n## small: all variants at equal steps\n\n| variant |")
    assert "| sequential | last | OP | 2 | +1.5 [1.0, 2.0] |" in page
    assert pq.read_table(paths[0])["op"].to_pylist() == [65.0, 66.5]
    assert rows_table(rows)["matrix"].to_pylist()[0] == [[72.0, 70.0], [None, 70.0]]


def test_records_without_a_part_have_its_columns_empty(study):
    rows = rows_of("treelora", [70.0, 66.0]) + rows_of("sequential", [60.0, 62.0])
    table = records_table(ablation_sheet(study, ablation(study, rows)))
    assert table["change_p"].to_pylist() == [None, 0.5]
    assert "change" not in table.column_names


def test_a_sheet_on_the_terminal_and_texts_that_look_like_markup(capsys):
    sheet = Sheet("s", "title", ("a", "b"), (("x|y", "[red]1"), (), ("z", "2")), [], ("note",))
    Console(width=60).print(render(sheet))
    text = capsys.readouterr().out
    assert "[red]1" in text
    assert "note" in text
    assert "| x\\|y | [red]1 |" in markdown([sheet], "h")


def test_intervals_as_texts():
    assert show_interval(Interval(1.25, -0.5, 3.0)) == "1.2 [-0.5, 3.0]"
    assert show_interval(Interval(1.25, 0.5, 3.0), 2, sign=True) == "+1.25 [0.50, 3.00]"
    assert show_interval(Interval(1.25, math.nan, math.nan)) == "1.2"
    assert show_interval(None) == "–"


def test_figures_are_drawn_for_what_there_is(study):
    rows = [r for name in ("treelora", "sequential") for r in rows_of(name, [50.0, 52.0], steps=4, seconds=5.0)]
    full = [r for name in ("treelora", "sequential") for r in rows_of(name, [60.0, 64.0])]
    full += [dataclasses.replace(row("joint", 70.0, bwt=None), matrix=((None, 70.0), (None, 70.0)))]
    full += [dataclasses.replace(row("frozen", 40.0, seconds=0.0, bwt=None), matrix=((None,) * 2,) * 2)]
    figures = dict(study_figures(study, rows + full, full, "last"))
    assert list(figures) == ["cost", "bwt", "stream", "matrices-order1", "matrices-order2"]
    [cost] = figures["cost"].axes
    assert {text.get_text() for text in cost.texts} == {"treelora", "sequential", "joint", "frozen, not trained"}
    # a dashed line joins the runs with fewer steps: (5 s, 51 %) to (10 s, 62 %)
    joined = [line.get_xydata().tolist() for line in cost.lines if len(line.get_xdata()) == 2]
    assert [[5.0, 51.0], [10.0, 62.0]] in joined
    bars = figures["bwt"].axes[0].patches
    assert [bar.get_width() for bar in bars] == [1.0, 1.0]
    panels = figures["stream"].axes
    assert [axes.get_title(loc="left") for axes in panels] == ["treelora", "sequential"]
    # OP after task 1 is 62 and 66, after task 2 it is 60 and 64
    assert panels[0].lines[-1].get_ydata().tolist() == [64.0, 62.0]
    images = [axes.images[0].get_array() for axes in figures["matrices-order1"].axes if axes.images]
    assert [image.shape for image in images][:3] == [(2, 2)] * 3
    assert np.ma.filled(images[0], -1).tolist() == [[62.0, 60.0], [-1.0, 60.0]]
    assert dict(study_figures(study, full, full, "routed")) == {}
