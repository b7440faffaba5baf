import base64
import csv
import hashlib
import io
from urllib.parse import unquote
from xml.etree import ElementTree

from treelora_platform.canvas import COLOURS, INK, new_figure
from treelora_platform.page import PAPER, chart, csv_download, own_script


def rows_of(download):
    head, _, text = download.href.partition(",")
    assert head == "data:text/csv;charset=utf-8"
    return list(csv.reader(io.StringIO(unquote(text))))


def test_a_table_survives_the_way_through_a_link():
    rows = [("a,b", 1.5, None), ('say "x"', -2, "line\nbreak"), ("日本 #1 100 %", 0.1, "x")]
    found = csv_download("numbers", ("name", "value", "note"), rows)
    assert found.name == "numbers.csv"
    assert rows_of(found) == [
        ["name", "value", "note"], ["a,b", "1.5", ""], ['say "x"', "-2", "line\nbreak"], ["日本 #1 100 %", "0.1", "x"],
    ]  # fmt: skip


def test_formulas_are_defused_and_numbers_are_not():
    texts = ["=1+1", "+cmd", "-x", "@a", "\tx", "-1.5", "+2e-3", "plain", "1 = 1"]
    found = rows_of(csv_download("x", ("=head",), [[text] for text in texts]))
    assert [row[0] for row in found] == [
        "'=head", "'=1+1", "'+cmd", "'-x", "'@a", "'\tx", "-1.5", "+2e-3", "plain", "1 = 1",
    ]  # fmt: skip


def test_a_figure_takes_the_colours_of_the_page_and_its_file_has_its_own():
    with new_figure(2.0) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=COLOURS[1])
        axes.plot([0], [0], "o", markerfacecolor=PAPER)
        axes.set_title("<b> & co")
        made = chart(figure, "sketch", 'a "caption" & more')
    assert "var(--c2)" in made.svg
    assert "var(--paper)" in made.svg
    assert "currentColor" in made.svg
    assert INK not in made.svg
    assert made.svg.startswith('<svg role="img" aria-label="a &#34;caption&#34; &amp; more"')
    kind, _, data = made.file.href.partition(",")
    assert (made.file.name, kind) == ("sketch.svg", "data:image/svg+xml;base64")
    alone = base64.b64decode(data).decode()
    assert COLOURS[1].lower() in alone
    assert "var(" not in alone
    assert "currentColor" not in alone
    root = ElementTree.fromstring(alone)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "<b> & co" in [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_policy_names_the_script_that_the_page_has():
    found = own_script("tables.js.j2")
    digest = base64.b64encode(hashlib.sha256(str(found["script"]).encode()).digest()).decode()
    assert found["script_hash"] == f"sha256-{digest}"
    assert "</script" not in found["script"]
