"""`docs/configuration.md` says what the configuration is now, and names every field."""

import importlib.util
from pathlib import Path

import pytest

from treelora_platform.config import ExperimentConfig

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("make_configuration", DOCS / "make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.page()


def test_the_page_is_up_to_date(page):
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == page, (
        "run `.venv/bin/python docs/make_configuration.py > docs/configuration.md`"
    )


def test_every_field_has_one_row(page):
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(ExperimentConfig().flat())


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("lora.rank", "| `lora.rank` | whole number, ≥ 1 | `8` | Rank r of each adapter. |"),
        (
            "train.epochs",
            "| `train.epochs` | number or null, > 0 | `null` | Passes over each task's rows; give this or `steps`. |",
        ),
    ],
)
def test_rows_worked_by_hand(page, key, row):
    assert [line for line in page.splitlines() if line.startswith(f"| `{key}` ")] == [row]


def test_a_default_of_the_whole_section_is_told(page):
    assert ExperimentConfig().train.steps == 16
    assert "Where the section `train` is left out as a whole, `train.steps` is `16`." in page
