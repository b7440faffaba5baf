from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from treelora.errors import ConfigError
from treelora.simulation.families import FamilyDesign, draw_families
from treelora.simulation.recovery import (
    LABELINGS,
    SCENARIOS,
    TREES,
    delta_looseness,
    scenario_tasks,
    score_stream,
    score_vocabulary,
)
from treelora.tree import SignatureTree
from treelora.tree_build import pairwise_distances
from treelora.tree_scores import cut_rand_index, dendrogram_purity, permutation_p_value

SMALL = FamilyDesign(superfamilies=2, families=2, vocabularies=2, repeats=1, layers=4, layer_dims=(300, 100))
CLEAR = replace(SMALL, repeats=2, vocabulary=0.0, own=0.0, noise=0.0)


def last(scores, tree, labeling="family"):
    tasks = max(s.tasks for s in scores)
    return next(s for s in scores if (s.tree, s.labeling, s.tasks) == (tree, labeling, tasks))


def test_family_and_vocabulary_are_crossed():
    design = FamilyDesign(superfamilies=2, families=3, vocabularies=4, repeats=2)
    labels = draw_families(design, 0).labels
    pairs = Counter(zip(labels["family"], labels["vocabulary"], strict=True))
    assert len(pairs) == 6 * 4
    assert set(pairs.values()) == {2}
    assert all(superfamily == family // 3 for family, superfamily in zip(*list(labels.values())[:2], strict=True))


def test_signatures_are_normalised_and_the_seeds():
    first, again, other = (draw_families(SMALL, seed) for seed in (4, 4, 5))
    assert first.signatures.shape == (8, 4, 64)
    np.testing.assert_allclose(np.linalg.norm(first.signatures, axis=2), 1, rtol=1e-5)
    np.testing.assert_array_equal(first.signatures, again.signatures)
    assert first.labels == again.labels
    assert not np.array_equal(first.signatures, other.signatures)


def test_the_default_tasks_are_as_alike_as_real_ones_were():
    # 14 real tasks on SmolLM2-135M: mean cosine between tasks .565, see docs/methods.md.
    signatures = draw_families(FamilyDesign(), 0).signatures
    cosine = np.einsum("ilk,jlk->ij", signatures, signatures) / signatures.shape[1]
    assert cosine[np.triu_indices(24, 1)].mean() == pytest.approx(0.565, abs=0.05)


def test_what_is_shared_makes_tasks_alike():
    tasks = draw_families(replace(CLEAR, vocabulary=0.3), 1)
    distance = pairwise_distances(tasks.signatures).mean(axis=0)
    family, vocabulary = tasks.labels["family"], tasks.labels["vocabulary"]
    by = {True: [], False: []}
    for i, j in combinations(range(16), 2):
        if family[i] == family[j]:
            by[vocabulary[i] == vocabulary[j]].append(distance[i, j])
    assert max(by[True]) < 1e-6
    assert min(by[False]) > 0.01


@pytest.mark.parametrize("run", [0, 1, 2])
def test_without_noise_families_are_recovered_perfectly(run):
    scores = score_stream("families", CLEAR, run, permutations=19)
    for tree in ("medoid", "agglomerative"):
        found = [s for s in scores if s.tree == tree and s.labeling == "family"]
        assert {s.rand_index for s in found if not np.isnan(s.rand_index)} == {1.0}
        assert last(scores, tree, "superfamily").rand_index == last(scores, tree).purity == 1.0
        assert last(scores, tree).p_value == pytest.approx(0.05)
    assert last(scores, "paper").rand_index < 0.6


def test_shuffled_labels_score_at_chance():
    values, p_values = [], []
    for seed in range(60):
        stream = scenario_tasks("shuffled labels", CLEAR, seed)
        tree, labels = SignatureTree.build(stream.signatures), stream.labels["family"]
        values.append(cut_rand_index(tree, labels))
        p_values.append(permutation_p_value(tree, labels, permutations=19, seed=seed))
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(60)
    # 5 % in expectation; 9 or more of 60 have a chance below 1 in 400.
    assert np.sum(np.array(p_values) <= 0.05) <= 8


def test_the_controls_hold_nothing_to_be_found():
    identical = scenario_tasks("identical tasks", SMALL, 0).signatures
    assert pairwise_distances(identical).max() == 0
    noise = scenario_tasks("pure noise", replace(SMALL, sketch_size=100), 0).signatures
    cosine = np.einsum("ilk,jlk->ij", noise, noise) / noise.shape[1]
    assert np.abs(cosine[np.triu_indices(8, 1)]).max() < 0.3
    design = replace(SMALL, own=0.1)
    shuffled, families = (scenario_tasks(name, design, 3) for name in ("shuffled labels", "families"))
    np.testing.assert_array_equal(shuffled.signatures, families.signatures)
    assert sorted(shuffled.labels["family"]) == sorted(families.labels["family"])
    assert shuffled.labels["family"] != families.labels["family"]


def test_scores_are_those_of_the_trees_after_every_insertion():
    scores = score_stream("families", SMALL, 1, seed=2, permutations=1)
    assert len(scores) == 7 * len(TREES) * len(LABELINGS)
    stream = scenario_tasks("families", SMALL, 2 * 2**31 + 1)
    grown = SignatureTree.build(stream.signatures[:1])
    for tasks in range(2, 9):
        grown = grown.insert(stream.signatures[:tasks])
        built = SignatureTree.build(stream.signatures[:tasks], "paper")
        labels = stream.labels["family"][:tasks]
        if not 1 < len(set(labels)) < tasks:
            continue
        for tree, name in ((grown, "insert only"), (built, "paper")):
            found = next(s for s in scores if (s.tree, s.labeling, s.tasks) == (name, "family", tasks))
            assert found.rand_index == cut_rand_index(tree, labels)
            assert found.purity == dendrogram_purity(tree, labels)


def test_labels_that_any_tree_gets_right_are_not_scored():
    design = replace(SMALL, superfamilies=1, families=1, vocabularies=1, repeats=4)
    scores = score_stream("families", design, 0, permutations=3)
    assert all(np.isnan([s.rand_index, s.purity, s.p_value]).all() for s in scores)


def test_a_strong_vocabulary_wins_over_the_rule():
    scores = score_vocabulary(replace(CLEAR, own=0.1), (0.0, 5.0), 0)
    found = {
        (s.vocabulary_length, s.labeling): s.rand_index
        for s in scores
        if s.tree == "medoid" and s.labeling != "superfamily"
    }
    assert found[0.0, "family"] == found[5.0, "vocabulary"] == 1.0
    assert max(found[0.0, "vocabulary"], found[5.0, "family"]) < 0.2


def test_delta_is_never_too_small():
    loose = [one for run in range(3) for one in delta_looseness(FamilyDesign(layers=3), run)]
    assert min(one.ratio for one in loose) >= 1.0
    assert [one.tasks_below for one in loose if one.root] == [23] * 3
    by_hand = draw_families(FamilyDesign(layers=3), 0).signatures
    distances = pairwise_distances(by_hand)
    expected = np.median(distances[:, :-1, :-1].max(axis=(1, 2)) / np.ptp(distances[:, -1, :-1], axis=1))
    assert loose[0].ratio == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FamilyDesign(families=0), "at least 1"),
        (lambda: FamilyDesign(own=-0.1), "not negative"),
        (lambda: scenario_tasks("familiar", SMALL, 0), "scenario = 'familiar': choose one of " + ", ".join(SCENARIOS)),
        (lambda: score_stream("families", SMALL, -1), "run = -1"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
