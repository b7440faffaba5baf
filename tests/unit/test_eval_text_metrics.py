"""Text metrics against published numbers, hand-worked values and slow definitions."""

from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora.errors import DataError
from treelora.evaluation.text_metrics import (
    METRICS,
    accuracy,
    edit_similarity,
    exact_match,
    rouge_l,
    sari,
    sari_sentence,
)

SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]
words = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=1, max_size=8).map(" ".join)


def common_subsequence(a, b):
    """Length of the longest common subsequence, by the textbook recursion."""

    @lru_cache(None)
    def longest(i, j):
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


@pytest.mark.parametrize(
    ("prediction", "published"),
    # What the authors' release and EASSE's tests give for these three.
    [
        ("About 95 you now get in .", 26.82782411698074),
        ("About 95 species are now agreed .", 58.89995423074248),
        ("About 95 species are currently agreed .", 50.71608864657479),
    ],
)
def test_sari_of_the_published_examples(prediction, published):
    assert sari([prediction], [REFERENCES], [SOURCE]) == pytest.approx(published, abs=1e-9)


def test_sari_by_hand():
    # Unigrams: "c" added, "d" wanted: 0. "a" kept and wanted: 1. "b" deleted, rightly: 1.
    # Bigrams: "a c" added, "a d" wanted: 0. Nothing kept: 0. "a b" deleted, rightly: 1. Longer: nothing, 0.
    assert sari_sentence("a b", "a c", ["a d"]) == pytest.approx((0 + 1 / 4 + 2 / 4) / 3)


def test_sari_counts_each_reference():
    # "b" was deleted and one of two references keeps it, so half of that was right. All keep "a".
    score = sari_sentence("a b", "a", ["a b", "a"])
    # Unigrams: add 0; keep: precision 1, recall mean(1 for a, 0 for b) = 1/2, F1 = 2/3; delete 1/2.
    # Bigrams: delete "a b", which one of two references keeps: 1/2.
    assert score == pytest.approx((0 + (2 / 3) / 4 + (1 / 2 + 1 / 2) / 4) / 3)


def test_sari_is_the_mean_over_rows_and_knows_case_and_punctuation():
    predictions = ["About 95 you now get in.", "about 95 species are NOW agreed."]
    expected = (26.82782411698074 + 58.89995423074248) / 2
    assert sari(predictions, [REFERENCES] * 2, [SOURCE] * 2) == pytest.approx(expected)


@given(words, words, words)
def test_sari_with_one_reference_as_text_or_list_and_repeated(source, prediction, reference):
    one = sari([prediction], [reference], [source])
    assert 0.0 <= one <= 100.0
    assert sari([prediction], [[reference]], [source]) == one
    assert sari([prediction], [[reference] * 3], [source]) == pytest.approx(one)


def test_a_perfect_rewrite_of_all_words_gets_full_marks():
    assert sari(["p q r s t"], ["p q r s t"], ["a b c d e"]) == pytest.approx(100 * (1 + 0 + 1) / 3)


def test_sari_needs_sources_and_references():
    with pytest.raises(DataError, match="source"):
        sari(["a"], ["a"], None)
    with pytest.raises(DataError, match="1 sources for 2 predictions"):
        sari(["a", "b"], ["a", "b"], ["a"])
    with pytest.raises(DataError, match="row 1 has no reference"):
        sari(["a", "b"], [["a"], []], ["a", "b"])


def test_accuracy_ignores_case_space_and_outer_punctuation():
    predictions = [" Very  positive. ", "NEGATIVE", "don't", "yes", "", "straße"]
    references = ["very positive", "negative", "dont", "no", ".", "STRASSE"]
    assert accuracy(predictions, references) == pytest.approx(100 * 4 / 6)


def test_exact_match_ignores_outer_space_only():
    assert exact_match([" a b\n", "A b", "a  b", "a b."], ["a b"] * 4) == 25.0


def test_rouge_l_by_hand():
    # Longest common subsequence "the cat mat" of 6 and 4 words: P = 3/6, R = 3/4, F1 = 0.6.
    assert rouge_l(["the cat sat on a mat"], ["The cat likes: mat"]) == pytest.approx(60.0)
    assert rouge_l(["x", "same words"], ["y", "Same words!"]) == pytest.approx(50.0)
    assert rouge_l([""], ["something"]) == 0.0


@given(words, words)
def test_rouge_l_by_definition(prediction, reference):
    p, r = prediction.split(), reference.split()
    common = common_subsequence(tuple(p), tuple(r))
    assert rouge_l([prediction], [reference]) == pytest.approx(100 * 2 * common / (len(p) + len(r)))


@given(st.text("abc ", max_size=9), st.text("abc ", max_size=9))
def test_edit_similarity_by_definition(prediction, reference):
    p, r = prediction.strip(), reference.strip()
    total = len(p) + len(r)
    expected = 100 * 2 * common_subsequence(p, r) / total if total else 100.0
    assert edit_similarity([prediction], [reference]) == pytest.approx(expected)


def test_edit_similarity_by_hand():
    # kitten -> sitting: "ittn" in common, 2 * 4 / 13.
    assert edit_similarity(["kitten", "x = 1"], ["sitting", " x = 1\n"]) == pytest.approx((800 / 13 + 100) / 2)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_refuses_nothing_and_unequal_lengths(name):
    with pytest.raises(DataError, match="empty"):
        METRICS[name]([], [], [])
    with pytest.raises(DataError, match="2 predictions but 1 references"):
        METRICS[name](["a", "b"], ["a"], ["a", "b"])


@pytest.mark.parametrize("name", [name for name in METRICS if name != "sari"])
def test_equal_texts_get_full_marks(name):
    texts = ["one two", "three"]
    assert METRICS[name](texts, texts, texts) == pytest.approx(100.0)


def test_registry_has_the_metrics_that_tasks_may_name():
    assert set(METRICS) == {"accuracy", "exact_match", "rouge_l", "sari", "edit_similarity"}
