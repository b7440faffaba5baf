"""The Gaussian router against scikit-learn and scipy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy.stats import multivariate_normal
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from treelora.errors import CheckpointError, ConfigError, DataError
from treelora.evaluation.router import GaussianRouter


def draw_tasks(seed, tasks=4, rows=30, features=6, spread=1.5):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(features, features))
    centres = rng.normal(scale=spread, size=(tasks, features))
    return [centre + rng.normal(size=(rows, features)) @ mixing for centre in centres]


def fitted(tasks, shrinkage=0.1):
    router = GaussianRouter(shrinkage)
    for k, rows in enumerate(tasks):
        router.add_task(f"task {k}", torch.from_numpy(rows))
    return router


@pytest.mark.parametrize("shrinkage", [0.01, 0.1, 0.9, 1.0])
@pytest.mark.parametrize(("rows", "features"), [(30, 6), (10, 40)])
def test_predictions_and_differences_equal_sklearn_on_balanced_tasks(shrinkage, rows, features):
    tasks = draw_tasks(0, rows=rows, features=features)
    labels = np.repeat(np.arange(len(tasks)), rows)
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(np.concatenate(tasks), labels)
    test = np.concatenate(draw_tasks(1, rows=200, features=features))
    router = fitted(tasks, shrinkage)
    indices, margins = router.predict(torch.from_numpy(test))
    np.testing.assert_array_equal(indices.numpy(), lda.predict(test))
    ordered = np.sort(lda.decision_function(test), axis=1)
    np.testing.assert_allclose(margins.numpy(), ordered[:, -1] - ordered[:, -2], rtol=1e-6, atol=1e-8)


def test_unbalanced_tasks_get_equal_priors_and_the_pooled_covariance():
    tasks = [rows[:count] for rows, count in zip(draw_tasks(2), (30, 5, 12, 20), strict=True)]
    pooled = sum((rows - rows.mean(0)).T @ (rows - rows.mean(0)) for rows in tasks) / (30 + 5 + 12 + 20)
    covariance = 0.9 * pooled + 0.1 * np.trace(pooled) / 6 * np.eye(6)
    test = np.concatenate(draw_tasks(3))
    expected = np.stack([multivariate_normal(r.mean(0), covariance).logpdf(test) for r in tasks], axis=1)
    got = fitted(tasks).log_likelihoods(torch.from_numpy(test)).numpy()
    np.testing.assert_allclose(got - got[:, :1], expected - expected[:, :1], rtol=1e-8, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), order=st.permutations(range(4)))
def test_the_order_of_tasks_does_not_matter(seed, order):
    tasks = draw_tasks(seed, rows=12)
    test = torch.from_numpy(np.concatenate(draw_tasks(seed + 1, rows=12)))
    forward, shuffled = fitted(tasks), fitted([tasks[k] for k in order])
    indices, margins = forward.predict(test)
    other_indices, other_margins = shuffled.predict(test)
    np.testing.assert_array_equal(np.array(order)[other_indices.numpy()], indices.numpy())
    torch.testing.assert_close(margins, other_margins, rtol=1e-7, atol=1e-9)


def test_a_far_origin_costs_no_accuracy():
    tasks = draw_tasks(4)
    test = np.concatenate(draw_tasks(5))
    shift = np.full(6, 1e6)
    _, margins = fitted(tasks).predict(torch.from_numpy(test))
    _, moved = fitted([rows + shift for rows in tasks]).predict(torch.from_numpy(test + shift))
    torch.testing.assert_close(margins, moved, rtol=1e-5, atol=1e-5)


def test_one_dimension_by_hand():
    # Means 1 and 5, scatter 2 + 2 over 4 rows: variance 1, which shrinking leaves.
    # At x = 2 the log-likelihoods are -1/2 and -9/2.
    router = fitted([np.array([[0.0], [2.0]]), np.array([[4.0], [6.0]])], shrinkage=0.5)
    indices, margins = router.predict(torch.tensor([[2.0], [3.0], [100.0]]))
    assert indices.tolist() == [0, 0, 1]  # x = 3 is a tie
    torch.testing.assert_close(margins, torch.tensor([4.0, 0.0, 4.0 * 97.0], dtype=torch.float64))


def test_the_runner_up_is_the_second_best():
    tasks = draw_tasks(20, tasks=5)
    router = fitted(tasks)
    test = torch.from_numpy(np.concatenate(draw_tasks(21, tasks=5)))
    routes, scores = router.routes(test), router.log_likelihoods(test).numpy()
    order = np.argsort(-scores, axis=1)
    np.testing.assert_array_equal(routes.best_n, order[:, 0])
    np.testing.assert_array_equal(routes.second_n, order[:, 1])
    ordered = np.take_along_axis(scores, order, axis=1)
    np.testing.assert_array_equal(routes.margin_n, ordered[:, 0] - ordered[:, 1])


def test_a_tie_leaves_the_later_task_as_runner_up():
    rows = draw_tasks(22)[0]
    routes = fitted([rows, rows, rows + 100.0]).routes(torch.from_numpy(rows))
    assert (set(routes.best_n), set(routes.second_n), set(routes.margin_n)) == ({0}, {1}, {0.0})
    alone = fitted([rows]).routes(torch.from_numpy(rows[:2]))
    assert (alone.best_n.tolist(), alone.second_n.tolist(), alone.margin_n.tolist()) == ([0, 0], [-1, -1], [np.inf] * 2)


def test_adding_a_task_updates_earlier_predictions():
    tasks = draw_tasks(6, spread=20.0)
    router = fitted(tasks[:2])
    third = torch.from_numpy(tasks[2])
    assert set(router.predict(third)[0].tolist()) <= {0, 1}
    router.add_task("third", third)
    assert router.predict(third)[0].tolist() == [2] * 30
    assert router.names == ["task 0", "task 1", "third"]


def test_one_task_is_certain():
    indices, margins = fitted(draw_tasks(7)[:1]).predict(torch.randn(3, 6))
    assert indices.tolist() == [0, 0, 0]
    assert torch.isinf(margins).all()


def test_identical_rows_fall_back_to_the_nearest_mean():
    router = fitted([np.tile([0.0, 0.0], (5, 1)), np.tile([2.0, 0.0], (5, 1))])
    indices, margins = router.predict(torch.tensor([[0.5, 3.0], [1.5, -3.0]]))
    assert indices.tolist() == [0, 1]
    torch.testing.assert_close(margins, torch.full((2,), (1.5**2 - 0.5**2) / 2, dtype=torch.float64))


def test_a_single_row_per_task_is_enough():
    router = fitted([np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])])
    assert router.predict(torch.tensor([[0.1, 0.9], [0.9, 0.1]]))[0].tolist() == [0, 1]


def test_identical_tasks_tie_to_the_first():
    rows = draw_tasks(8)[0]
    indices, margins = fitted([rows, rows]).predict(torch.from_numpy(rows))
    assert indices.tolist() == [0] * 30
    assert margins.tolist() == [0.0] * 30


def test_state_survives_safetensors_bit_for_bit():
    router = GaussianRouter(0.3)
    names = ["plain", "Ünïcödé 任务", 'quote" and \n line']
    for name, rows in zip(names, draw_tasks(9), strict=False):
        router.add_task(name, torch.from_numpy(rows).float())
    again = GaussianRouter.from_state_dict(load(save(router.state_dict())))
    assert again.names == names
    assert again.shrinkage == 0.3
    test = torch.from_numpy(np.concatenate(draw_tasks(10)))
    assert torch.equal(again.log_likelihoods(test), router.log_likelihoods(test))
    extra = torch.from_numpy(draw_tasks(11)[0])
    router.add_task("more", extra)
    again.add_task("more", extra)
    assert torch.equal(again.log_likelihoods(test), router.log_likelihoods(test))


def test_an_empty_router_survives_too():
    again = GaussianRouter.from_state_dict(load(save(GaussianRouter().state_dict())))
    assert again.names == []
    again.add_task("a", torch.ones(2, 3))
    assert again.predict(torch.ones(1, 3))[0].tolist() == [0]


def test_damaged_states_are_refused():
    state = fitted(draw_tasks(12)).state_dict()
    with pytest.raises(CheckpointError, match="lacks \\['scatter'\\]"):
        GaussianRouter.from_state_dict({k: v for k, v in state.items() if k != "scatter"})
    with pytest.raises(CheckpointError, match="damaged"):
        GaussianRouter.from_state_dict({**state, "means": state["means"][:2]})
    with pytest.raises(CheckpointError, match="names"):
        GaussianRouter.from_state_dict({**state, "names": state["names"][:-3]})


@pytest.mark.parametrize("shrinkage", [0.0, -0.1, 1.1, float("nan")])
def test_shrinkage_must_be_a_share(shrinkage):
    with pytest.raises(ConfigError, match="shrinkage"):
        GaussianRouter(shrinkage)


def test_bad_features_are_refused_and_change_nothing():
    router = fitted(draw_tasks(13))
    before = router.state_dict()
    bad = torch.zeros(4, 6)
    bad[2, 1] = torch.nan
    cases = [
        ("new", bad, "row 2"),
        ("new", torch.full((1, 6), torch.inf), "row 0"),
        ("new", torch.zeros(4, 5), "5 features"),
        ("new", torch.zeros(6), "shape \\(6,\\)"),
        ("new", torch.zeros(0, 6), "no feature rows"),
        ("task 1", torch.zeros(4, 6), "already knows task 'task 1'"),
    ]
    for name, features, message in cases:
        with pytest.raises(DataError, match=message):
            router.add_task(name, features)
    with pytest.raises(DataError, match="row 2"):
        router.predict(bad)
    assert all(torch.equal(before[key], value) for key, value in router.state_dict().items())
    with pytest.raises(DataError, match="no task yet"):
        GaussianRouter().predict(torch.zeros(1, 6))
