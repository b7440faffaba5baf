import base64
import csv
import hashlib
import io
import re
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from tests.support.experiment_runs import FolderHistory, methods_experiment, metrics_of, params_of, tags_of
from tests.support.run_dir import finished_run
from tests.unit.test_report import Page, ids
from treelora_platform.experiments.analysis import compare_groups
from treelora_platform.experiments.groups import select
from treelora_platform.experiments.report import write_experiment_report
from treelora_platform.experiments.view import shortened
from treelora_platform.tracking import TrackingError

HOSTILE = '<script>alert("x")</script>'


def write(history, out, by=("method",), name="made up", **options):
    comparison = compare_groups(name, select(history.records, by))
    path = write_experiment_report(comparison, history, out, **options)
    return path.read_text(encoding="utf-8")


def drop_run(history, folder, name, method="treelora", seed=0, drop=10.0, tasks=("alpha", "beta", "gamma"), **more):
    run = finished_run(folder / f"{len(history.records)}", tasks, drop=drop, name=name, method=method)
    return history.add(run, params_of(method, seed, **more), tags_of(method, seed, tasks))


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    history = FolderHistory()
    methods_experiment(folder, history, seeds=range(7))
    return write(history, folder / "report.html"), history


def downloads(page):
    """Name to content of every file that a link of the page holds."""
    found, name = {}, None
    for tag, key, value in page.attributes:
        if (tag, key) == ("a", "href"):
            address = value
        if (tag, key) == ("a", "download"):
            name = value
            head, _, data = address.partition(",")
            found[name] = base64.b64decode(data) if head.endswith("base64") else unquote(data).encode()
    return found


def table(page, name):
    return list(csv.reader(io.StringIO(downloads(page)[name].decode())))


def test_numbers_worked_by_hand(tmp_path):
    # three tasks at 90 %: OP is 90 less the drop, BWT the drop itself
    history = FolderHistory()
    for seed in range(2):
        drop_run(history, tmp_path, f"ours {seed}", "treelora", seed, drop=2.0 + seed)
        drop_run(history, tmp_path, f"base {seed}", "sequential", seed, drop=20.0)
    page = Page(write(history, tmp_path / "out.html"))
    assert ["treelora", "last", "2", "87.5 [87.0, 88.0]", "2.5 [2.0, 3.0]"] in [row[:5] for row in page.rows]
    assert ["sequential", "last", "2", "70.0 [70.0, 70.0]", "20.0 [20.0, 20.0]"] in [row[:5] for row in page.rows]
    assert ["treelora", "last", "OP", "2", "+17.5 [17.0, 18.0]"] in [row[:5] for row in page.rows]
    assert ["ours 1", "00000000", "treelora", "finished", "1", "1"] in [row[:6] for row in page.rows]
    (row,) = [row for row in table(page, "runs.csv") if row[0] == "ours 1"]
    assert row[2:5] == ["treelora", "FINISHED", "1"]
    assert [float(value) for value in row[6:]] == pytest.approx([87.0, 89.7, 3.0, 0.3, 9.0])
    assert "2 groups by method, learning 3 tasks" in " ".join(page.text)


def test_every_section_is_there_and_every_link_has_a_target(methods):
    page = Page(methods[0])
    known = ids(page)
    assert len(set(known)) == len(known)
    inner = [value[1:] for tag, key, value in page.attributes if (tag, key) == ("a", "href") and value[0] == "#"]
    sections = ["standings", "differences", "stream", "matrices", "cost", "search", "inside", "runs", "making"]
    assert set(sections) <= set(inner)
    assert set(inner) <= set(known)
    assert "group-2" in inner
    assert "inside-0" in inner
    targets = re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', methods[0])
    assert set(targets) <= set(known)


def test_every_figure_and_table_can_be_taken_away(methods):
    page = Page(methods[0])
    files = downloads(page)
    figures = [name for name in files if name.endswith(".svg")]
    # by way of inference: standings, differences, stream, matrices, cost; then the search, four trees, arms, penalty
    assert len(figures) == page.tags.count("figure") == 2 * 5 + 2 + 4 + 2 + 1
    for name in figures:
        assert ElementTree.fromstring(files[name]).tag == "{http://www.w3.org/2000/svg}svg"
    tables = [name for name in files if name.endswith(".csv")]
    assert len(tables) == page.tags.count("table") == 6
    assert len(table(page, "runs.csv")) == 1 + 21
    assert table(page, "settings.csv")[1:] == [
        ["lora.rank", "8"],
        ["model.name", "tiny"],
        ["train.learning_rate", "0.001"],
    ]
    assert ["method", "ewc", "7"] in table(page, "parameters.csv")


