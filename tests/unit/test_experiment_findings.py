import math

import pytest

from tests.support.experiment_runs import FolderHistory, params_of, tags_of
from treelora_platform.experiments.analysis import compare_groups
from treelora_platform.experiments.findings import NO_BREAK, _could, findings
from treelora_platform.experiments.groups import select


def comparison_of(scores, *, bwt=None, seconds=None, reference=None):
    """Runs with these OPs by method, a seed each, in the mode `last`."""
    history = FolderHistory()
    for method, ops in scores.items():
        for seed, op in enumerate(ops):
            metrics = {"final/op/last": [(3, op)]}
            if bwt:
                metrics["final/bwt/last"] = [(3, bwt[method][seed])]
            if seconds:
                metrics["final/seconds"] = [(3, seconds[method][seed])]
            history.add(None, params_of(method, seed), tags_of(method, seed), name=f"{method}{seed}", metrics=metrics)
    return compare_groups("made up", select(history.records, ["method"]), reference)


def texts(comparison, modes=("last",)):
    return [
        (one.lead.replace(NO_BREAK, " "), [text.replace(NO_BREAK, " ") for text in one.tested])
        for one in findings(comparison, modes)
    ]


def test_a_difference_beyond_chance():
    # the same 10 points for 7 seeds: p is 2 / 2^7 for the one comparison there is
    found = comparison_of({"treelora": [60.0 + s for s in range(7)], "sequential": [50.0 + s for s in range(7)]})
    assert texts(found) == [
        (
            "Inference last: treelora has the highest mean OP, 63.0 % over 7 runs; then sequential 53.0 %.",
            ["Beyond chance in OP against sequential: treelora +10.0 points [10.0, 10.0], p = 0.0156."],
        )
    ]


def test_holm_counts_all_groups_of_a_score():
    ewc = [50.0 + s + (0.5 if s % 2 else -0.4) for s in range(7)]
    scores = {"treelora": [60.0 + s for s in range(7)], "ewc": ewc, "sequential": [50.0 + s for s in range(7)]}
    tested = texts(comparison_of(scores))[0][1]
    assert tested[0] == "Beyond chance in OP against sequential: treelora +10.0 points [10.0, 10.0], p = 0.0312."
    assert tested[1].startswith("Not beyond chance in OP against sequential: ewc +0.0 points [−0.5, 0.4], p = ")
    assert tested[1].endswith("That does not show that they are alike.")


def test_too_few_pairs_are_said_to_be_too_few():
    found = comparison_of({"treelora": [90.0, 91.0, 92.0, 93.0], "sequential": [10.0, 11.0, 12.0, 13.0]})
    # 4 pairs: at least 2 / 16; 5 pairs: 0.0625; 6 pairs: 0.03125
    assert texts(found)[0][1] == [
        "Too few pairs of runs to tell in OP: with 4 pairs no difference, however large, is beyond chance here; with 6 "
        "it could be. Seen so far in OP: treelora +80.0 points [80.0, 80.0]."
    ]


def test_scores_with_too_few_pairs_share_a_sentence():
    found = comparison_of(
        {"treelora": [60.0, 61.0], "sequential": [50.0, 51.0]}, bwt={"treelora": [1.0, 2.0], "sequential": [5.0, 6.0]}
    )
    (sentence,) = texts(found)[0][1]
    assert sentence.startswith("Too few pairs of runs to tell in OP, BWT: with 2 pairs no difference")
    assert sentence.endswith("Seen so far in OP: treelora +10.0 points [10.0, 10.0].")


def test_what_can_be_told_is_told_beside_what_can_not():
    found = comparison_of({"treelora": [60.0 + s for s in range(7)], "ewc": [90.0], "sequential": [50.0] * 7})
    tested = texts(found)[0][1]
    assert tested[0].startswith("Beyond chance in OP against sequential: treelora +13.0 points")
    assert tested[1].startswith("Too few pairs of runs to tell in OP: with 1 pair no difference")
    assert tested[1].endswith("Seen so far in OP: ewc +40.0 points.")


def test_one_pair_has_no_interval():
    (_, (sentence,)) = texts(comparison_of({"treelora": [60.0], "sequential": [50.0]}))[0]
    assert "with 1 pair no difference" in sentence
    assert sentence.endswith("Seen so far in OP: treelora +10.0 points.")


def test_less_forgetting_and_more_time():
    seven = range(7)
    found = comparison_of(
        {"treelora": [50.0] * 7, "sequential": [50.0] * 7},
        bwt={"treelora": [4.0 + s for s in seven], "sequential": [9.0 + s for s in seven]},
        seconds={"treelora": [30.0] * 7, "sequential": [10.0] * 7},
    )
    lead, tested = texts(found)[0]
    assert lead == "Inference last: sequential and treelora have the same highest mean OP, 50.0 %."
    assert tested == [
        "Not beyond chance in OP against sequential: treelora +0.0 points [0.0, 0.0], p = 1. "
        "That does not show that they are alike.",
        "Beyond chance in BWT against sequential: treelora −5.0 points [−5.0, −5.0], p = 0.0156.",
        "Beyond chance in training time against sequential: treelora +20 s [20, 20], p = 0.0156.",
    ]


def test_bounds_do_not_win():
    found = comparison_of({"joint": [99.0] * 2, "treelora": [60.0] * 2, "sequential": [50.0] * 2})
    lead = texts(found)[0][0]
    assert lead == "Inference last: treelora has the highest mean OP, 60.0 % over 2 runs; then sequential 50.0 %."
    assert texts(comparison_of({"joint": [99.0]})) == [
        ("Inference last: all groups are bounds, which learn all tasks at once or none.", [])
    ]


def test_one_group_wins_nothing():
    assert texts(comparison_of({"treelora": [60.0, 62.0]})) == [
        ("Inference last: treelora has a mean OP of 61.0 % over 2 runs, and no other group competes with it.", [])
    ]


def test_a_mode_without_scores_is_silent():
    assert texts(comparison_of({"treelora": [60.0]}), ("last", "routed"))[1:] == []


def test_many_groups_are_cut_with_their_number():
    methods = ["treelora", "ewc", "olora", "gem", "ogd", "agem", "lwf", "sequential"]
    found = comparison_of({method: [80.0 - i] * 9 for i, method in enumerate(methods)})
    lead, (sentence,) = texts(found)[0]
    assert lead.endswith("then ewc 79.0 %, olora 78.0 %, gem 77.0 % and 4 more.")
    assert sentence.count("points") == 3
    assert sentence.endswith("; and 4 more.")


@pytest.mark.parametrize(("pairs", "able"), [(5, False), (6, False), (7, True)])
def test_whether_so_many_pairs_could_show_anything(pairs, able):
    # two comparisons: Holm doubles the smaller p, so 2 * 2 / 2^n must be at most 0.05
    scores = {"treelora": [50.0 + s % 2 for s in range(pairs)], "ewc": [50.0] * pairs, "sequential": [50.0] * pairs}
    family = [one for one in comparison_of(scores).differences if one.metric == "op"]
    assert [_could(family, one) for one in family] == [able, able]
    assert math.isclose(family[0].found.smallest_p, 2.0 ** (1 - pairs))
