"""The packaged model of the digits stream: what it has seen, and that it comes out the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from treelora.models import digits_vit
from treelora.models.digits_vit import (
    KNOWN_DIGITS,
    cached_digits_vit,
    known_images,
    moved,
    oriented,
    trained_digits_vit,
)


def test_it_sees_no_digit_of_the_stream() -> None:
    pixels, digits = known_images()
    images, labels = load_digits(return_X_y=True)
    assert set(digits.tolist()) == set(KNOWN_DIGITS) == {0, 1, 2, 3}
    assert len(digits) == int(np.isin(labels, KNOWN_DIGITS).sum()) == 720
    first = images[labels == digits[5].item()]
    assert any(np.allclose(pixels[5].numpy() * 8 + 8, image.reshape(8, 8)) for image in first)
    assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)


def test_orientations_are_classes_of_their_own() -> None:
    image = torch.arange(64.0).reshape(1, 8, 8)
    turned, labels = oriented(image, torch.tensor([2]))
    assert labels.tolist() == [8, 9, 10, 11]
    for turns in range(4):
        assert np.array_equal(turned[turns].numpy(), np.rot90(image[0].numpy(), turns))


def test_moved_images_are_shifted_by_a_pixel_at_most() -> None:
    torch.manual_seed(0)
    image = torch.rand(8, 8)
    padded = torch.full((10, 10), -1.0)
    padded[1:9, 1:9] = image
    windows = {padded[a : a + 8, b : b + 8].numpy().tobytes() for a in range(3) for b in range(3)}
    found = {one.numpy().tobytes() for one in moved(image.expand(200, 8, 8))}
    assert found == windows


def test_training_is_repeatable_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = trained_digits_vit(epochs=1), trained_digits_vit(epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_it_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREELORA_CACHE", str(tmp_path))
    quick = trained_digits_vit(epochs=1)
    made: list[int] = []

    def train() -> torch.nn.Module:
        made.append(1)
        return quick

    monkeypatch.setattr(digits_vit, "trained_digits_vit", train)
    assert cached_digits_vit() == cached_digits_vit() == tmp_path / "digits-vit-1"
    assert made == [1]
    model = digits_vit.digits_vit(6)
    assert model.classifier.out_features == 6  # type: ignore[union-attr]
    assert torch.equal(model.vit.layernorm.weight, quick.vit.layernorm.weight)  # type: ignore[union-attr]
