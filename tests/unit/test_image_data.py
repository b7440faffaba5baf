"""Classes of a stream as places of one head, and batches of pixels, against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora.data.batches import row_draws
from treelora.errors import ConfigError
from treelora.image_data import ImageCollator, StreamClasses, stored_side, training_candidates
from treelora.models.vision import ImageFormat

CPU = torch.device("cpu")
CLASSES = StreamClasses((("cat", "dog"), ("owl", "cat"), ("fox",)), "class_incremental")
DISJOINT = StreamClasses((("a", "b"), ("c", "d"), ("e", "f")), "class_incremental")
FORM = ImageFormat(4, 4, 3, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))


def collator(form: ImageFormat = FORM, **changes: Any) -> ImageCollator:
    everything = np.ones((3, 6), np.bool_)
    return replace(ImageCollator(form, torch.float32, everything), **changes)


def image(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_places_follow_the_order_of_arrival() -> None:
    assert CLASSES.names == ("cat", "dog", "owl", "fox")
    assert [CLASSES.places(task).tolist() for task in range(3)] == [[0, 1], [2, 0], [3]]
    assert CLASSES.candidates([1]).tolist() == [True, False, True, False]


def test_what_a_row_may_be_taken_for() -> None:
    told = StreamClasses(DISJOINT.tasks, "task_incremental")
    assert DISJOINT.answerable(0, [0, 1]).tolist() == [True] * 4 + [False] * 2
    assert DISJOINT.answerable(2, [0]).tolist() == [True, True, False, False, True, True]
    assert told.answerable(1, [0, 1, 2]).tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize(
    ("mask", "joint", "unit", "rows"),
    [
        ("local", False, 1, ["110000", "001100", "000011"]),
        ("seen", False, 1, ["111100", "111100", "111111"]),
        ("seen", False, 0, ["110000", "111100", "110011"]),
        ("local", True, 0, ["111111", "111111", "111111"]),
    ],
)
def test_what_training_tells_apart(mask: Any, joint: bool, unit: int, rows: list[str]) -> None:
    found = training_candidates(DISJOINT, unit, mask, joint)
    assert ["".join("01"[int(cell)] for cell in row) for row in found] == rows


def test_protocols_do_not_mix() -> None:
    class One:
        def __init__(self, protocol: str):
            self.protocol, self.choices = protocol, ("a", "b")

    tasks: Any = [One("class_incremental"), One("domain_incremental")]
    with pytest.raises(ConfigError, match="mixes class_incremental, domain_incremental"):
        StreamClasses.of(tasks)


def test_pixels_of_the_models_size_are_normalised() -> None:
    stored = image(0, 4, 4)
    [found] = collator().pixels([stored], CPU)
    for channel, (mean, std) in enumerate(zip(FORM.mean, FORM.std, strict=True)):
        np.testing.assert_allclose(found[channel].numpy(), (stored[:, :, channel] / 255 - mean) / std, atol=1e-6)


def test_grey_is_the_mean_of_the_channels() -> None:
    stored = image(1, 4, 4)
    [found] = collator(ImageFormat(4, 4, 1, (0.5,), (0.5,))).pixels([stored], CPU)
    np.testing.assert_allclose(found[0].numpy(), stored.mean(axis=2) / 127.5 - 1, atol=1e-6)


def test_larger_images_show_their_centre_and_smaller_ones_are_enlarged() -> None:
    form = ImageFormat(4, 4, 3, (0.0,) * 3, (1.0,) * 3)
    large, flat = image(2, 8, 6), np.full((2, 2, 3), 51, np.uint8)
    found = collator(form).pixels([large, flat, large], CPU)
    expected = torch.from_numpy(large[2:6, 1:5].astype(np.float32)).permute(2, 0, 1) / 255
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[2], expected)
    torch.testing.assert_close(found[1], torch.full((3, 4, 4), 0.2))


def test_a_batch_has_places_candidates_and_labels() -> None:
    candidates = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], np.bool_)
    batch = collator(candidates=candidates)([(image(0, 4, 4), 3, 1), (image(1, 4, 4), 0, 0)], CPU, None)
    assert batch["labels"].tolist() == [[3], [0]]
    assert batch["candidates"].tolist() == [[False, False, True, True], [True, True, False, False]]
    assert batch["pixel_values"].shape == (2, 3, 4, 4)


def test_windows_by_hand() -> None:
    """A quarter of a square image, kept square, at its lower left, mirrored."""
    draws = np.array([[0.0, 0.5, 0.0, 1.0, 0.0]])
    [[across, down]] = collator(crop_area=0.25, flip=True).windows(draws, 8, 8).tolist()
    assert across == pytest.approx([-0.5, 0, -0.5])
    assert down == pytest.approx([0, 0.5, 0.5])
    [[whole, high]] = collator(flip=True).windows(np.array([[0.3, 0.1, 0.9, 0.2, 0.7]]), 8, 8).tolist()
    assert (whole, high) == ([1, 0, 0], [0, 1, 0])


def test_a_cut_is_what_slicing_gives() -> None:
    """A window of 4 x 4 pixels needs no interpolation; a mirrored whole neither."""
    form = ImageFormat(4, 4, 3, (0.0,) * 3, (1.0,) * 3)
    stored = image(3, 8, 8)
    square = np.array([[0.0, 0.5, 0.0, 1.0, 0.9]])
    found = collator(form, crop_area=0.25, flip=True).pixels([stored], CPU, square)
    torch.testing.assert_close(found[0], torch.from_numpy(stored[4:, :4] / np.float32(255)).permute(2, 0, 1))
    same = image(4, 4, 4)
    mirrored = collator(form, flip=True).pixels([same], CPU, np.array([[0.0, 0.5, 0.0, 0.0, 0.1]]))
    torch.testing.assert_close(mirrored[0], torch.from_numpy(same[:, ::-1] / np.float32(255)).permute(2, 0, 1))


@given(seed=st.integers(0, 2**32), area=st.floats(0.05, 1.0), height=st.integers(2, 40), width=st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_windows_stay_within_the_image(seed: int, area: float, height: int, width: int) -> None:
    draws = row_draws(seed, 1, 2, range(16), 5)
    theta = collator(crop_area=area, flip=True).windows(draws, height, width)
    reach = np.abs(theta[:, [0, 1], [0, 1]]) + np.abs(theta[:, :, 2])
    assert reach.max() <= 1 + 1e-6
    assert np.abs(theta[:, 0, 0] * theta[:, 1, 1]).max() <= 1 + 1e-6


def test_draws_belong_to_row_and_step() -> None:
    first = row_draws(7, 1, 3, [5, 9, 5], 4)
    assert first.shape == (3, 4)
    assert np.array_equal(first[0], first[2])
    assert np.array_equal(row_draws(7, 1, 3, [9], 4)[0], first[1])
    others = [row_draws(8, 1, 3, [5], 4), row_draws(7, 2, 3, [5], 4), row_draws(7, 1, 4, [5], 4)]
    assert all(not np.array_equal(other[0], first[0]) for other in others)
    many = row_draws(0, 0, 0, range(4000), 2)
    assert abs(many.mean() - 0.5) < 0.01
    assert 0 <= many.min() < 0.001
    assert 0.999 < many.max() < 1


@pytest.mark.parametrize(("size", "side"), [(224, 256), (8, 10), (32, 37)])
def test_stored_images_are_a_seventh_larger(size: int, side: int) -> None:
    assert stored_side(ImageFormat(size, size, 3, (0.5,) * 3, (0.5,) * 3)) == side