def test_the_page_fetches_nothing_and_only_its_own_script_may_run(methods):
    text = methods[0]
    page = Page(text)
    assert not {"link", "iframe", "object", "embed", "img", "form"} & set(page.tags)
    outside = [value for _, key, value in page.attributes if key in ("src", "href", "xlink:href", "action", "data")]
    assert all(value.startswith(("#", "data:")) for value in outside)
    assert not re.findall(r"@import|url\((?!#)", text)
    policy = next(value for tag, key, value in page.attributes if tag == "meta" and value.startswith("default-src"))
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]


def test_what_was_found_is_said_first(methods):
    text = " ".join(" ".join(Page(methods[0]).text).replace("\u00a0", " ").split())
    assert "Inference last: treelora has the highest mean OP" in text
    assert "Beyond chance in OP against sequential: treelora +" in text
    assert "Not beyond chance in OP against sequential: ewc " in text
    assert "explains R2 = 0.9" in text
    assert text.index("Inference last") < text.index("Standings")


def test_the_same_runs_give_the_same_bytes(tmp_path):
    history = FolderHistory()
    for seed in range(2):
        drop_run(history, tmp_path, f"run {seed}", seed=seed)
    assert write(history, tmp_path / "1.html") == write(history, tmp_path / "2.html")


def test_hostile_texts_stay_texts(tmp_path):
    history = FolderHistory()
    tasks = (HOSTILE, "a & b", "$x^2$")
    for seed in range(2):
        drop_run(history, tmp_path, HOSTILE, "treelora", seed, tasks=tasks, note=f'"{HOSTILE}', stream__name="=cmd|x")
        drop_run(history, tmp_path, "=1+1", HOSTILE, seed, tasks=tasks, note="</script>", stream__name="=cmd|x")
    text = write(history, tmp_path / "out.html", name=HOSTILE, filters=[HOSTILE])
    page = Page(text)
    assert page.tags.count("script") == text.count("<script>") == 1
    assert HOSTILE in "".join(page.text)
    assert [HOSTILE, "last", "2"] in [row[:3] for row in page.rows]
    assert "'=1+1" in [row[0] for row in table(page, "runs.csv")]
    assert ["stream.name", "'=cmd|x"] in table(page, "settings.csv")


def test_secrets_are_hidden(tmp_path):
    history = FolderHistory()
    drop_run(history, tmp_path, "one", model__api_key="hunter2", stream__path="http://ada:hunter2@host/x")
    text = write(history, tmp_path / "out.html")
    assert "hunter2" not in unquote(text)
    assert ["stream.path", "http://***@host/x"] in Page(text).rows


def test_one_run(tmp_path):
    history = FolderHistory()
    drop_run(history, tmp_path, "alone")
    text = write(history, tmp_path / "out.html")
    page = Page(text)
    assert "no other group competes with it" in text
    assert not {"differences", "search"} & set(ids(page))
    assert {"standings", "stream", "matrices", "cost", "inside", "runs"} <= set(ids(page))
    assert ["alone", "00000000", "treelora", "finished"] in [row[:4] for row in page.rows]


def test_no_tree_and_no_artifacts(tmp_path):
    history = FolderHistory()
    for seed in range(2):
        for method, op in (("ewc", 60.0), ("sequential", 50.0)):
            metrics = {"final/op/last": [(3, op)]}
            history.add(None, params_of(method, seed), tags_of(method, seed), name=f"{method} {seed}", metrics=metrics)
    page = Page(write(history, tmp_path / "out.html"))
    assert not {"stream", "matrices", "cost", "inside"} & set(ids(page))
    assert {"standings", "differences", "search", "runs"} <= set(ids(page))
    assert "Importance is not shown: 4 scored runs are too few for 2 parameters; it takes 20." in page.text


def test_artifacts_that_can_not_be_fetched_are_said_to_be_missing(tmp_path):
    history = FolderHistory()
    for seed in range(2):
        drop_run(history, tmp_path, f"run {seed}", seed=seed)
    history.broken = {record.run_id for record in history.records}
    text = write(history, tmp_path / "out.html")
    page = Page(text)
    assert not {"matrices", "inside"} & set(ids(page))
    assert "stream" in ids(page)
    assert "Not shown: run 0: MLflow at http://nowhere: connection refused" in page.text


