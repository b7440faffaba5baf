"""The report of an experiment in a real browser: made-up runs in a real MLflow store, Chromium without a window."""

import csv
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.support.browser import browser
from tests.support.experiment_runs import FolderHistory, methods_experiment
from tests.support.mlflow_runs import add_run
from tests.support.waiting import wait_for
from treelora_platform.experiments.analysis import compare_groups
from treelora_platform.experiments.groups import select
from treelora_platform.experiments.report import write_experiment_report
from treelora_platform.tracking_query import History

READABLE = 4.5  # https://www.w3.org/TR/WCAG21/#contrast-minimum
CHARTS = 2 * 5 + 1 + 4 + 2 + 1  # two ways of inference; parallel coordinates; trees; arms; penalty
TABLES = 6
ON_CELLS = ("rgb(0, 0, 0)", "rgb(255, 255, 255)")  # inks of numbers on coloured cells, and of nothing else
CELLS = 3 * 15 * 2  # groups, cells of five tasks, ways of inference


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Twelve runs, three methods by four seeds, through MLflow to a page."""
    folder = tmp_path_factory.mktemp("experiment")
    made = FolderHistory()
    methods_experiment(folder, made)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    for record in made.records:
        run_folder = made.folders[record.run_id]
        add_run(uri, "three methods", record.name, record.params, record.tags, made.metrics[record.run_id], run_folder)
    history = History(uri)
    comparison = compare_groups("three methods", select(history.runs("three methods"), ["method"]))
    return write_experiment_report(comparison, history, folder / "report.html")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def opened(chromium, page):
    chromium.complaints(), chromium.requested()  # those of another page
    chromium.open(page)
    return chromium


def test_the_page_is_whole_and_asks_for_nothing(opened, page):
    assert opened.complaints() == []
    assert [url for url in opened.requested() if not url.startswith("data:")] == [page.as_uri()]
    assert len(opened.all("figure svg[role=img]")) == CHARTS
    assert len(opened.all("table")) == TABLES
    assert all(opened.run("return [...document.querySelectorAll('figure svg')].map(e => e.getBBox().width > 100)"))
    lead = opened.all(".finding .main")[0].text
    assert lead.startswith("Inference last: treelora has the highest mean OP, ")


def test_every_link_in_the_page_has_a_target(opened):
    missing = opened.run(
        "return [...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.getAttribute('href').slice(1))"
        ".filter(id => !document.getElementById(id))"
    )
    assert missing == []
    opened.all('nav a[href="#runs"]')[0].click()
    assert opened.run("return location.hash") == "#runs"
    assert abs(opened.run("return document.getElementById('runs').getBoundingClientRect().top")) < 100


def test_downloads_arrive(opened):
    folder = opened.folder / "downloads"
    links = opened.run("return [...document.querySelectorAll('a[download]')].map(a => a.download)")
    assert len(links) == len(set(links)) == CHARTS + TABLES
    for name in ("standings-0.svg", "runs.csv"):
        opened.run("document.querySelector(`a[download='${arguments[0]}']`).click()", name)
        wait_for((folder / name).exists, 60, name)
    assert ElementTree.parse(folder / "standings-0.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    with (folder / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {row["group"] for row in rows} == {"treelora", "ewc", "sequential"}
    assert all(40 < float(row["OP last"]) < 90 for row in rows)


def column(opened, index):
    rows = "[...document.querySelectorAll('table.sortable tbody tr:not([hidden])')]"
    return opened.run(f"return {rows}.map(row => row.cells[arguments[0]].textContent)", index)


def test_a_click_sorts_and_a_text_filters(opened):
    heads = [head.text for head in opened.all("table.sortable thead th")]
    place = heads.index("OP last")
    button = opened.all("table.sortable thead button")[place]
    button.click()
    rising = [float(text) for text in column(opened, place)]
    assert rising == sorted(rising)
    assert len(rising) == 12
    button.click()
    assert [float(text) for text in column(opened, place)] == sorted(rising, reverse=True)
    assert opened.all("table.sortable th[aria-sort]")[0].get_attribute("aria-sort") == "descending"
    opened.all("table.sortable thead button")[0].click()
    names = column(opened, 0)
    assert names == sorted(names)
    opened.all("input[type=search]")[0].send_keys("EWC")
    assert set(column(opened, 2)) == {"ewc"}
    assert len(column(opened, 2)) == 4
    assert "4 of 12" in opened.all(".filter")[0].text


@pytest.mark.parametrize("dark", [False, True])
def test_texts_can_be_read(opened, dark):
    grounds = []
    for mode in (not dark, dark):
        opened.set_dark(mode)
        grounds.append(opened.run("return getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]
    texts = opened.contrasts()
    on_page = [text for text in texts if text[2] not in ON_CELLS]
    assert len(texts) - len(on_page) == CELLS
    assert len(on_page) > 500
    assert [text for text in on_page if text[0] < READABLE] == []


@pytest.mark.parametrize("width", [1280, 768, 390])
def test_nothing_sticks_out(opened, width):
    opened.resize(width, 800)
    assert opened.wide() == []
    shown = opened.run("return [...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().width)")
    assert np.min(shown) > 300


def test_the_page_is_complete_without_scripts(opened, page):
    opened.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened.open(page)
        assert opened.all("input[type=search]") == []
        assert len(opened.all("table.sortable tbody tr")) == 12
        assert [head.text for head in opened.all("table.sortable thead th")][:3] == ["run", "id", "group"]
    finally:
        opened.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_script_from_outside_is_refused(opened):
    opened.run(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
        "const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);"
    )
    assert opened.run("return window.ran") is None
    assert len([line for line in opened.complaints() if "Content Security Policy" in line]) == 2
