"""What is kept of the frozen model: computed once, told apart by content, made again where damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from treelora.adapters import LoraSpec, adapter_parameters, attach_lora
from treelora.evaluation.frozen_cache import FrozenCache, frozen_fingerprint
from treelora.models.tiny import tiny_model

FEATURES = torch.tensor([[0.1, -2.0, 3.5], [1e-30, 7.0, -0.0]])


class Counted:
    """Computes the same each time, and counts."""

    def __init__(self, result):
        self.result, self.calls = result, 0

    def __call__(self):
        self.calls += 1
        return self.result


@pytest.fixture
def cache(tmp_path: Path) -> FrozenCache:
    return FrozenCache(tmp_path / "frozen", tiny_model())


def test_computed_once_and_the_same_to_the_bit(cache: FrozenCache, tmp_path: Path) -> None:
    compute = Counted(FEATURES)
    first = cache.features([8, [[1, 2], [3]]], compute)
    later = FrozenCache(tmp_path / "frozen", tiny_model()).features([8, [[1, 2], [3]]], compute)
    assert torch.equal(first, FEATURES)
    assert torch.equal(later, FEATURES)
    assert later.dtype == torch.float32
    assert compute.calls == 1


@pytest.mark.parametrize("asked", [[7, [[1, 2], [3]]], [8, [[1, 2, 3]]], [8, [[1, 2], [4]]]])
def test_other_rows_and_layers_are_others(cache: FrozenCache, asked) -> None:
    cache.features([8, [[1, 2], [3]]], Counted(FEATURES))
    other = Counted(FEATURES + 1)
    assert torch.equal(cache.features(asked, other), FEATURES + 1)
    assert other.calls == 1


def test_answers(cache: FrozenCache) -> None:
    compute = Counted(["yes", "", "très bien"])
    assert cache.answers([[1]], compute) == cache.answers([[1]], compute) == ["yes", "", "très bien"]
    assert compute.calls == 1


def test_a_damaged_file_is_made_again(cache: FrozenCache, tmp_path: Path) -> None:
    compute = Counted(FEATURES)
    cache.features([1], compute)
    [path] = (tmp_path / "frozen").iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.equal(cache.features([1], compute), FEATURES)
    assert compute.calls == 2


def test_models_are_told_by_their_frozen_weights() -> None:
    plain, other = tiny_model(0), tiny_model(1)
    assert frozen_fingerprint(plain) == frozen_fingerprint(tiny_model(0)) != frozen_fingerprint(other)
    adapted = attach_lora(tiny_model(0), LoraSpec(rank=2), seed=0)
    before = frozen_fingerprint(adapted)
    for parameter in adapter_parameters(adapted).values():
        parameter.data += 1
    assert frozen_fingerprint(adapted) == before  # what is trained says nothing about the base
