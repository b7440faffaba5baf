import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from treelora.errors import ConfigError
from treelora.simulation.sketch_accuracy import heavy_tailed_gradients, score_sketches
from treelora.sketch import CountSketch, normalise, residual

DIMS = (600, 240)


def scores(sizes, **options):
    return list(score_sketches(sizes, DIMS, **options))


def test_a_sketch_as_wide_as_the_layer_keeps_everything():
    found = next(score_sketches([300], (300, 300), tasks=8))
    assert max(found.l2_error, found.l1_error) < 1e-5
    assert found.l1_ratio == pytest.approx(1.0)
    assert found.layer_nearest == found.nearest == 1.0
    assert [found.layer_ranking, found.ranking] == pytest.approx([1.0, 1.0])
    assert found.bytes_task == 4 * 300 * 2


def test_the_l2_error_is_what_theory_says():
    # The sketch's squared distance has relative variance 2 / K, so the distance's mean absolute error is
    # sqrt(2 / pi) / sqrt(2 K) = 1 / sqrt(pi K).
    found = [s for run in range(6) for s in score_sketches([32], [4000] * 4, tasks=12, run=run)]
    assert np.mean([s.l2_error for s in found]) == pytest.approx(1 / np.sqrt(np.pi * 32), rel=0.1)


def test_larger_sketches_are_better():
    small, middle, large = ([getattr(s, name) for s in scores([8, 40, 200], tasks=12)] for name in
                            ("l2_error", "l1_error", "layer_ranking"))  # fmt: skip
    assert small == sorted(small, reverse=True)
    assert middle == sorted(middle, reverse=True)
    assert large == sorted(large)


def test_scores_equal_brute_force():
    found = scores([16], tasks=5, run=3, seed=1)[0]
    gradients = heavy_tailed_gradients(5, DIMS, 2**31 + 3)
    sketch = CountSketch(DIMS, 16, 2**31 + 3)
    unit = [layer / layer.norm(dim=1, keepdim=True) for layer in gradients]
    signatures = torch.stack([normalise(sketch.sketch([layer[task] for layer in unit])) for task in range(5)])
    exact, sketched, euclid = [], [], []
    for i in range(5):
        for j in range(i + 1, 5):
            sketched.append(residual(signatures[i], signatures[j : j + 1])[0].numpy())
            exact.append([float((u[i] - u[j]).abs().sum()) / np.sqrt(len(u[i])) for u in unit])
            euclid.append([float((u[i] - u[j]).norm()) for u in unit])
    ratio = np.array(sketched) / np.array(exact)
    assert found.l1_ratio == pytest.approx(np.median(ratio), rel=1e-5)
    assert found.l2_ratio == pytest.approx(np.median(np.array(sketched) / np.array(euclid)), rel=1e-5)
    assert found.l1_error == pytest.approx(np.abs(ratio / np.median(ratio, axis=0) - 1).mean(), rel=1e-4)
    of_mean = spearmanr(np.mean(sketched, axis=1), np.mean(exact, axis=1)).statistic
    assert found.ranking == pytest.approx(of_mean)
    of_layers = [spearmanr(np.array(sketched)[:, layer], np.array(exact)[:, layer]).statistic for layer in (0, 1)]
    assert found.layer_ranking == pytest.approx(np.mean(of_layers))


@pytest.mark.parametrize("shards", [1, 2, 7, 601])
def test_shards_add_up_to_the_whole(shards):
    # Nothing is lost but rounding, with uneven and even with empty shards.
    assert all(s.shard_difference < 1e-6 for s in scores([8, 64], tasks=3, shards=shards))


def test_gradients_have_heavy_tails_and_families():
    layer = heavy_tailed_gradients(8, (20000,), 0)[0].double().numpy()
    standard = (layer - layer.mean()) / layer.std()
    assert (standard**4).mean() > 10  # 3 for a normal
    cosine = np.corrcoef(layer)
    assert cosine[0, 1:4].mean() > cosine[0, 4:].mean()


def test_the_seed_decides_everything():
    assert scores([8], tasks=4, seed=1) == scores([8], tasks=4, seed=1)
    assert scores([8], tasks=4, seed=1) != scores([8], tasks=4, seed=2)


def test_refused():
    with pytest.raises(ConfigError, match="tasks = 2"):
        scores([8], tasks=2)