def test_a_server_that_goes_away_is_no_reason_to_fail(tmp_path):
    history = FolderHistory()
    for seed in range(9):
        drop_run(history, tmp_path, f"run {seed}", seed=seed)

    def refuse(*_):
        raise TrackingError("MLflow at http://nowhere: connection refused")

    comparison = compare_groups("made up", select(history.records, ["method"]))
    history.curve = history.download = history.runs = refuse
    page = Page(write_experiment_report(comparison, history, tmp_path / "out.html").read_text())
    assert [text for text in page.text if text.startswith("Not shown: ")] == [
        *(f"Not shown: run {i}: MLflow at http://nowhere: connection refused" for i in range(3)),
        "Not shown: 3 runs in a row could not be read, so no more were asked for",
        "Not shown: the runs that are not compared could not be listed (MLflow at http://nowhere: connection refused)",
    ]
    assert {"standings", "cost", "runs"} <= set(ids(page))


def test_runs_that_are_not_compared_are_listed_with_their_state(tmp_path):
    history = FolderHistory()
    drop_run(history, tmp_path, "good")
    history.add(None, params_of("treelora", 5), tags_of("treelora", 5), name="broken", status="FAILED")
    page = Page(write(history, tmp_path / "out.html"))
    assert ["good", "00000000", "treelora", "finished", "0", "1"] in [row[:6] for row in page.rows]
    (row,) = [row for row in page.rows if row[0] == "broken"]
    assert row[2:5] == ["not compared", "failed", "5"]
    assert set(row[6:]) == {"–"}


def test_only_so_much_is_fetched_however_many_runs_there_are(tmp_path):
    history = FolderHistory()
    run = finished_run(tmp_path / "run")
    metrics = metrics_of(run)
    for rank in range(1, 13):
        for seed in range(15):
            # the higher the rank, the better
            own = metrics | {f"final/op/{mode}": [(3, 50.0 + rank)] for mode in ("last", "routed")}
            tags = tags_of("treelora", seed, run.names)
            record = history.add(None, params_of("treelora", seed, lora__rank=rank), tags, metrics=own)
            history.folders[record.run_id] = run.path
    page = Page(write(history, tmp_path / "out.html", by=["lora.rank"]))
    curves = [key for _, key in history.asked if key.startswith(("op/", "bwt/"))]
    assert len(curves) == 8 * 12 * 2 * 2  # groups, runs, scores, ways of inference
    assert [key for _, key in history.asked].count("tables/scores.parquet") == 6 * 6
    assert [key for _, key in history.asked].count("tree") == 3
    text = " ".join(page.text)
    assert "rank=12 12 of 15" in text
    assert "4 groups with lower scores are left out" in text
    assert "The 3 best of 12 groups are shown." in text
    assert len([value for value in ids(page) if value.startswith("run-")]) == 180
    assert [row[2] for row in table(page, "runs.csv")[1:]] == [
        f"rank={rank}" for rank in range(1, 13) for _ in range(15)
    ]


def test_runs_on_other_tasks_are_beside_each_other(tmp_path):
    history = FolderHistory()
    for seed in range(2):
        drop_run(history, tmp_path, f"three {seed}", seed=seed)
        drop_run(history, tmp_path, f"base {seed}", "sequential", seed=seed)
    drop_run(history, tmp_path, "two", tasks=("alpha", "beta"))
    page = Page(write(history, tmp_path / "out.html"))
    assert "common" in ids(page)
    # after the last task: 70 and 80 of three tasks, 80 and 90 of two
    assert ["treelora", "last", "3", "2", "75.0 [75.0, 75.0]"] in page.rows
    assert ["treelora", "last", "2", "1", "85.0"] in page.rows


def test_groups_are_called_by_the_last_names_of_their_fields(tmp_path):
    history = FolderHistory()
    for rank in (4, 8):
        drop_run(history, tmp_path, f"rank {rank}", lora__rank=rank, treelora__depth=3)
    by = ["method", "lora.rank", "treelora.depth"]
    page = Page(write(history, tmp_path / "out.html", by=by))
    assert ["treelora, rank=4, depth=3", "last", "1"] in [row[:3] for row in page.rows]
    assert "2 groups by method, lora.rank, treelora.depth" in " ".join(page.text)


def test_names_that_would_not_tell_groups_apart_stay_long():
    history = FolderHistory()
    for depth in (1, 2):
        for seed in range(2):
            params = params_of("treelora", seed, treelora__depth=depth, lora__depth=1)
            history.add(None, params, tags_of("treelora", seed), metrics={"final/op/last": [(1, 50.0)]})
    comparison = compare_groups("made up", select(history.records, ["treelora.depth", "lora.depth"]))
    assert shortened(comparison) == comparison
    short = shortened(compare_groups("made up", select(history.records, ["treelora.depth"])))
    assert [group.label for group in short.groups] == ["depth=1", "depth=2"]
    assert (short.reference, short.differences[0].group) == ("depth=1", "depth=2")
