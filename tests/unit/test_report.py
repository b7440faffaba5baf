import re
from html.parser import HTMLParser

import pytest

from tests.support.run_dir import SyntheticRun, finished_run
from treelora.errors import DataError
from treelora_platform.report import write_report

VOID = {"meta", "br", "img", "hr", "link", "input"}
HOSTILE = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, attributes, table rows and texts."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.attributes, self.rows, self.text = [], [], [], [], []
        self.cell = None
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell.strip())
            self.cell = None

    def handle_data(self, data):
        self.text.append(data)
        if self.cell is not None:
            self.cell += data


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


def ids(page):
    return [value for _, name, value in page.attributes if name == "id"]


def test_numbers_of_a_finished_run(tmp_path):
    run = finished_run(tmp_path / "run", ["alpha", "beta", "gamma"])
    out = write_report(run.path)
    assert out == run.path / "report.html"
    page = page_of(out)
    text = " ".join(" ".join(page.text).split())
    assert "OP last (%) 80.00 BWT last (points) 10.00" in text
    assert "training time 9.0 s tokens trained on 1,800 tokens per second 200.00 stored 3.2 KiB" in text
    assert ["", "1", "2", "3"] in page.rows
    assert ["1 alpha", "90.0", "80.0", "70.0"] in page.rows
    assert ["3 gamma", "", "", "90.0"] in page.rows
    assert ["OP", "90.00", "85.00", "80.00"] in page.rows
    assert ["lora.rank", "8"] in page.rows
    assert ["versions.commit", "4f70d1d"] in page.rows
    assert ["beta", "family 1", "–", "6", "600", "3.0 s", "2.0 s", "2.0 KiB", "200 B", "90.0"] in page.rows
    # curves, arms, and the trees of two and of three tasks; a tree of one task shows nothing
    assert page.tags.count("svg") == 3 + 1 + 2


def test_the_page_needs_nothing_else(tmp_path):
    run = finished_run(tmp_path / "run", ["alpha", "beta", "gamma"])
    page = page_of(write_report(run.path))
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    fetched = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "data")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in fetched)
    assert not re.findall(r"@import|url\((?!#)", write_report(run.path).read_text())
    assert len(set(ids(page))) == len(ids(page))
    known = set(ids(page))
    targets = re.findall(r'(?:url\(#|href="#)([^")]+)', write_report(run.path).read_text())
    assert targets
    assert set(targets) <= known


def test_hostile_names_stay_text(tmp_path):
    names = [HOSTILE, "$x^2$ & <b>bold</b>", "日本"]
    run = finished_run(tmp_path / "run", names, name=HOSTILE)
    page = page_of(write_report(run.path))
    assert not {"script", "b-old"} & set(page.tags)
    assert [f"1 {HOSTILE}", "90.0", "80.0", "70.0"] in page.rows
    assert "$x^2$ & <b>bold</b>" in "".join(page.text)
    assert f"{HOSTILE} (treelora)" in "".join(page.text)


def test_names_in_figures_are_escaped(tmp_path):
    run = finished_run(tmp_path / "run", ["<i>a", "b&b"])
    page = page_of(write_report(run.path))
    assert "i" not in page.tags
    assert "<i>a" in page.text  # as the text of an SVG element


def test_two_runs_side_by_side(tmp_path):
    treelora = finished_run(tmp_path / "a", ["alpha", "beta"], name="ours", drop=2.0)
    sequential = finished_run(tmp_path / "b", ["alpha", "beta"], name="base", method="sequential", drop=20.0)
    page = page_of(write_report(treelora.path, tmp_path / "both.html", sequential.path))
    assert ["", "ours (treelora)", "base (sequential)"] in page.rows
    assert ["OP last (%)", "89.00", "80.00"] in page.rows
    assert ["BWT last (points)", "1.00", "10.00"] in page.rows
    assert ["1 alpha", "90.0", "88.0"] in page.rows
    assert ["1 alpha", "90.0", "70.0"] in page.rows
    assert ["method", "treelora", "sequential"] in page.rows
    text = (tmp_path / "both.html").read_text()
    assert '<tr class="differs"><th scope="row">method</th>' in text
    assert '<tr><th scope="row">lora.rank</th>' in text
    assert '<b class="best">89.00</b>' in text
    assert '<b class="best">1.00</b>' in text
    assert len(set(ids(page))) == len(ids(page))
    assert not (treelora.path / "report.html").exists()


def test_the_same_name_twice_is_numbered(tmp_path):
    first, second = (finished_run(tmp_path / folder, ["alpha", "beta"]) for folder in "ab")
    page = page_of(write_report(first.path, other=second.path))
    assert ["", "synthetic (treelora) #1", "synthetic (treelora) #2"] in page.rows


def test_a_run_that_has_just_begun(tmp_path):
    run = SyntheticRun(tmp_path / "run", ["alpha"])
    text = write_report(run.path).read_text()
    assert "No task has been scored yet." in text
    assert "No step has been recorded yet." in text
    assert "<svg" not in text


def test_scores_before_training_have_a_column(tmp_path):
    run = SyntheticRun(tmp_path / "run", ["alpha", "beta"], method="frozen")
    run.add_score("last", 0, -1, 20.0)
    run.add_score("last", 1, -1, 40.0)
    page = page_of(write_report(run.path))
    assert ["", "before training"] in page.rows
    assert ["1 alpha", "20.0"] in page.rows
    assert ["OP", "30.00"] in page.rows


def test_secrets_are_hidden(tmp_path):
    run = finished_run(tmp_path / "run", ["alpha", "beta"])
    (run.path / "config.yaml").write_text(
        "method: treelora\n"
        "tracking: {uri: 'http://ada:hunter2@host'}\n"
        "stream: {options: {api_key: hunter2}}\n"
        "evaluation: {max_new_tokens: 64}\n"
    )
    out = write_report(run.path)
    assert "hunter2" not in out.read_text()
    rows = page_of(out).rows
    assert ["tracking.uri", "http://***@host"] in rows
    assert ["evaluation.max_new_tokens", "64"] in rows


def test_many_trees_are_folded_behind_the_last(tmp_path):
    run = finished_run(tmp_path / "run", [f"task {i}" for i in range(11)], steps_per_task=3)
    page = page_of(write_report(run.path))
    assert page.tags.count("details") == 1
    assert page.tags.count("svg") == 3 + 1 + 10


def test_the_time_of_creation_is_a_date(tmp_path):
    run = SyntheticRun(tmp_path / "run", ["alpha"])
    run.write_json("run.json", {"name": "x", "created": 1_700_000_000.5})
    assert ["created", "2023-11-14 22:13:20+00:00"] in page_of(write_report(run.path)).rows


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = finished_run(tmp_path / "run", ["alpha", "beta"])
    assert write_report(run.path, tmp_path / "1").read_bytes() == write_report(run.path, tmp_path / "2").read_bytes()


def test_a_directory_without_a_run_is_refused(tmp_path):
    run = finished_run(tmp_path / "run", ["alpha", "beta"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no run"):
        write_report(run.path, other=tmp_path / "empty")
    (run.path / "tables" / "scores.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"scores\.parquet"):
        write_report(run.path)
