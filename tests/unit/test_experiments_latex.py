import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.latex import check_line, read_tabulars, typeset
from tests.support.records import record
from treelora_platform.experiments.analysis import compare_groups
from treelora_platform.experiments.groups import select
from treelora_platform.experiments.latex import escape, latex_page

SPECIAL = '100% & #1_a {b} ~x^2 \\ $5 <a> | "q"'


def compared(runs, by="method"):
    return compare_groups("exp", select(runs, [by]))


def two_methods():
    scores = {"sequential": (50.0, 54.0, 40.0), "treelora": (56.0, 57.0, 49.0), "joint": (90.0,)}
    return [
        record(m, seed=s, op={"last": v, "routed": 50.0}, bwt=None if m == "joint" else 2.0 * s, seconds=100 + s)
        for m, values in scores.items()
        for s, v in enumerate(values)
    ]


def test_the_page_by_hand():
    page = latex_page(compared(two_methods()))
    standings, differences = read_tabulars(page)
    assert standings == [
        ["", "last", "", "routed", "", ""],
        ["", r"OP (\%)", "BWT", r"OP (\%)", "runs", "time (s)"],
        # sd / sqrt(3) x 4.303: op sqrt(52) -> 17.9; bwt 0, 2, 4 -> 5.0; seconds 100, 101, 102 -> 2
        ["joint", "$90.0$", "--", "$50.0$", "1", "$100$"],
        ["sequential", r"$48.0 \pm 17.9$", r"$2.0 \pm 5.0$", r"$50.0 \pm 0.0$", "3", r"$101 \pm 2$"],
        ["treelora", r"$\mathbf{54.0} \pm 10.8$", r"$2.0 \pm 5.0$", r"$50.0 \pm 0.0$", "3", r"$101 \pm 2$"],
    ]
    assert differences[0] == ["", "inference", "score", "pairs", "difference", r"95\,\% interval", "$p$", "$p$ (Holm)"]
    assert differences[1] == ["joint", "last", "OP", "1", "$+40.0$", "--", "$1$", "$1$"]
    # 6, 3, 9: 6 +- 4.303 x 3 / sqrt(3)
    assert differences[2] == ["treelora", "last", "OP", "3", "$+6.0$", "$[-1.5, 13.5]$", "$0.25$", "$0.5$"]
    assert r"\cmidrule(lr){2-3}\cmidrule(lr){4-4}" in page
    assert r"\usepackage{booktabs}" in page.splitlines()[0]


def test_the_least_forgetting_is_best_and_equal_texts_tie():
    runs = [
        record(m, op=50.04 - i / 50, bwt=b) for i, (m, b) in enumerate({"ewc": 3.0, "gem": -1.0, "ogd": -1.0}.items())
    ]
    (standings, _) = read_tabulars(latex_page(compared(runs)))
    assert [row[1] for row in standings[2:]] == ["$50.0$"] * 3
    assert [row[2] for row in standings[2:]] == ["$3.0$", r"$\mathbf{-1.0}$", r"$\mathbf{-1.0}$"]


def test_nothing_is_minus_zero():
    runs = [record(m, op=v) for m, v in {"ewc": -0.01, "gem": 7.0}.items()]
    assert read_tabulars(latex_page(compared(runs)))[0][2][1] == "$0.0$"


def test_what_is_special_is_escaped():
    assert escape(SPECIAL) == (
        r"100\% \& \#1\_a \{b\} \textasciitilde{}x\textasciicircum{}2 \textbackslash{} \$5 \textless{}a\textgreater{} "
        r"\textbar{} ''q''"
    )
    assert typeset(escape(SPECIAL)) == SPECIAL


@pytest.mark.parametrize("text", ["a\nb", "\x00", "a\u2028b"])
def test_control_characters_become_spaces(text):
    assert " " in escape(text)
    assert escape(text).isprintable()


@given(st.text())
def test_every_text_can_be_set(text):
    check_line(escape(text))
    seen = "".join(sign if sign.isprintable() else " " for sign in text)
    # the closing quotes and the dash have two spellings
    assert typeset(escape(text)).replace("--", "–") == seen.replace("''", '"').replace("--", "–")


@given(st.text(min_size=1, max_size=20))
def test_every_name_of_a_group_can_be_set(text):
    page = latex_page(compared([record(tags={"team": text}), record("ewc", tags={"team": "other"})], "tags.team"))
    labels = [typeset(row[0]) for row in read_tabulars(page)[0][2:]]
    assert len(labels) == (1 if text == "other" else 2)


def test_a_label_that_begins_like_an_option():
    page = latex_page(compared([record("[x]"), record("*y")]))
    assert [row[0] for row in read_tabulars(page)[0][2:]] == ["{}*y", "{}[x]"]


@pytest.mark.parametrize("fault", [" & ", "}", "\\foo{}", "%", " $", "_", "\\\\ \\\\"])
def test_the_reader_is_strict(fault):
    page = latex_page(compared(two_methods()))
    with pytest.raises(AssertionError):
        read_tabulars(page.replace("sequential &", f"sequential{fault} &"))
