"""Head alignment: Gaussians that are the classes', draws that follow them, and a head that tells all classes apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from treelora.alignment import RIDGE, HeadAlignment
from treelora.options.vision import VisionOptions

FEATURES = 5


def classes(seed: int, places: list[int], rows: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    spread = rng.normal(size=(FEATURES, FEATURES)) / 2
    means = rng.normal(size=(len(places), FEATURES)) * 3
    x = np.concatenate([mean + rng.normal(size=(rows, FEATURES)) @ spread for mean in means])
    return torch.from_numpy(x).float(), torch.tensor(places).repeat_interleave(rows)


def learnt(**options: float) -> tuple[HeadAlignment, list[tuple[torch.Tensor, torch.Tensor]]]:
    alignment = HeadAlignment(VisionOptions(**options), seed=3)  # type: ignore[arg-type]
    data = [classes(1, [0, 1]), classes(2, [2, 3])]
    for task, (x, y) in enumerate(data):
        alignment.learn_task(task, x, y)
    return alignment, data


def test_draws_have_the_classes_moments() -> None:
    alignment, data = learnt()
    x, y = alignment.draw(20_000, torch.Generator().manual_seed(0))
    assert y.bincount().tolist() == [20_000] * 4
    for task, (own, labels) in enumerate(data):
        within = np.cov(
            np.concatenate([own[labels == c] - own[labels == c].mean(0) for c in labels.unique()]).T, ddof=0
        )
        for place in (2 * task, 2 * task + 1):
            drawn = x[y == place].numpy()
            np.testing.assert_allclose(drawn.mean(0), own[labels == place].mean(0).numpy(), atol=0.06)
            np.testing.assert_allclose(np.cov(drawn.T), within + RIDGE * np.eye(FEATURES), atol=0.15)


def test_an_aligned_head_is_about_as_good_as_linear_discriminants() -> None:
    """Tasks that were learnt apart give a head that can't rank them; the drawn features tell what all rows would."""
    alignment, data = learnt(align_epochs=30, align_learning_rate=0.05)
    x, y = torch.cat([own for own, _ in data]), torch.cat([labels for _, labels in data])
    head = {"weight": torch.zeros(6, FEATURES), "bias": torch.tensor([0.0, 0, 9, 9, 0, 0])}
    assert float(((x @ head["weight"].T + head["bias"]).argmax(1) == y).float().mean()) <= 0.5
    aligned = alignment.aligned(head, 1)
    right = float(((x @ aligned["weight"].T + aligned["bias"])[:, :4].argmax(1) == y).float().mean())
    assert right > LinearDiscriminantAnalysis().fit(x, y).score(x, y) - 0.02
    assert torch.equal(aligned["weight"][4:], head["weight"][4:])  # classes to come
    assert torch.equal(aligned["bias"][4:], head["bias"][4:])


def test_the_same_state_gives_the_same_head() -> None:
    alignment, _ = learnt(align_epochs=2)
    head = {"weight": torch.ones(4, FEATURES)}
    again = HeadAlignment(alignment.options, seed=3)
    again.load_state_dict(alignment.state_dict())
    torch.manual_seed(99)  # no global random number takes part
    assert torch.equal(alignment.aligned(head, 1)["weight"], again.aligned(head, 1)["weight"])
    assert not torch.equal(alignment.aligned(head, 1)["weight"], alignment.aligned(head, 0)["weight"])
    assert sorted(alignment.state_dict()) == ["factor/0", "factor/1", "mean/0/0", "mean/0/1", "mean/1/2", "mean/1/3"]


@pytest.mark.parametrize("rows", [1, 2])
def test_fewer_rows_than_features(rows: int) -> None:
    alignment = HeadAlignment(VisionOptions())
    x, y = classes(4, [0, 1], rows)
    alignment.learn_task(0, x, y)
    drawn, _ = alignment.draw(8, torch.Generator().manual_seed(0))
    assert torch.isfinite(drawn).all()
