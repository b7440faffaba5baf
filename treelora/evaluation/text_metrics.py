"""Scores of generated answers against references. Every metric is the mean over rows in percent, 0 to 100.

Metrics take (predictions, references, sources): lists of equal length, where `sources` (the input texts) is
needed by SARI only. They are pure and deterministic.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from treelora.errors import DataError

Metric = Callable[[Sequence[str], Sequence[str], Sequence[str] | None], float]

_TOKEN = re.compile(r"\w+|[^\w\s]")
_SARI_ORDERS = (1, 2, 3, 4)


def accuracy(predictions: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None) -> float:
    """Percent of predictions equal to their reference, but for case, white space and outer punctuation.

    Raises:
        DataError: no rows, or lists of unequal length.
    """
    return _mean(predictions, references, lambda p, r: float(_normalised(p) == _normalised(r)))


def exact_match(predictions: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None) -> float:
    """Percent of predictions equal to their reference, but for outer white space.

    Raises:
        DataError: as for `accuracy`.
    """
    return _mean(predictions, references, lambda p, r: float(p.strip() == r.strip()))


def rouge_l(predictions: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None) -> float:
    """Mean ROUGE-L F1 (Lin, 2004), by Google's `rouge_score` without stemming.

    Its tokens are runs of a-z and 0-9 in lower case, so other scripts score 0 and letters with accents split
    words.

    Raises:
        DataError: as for `accuracy`.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return _mean(predictions, references, lambda p, r: scorer.score(r, p)["rougeL"].fmeasure)


def edit_similarity(
    predictions: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None
) -> float:
    """Mean of 100 · (1 - d / (|p| + |r|)), d = insertions and deletions between the characters
    (`fuzz.ratio`).

    This is what TRACE (arXiv 2310.06762) and CodeXGLUE report for code completion; a substitution counts as
    two.

    Raises:
        DataError: as for `accuracy`.
    """
    from rapidfuzz import fuzz

    return _mean(predictions, references, lambda p, r: fuzz.ratio(p.strip(), r.strip()) / 100.0)


def sari(
    predictions: Sequence[str],
    references: Sequence[str] | Sequence[Sequence[str]],
    sources: Sequence[str] | None = None,
) -> float:
    """Mean sentence-level SARI (Xu et al., TACL 2016): were the right words added, kept and deleted?

    For n-grams of 1 to 4 tokens (words and punctuation marks, lower case): F1 of what was added, F1 of what
    was kept, precision of what was deleted, each averaged over n; SARI is the mean of the three. A ratio
    without a denominator counts 0, as in the authors' release (others let it count 1 and report higher
    numbers).

    Args:
        predictions: simplified texts.
        references: for each row one text, or a list of them.
        sources: the original texts.

    Raises:
        DataError: as for `accuracy`, no sources, or a row without references.
    """
    if sources is None:
        raise DataError("SARI compares with the source texts; give one source a row")
    _check_lengths(predictions, references)
    if len(sources) != len(predictions):
        raise DataError(f"{len(sources)} sources for {len(predictions)} predictions; give one a row")
    total = 0.0
    for i, (source, prediction, reference) in enumerate(zip(sources, predictions, references, strict=True)):
        texts = [reference] if isinstance(reference, str) else list(reference)
        if not texts:
            raise DataError(f"row {i} has no reference; give at least one")
        total += sari_sentence(source, prediction, texts)
    return 100.0 * total / len(predictions)


def sari_sentence(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI of one row, in [0, 1]."""
    add = keep = delete = 0.0
    for n in _SARI_ORDERS:
        source_n, prediction_n = _ngrams(source, n), _ngrams(prediction, n)
        reference_n = Counter[tuple[str, ...]]()
        for reference in references:
            reference_n.update(_ngrams(reference, n))
        add += _add_f1(source_n, prediction_n, reference_n)
        # References are counted together, so the other two are repeated to the same weight.
        source_n, prediction_n = _repeat(source_n, len(references)), _repeat(prediction_n, len(references))
        keep += _keep_f1(source_n, prediction_n, reference_n)
        removed, wanted = source_n - prediction_n, source_n - reference_n
        delete += _share(removed & wanted, removed)
    return (add + keep + delete) / (3 * len(_SARI_ORDERS))


Grams = Counter[tuple[str, ...]]


def _add_f1(source: Grams, prediction: Grams, reference: Grams) -> float:
    added, wanted = set(prediction) - set(source), set(reference) - set(source)
    good = len(added & wanted)
    return _f1(_ratio(good, len(added)), _ratio(good, len(wanted)))


def _keep_f1(source: Grams, prediction: Grams, reference: Grams) -> float:
    kept, wanted = source & prediction, source & reference
    good = kept & reference
    return _f1(_share(good, kept), _share(good, wanted))


def _share(part: Grams, whole: Grams) -> float:
    """Mean over the distinct n-grams of `whole` of the share of their count that `part` holds."""
    return _ratio(sum(part[gram] / count for gram, count in whole.items()), len(whole))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _f1(precision: float, recall: float) -> float:
    return _ratio(2.0 * precision * recall, precision + recall)


def _ngrams(text: str, n: int) -> Grams:
    tokens = _TOKEN.findall(text.lower())
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _repeat(grams: Grams, times: int) -> Grams:
    return Counter({gram: count * times for gram, count in grams.items()})


def _normalised(text: str) -> str:
    return " ".join(text.split()).strip(string.punctuation + " ").casefold()


def _check_lengths(predictions: Sequence[str], references: Sequence[object]) -> None:
    if len(predictions) == 0:
        raise DataError("there is nothing to score: the list of predictions is empty")
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions but {len(references)} references; give one a row")


def _mean(predictions: Sequence[str], references: Sequence[str], score: Callable[[str, str], float]) -> float:
    _check_lengths(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return 100.0 * sum(score(prediction, reference) for prediction, reference in pairs) / len(predictions)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "sari": sari,
    "edit_similarity": edit_similarity,
}
