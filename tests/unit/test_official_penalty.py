"""The released code's accumulator, penalty and schedule, against hand-worked numbers and autograd."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from treelora.errors import CheckpointError, ConfigError
from treelora.official import Accumulator, epoch_place, official_penalty, ramp, stack_values, within_depth


def values_of(*shape, key):
    return torch.from_numpy(np.random.default_rng(key).normal(size=shape))


def test_accumulator_adds_once_a_layer():
    accumulator = Accumulator()
    accumulator.begin_epoch(4)
    # 2 layers, R = 4: each call adds 2 * 3 / 4
    assert [accumulator.add(torch.full((2, 1), 3.0))[0, 0].item() for _ in range(4)] == [1.5, 3.0, 4.5, 6.0]
    accumulator.begin_epoch(2)
    torch.testing.assert_close(accumulator.add(torch.tensor([[1.0], [5.0]])), torch.tensor([[1.0], [5.0]]))


def test_accumulator_stalls_in_bfloat16():
    exact, stalled = Accumulator(), Accumulator(torch.bfloat16)
    values = torch.ones(32, 1)
    for accumulator in (exact, stalled):
        accumulator.begin_epoch(128)
        sums = [accumulator.add(values)[0, 0].item() for _ in range(128)]
    assert exact.sum_LD[0, 0].item() == 32.0
    # 1/128 is half a unit in the last place of 2 (8 significant bits), and ties go to even: 8 calls of 32 additions
    assert sums[6:9] == [1.75, 2.0, 2.0]
    assert sums[-1] == 2.0


def test_accumulator_goes_on_where_it_was_saved():
    for dtype in (torch.float32, torch.bfloat16):
        accumulator, other = Accumulator(dtype), Accumulator(dtype)
        accumulator.begin_epoch(3)
        other.load_state_dict(accumulator.state_dict())
        assert other.sum_LD is None
        accumulator.add(values_of(3, 5, key=1))
        other.load_state_dict(accumulator.state_dict())
        values = values_of(3, 5, key=2)
        assert torch.equal(accumulator.add(values), other.add(values))
    with pytest.raises(CheckpointError, match="calls"):
        other.load_state_dict({"sum": np.zeros((2, 2))})


def test_penalty_by_hand():
    # Q = 1*3 + 2*4 = 11; w = .5 * 2 / 4 = .25; gradient -.25 * 2 * c / 11 = -.5 c / 11; value -.5
    values, anchors = [torch.tensor([1.0]), torch.tensor([2.0])], [torch.tensor([3.0]), torch.tensor([4.0])]
    value, gradients = official_penalty(values, anchors, 2.0, ramp(0.5, 2, 4))
    torch.testing.assert_close(torch.cat(gradients), torch.tensor([-1.5 / 11, -2.0 / 11]), rtol=1e-5, atol=0)
    assert value.item() == pytest.approx(-0.5, rel=1e-5)
    # The same direction for -c: where Q is negative, A is driven away from c.
    _, opposite = official_penalty(values, [-anchor for anchor in anchors], 2.0, ramp(0.5, 2, 4))
    torch.testing.assert_close(torch.cat(opposite), torch.cat(gradients), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_penalty_equals_autograd_on_the_self_normalised_expression(sign):
    shapes = [(2, 3), (2, 5)]
    values = [values_of(*shape, key=i).requires_grad_() for i, shape in enumerate(shapes)]
    anchors = [sign * (value.detach() + 0.1) for value in values]
    data = sum((value**2).sum() for value in values)
    minus_q = -sum((value * anchor).sum() for value, anchor in zip(values, anchors, strict=True))
    subtracted = minus_q / (minus_q.detach() + 1e-5) * data.detach() * ramp(0.7, 3, 8)
    with_penalty = torch.autograd.grad(data - subtracted, values, retain_graph=True)
    without = torch.autograd.grad(data, values)
    flat = [anchor.reshape(-1) for anchor in anchors]  # rows of c do as well
    value, gradients = official_penalty(values, flat, data, ramp(0.7, 3, 8))
    assert value.item() == pytest.approx(-subtracted.item(), rel=1e-12)
    for gradient, a, b in zip(gradients, with_penalty, without, strict=True):
        torch.testing.assert_close(gradient, a - b, rtol=1e-10, atol=1e-12)
    assert not value.requires_grad


def test_ramp_and_places_of_epochs():
    assert [ramp(0.5, call, 5) for call in range(5)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert [epoch_place(step, 7, 2) for step in range(1, 8)] == [(0, 4), (1, 4), (2, 4), (3, 4), (0, 3), (1, 3), (2, 3)]
    for steps, epochs in [(1, 1), (10, 3), (11, 11), (38, 5)]:
        places = [epoch_place(step, steps, epochs) for step in range(1, steps + 1)]
        assert sum(call == 0 for call, _ in places) == epochs
        assert all(b[0] == (a[0] + 1) % a[1] for a, b in pairwise(places))
        assert places[-1][0] == places[-1][1] - 1
    with pytest.raises(ConfigError, match="epochs = 4 of 3 steps"):
        epoch_place(1, 3, 4)


def test_depth_counts_modules_in_model_order():
    layers = ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]
    assert within_depth(layers, 3) == layers[:3]
    assert within_depth(layers, -1) == within_depth(layers, 0) == within_depth(layers, 9) == layers


def test_layers_are_stacked_flat():
    assert stack_values([torch.zeros(2, 3), torch.ones(2, 3)]).tolist() == [[0] * 6, [1] * 6]
    with pytest.raises(ConfigError, match=r"\[6, 8\]"):
        stack_values([torch.zeros(2, 3), torch.zeros(2, 4)])
