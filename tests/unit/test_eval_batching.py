"""Batches, padding and the evaluation context."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treelora.errors import ConfigError
from treelora.evaluation.batching import batches_by_length, evaluating, pad

CPU = torch.device("cpu")


def test_batches_by_hand():
    assert batches_by_length([3, 9, 5, 9, 1], 2) == [[1, 3], [2, 0], [4]]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 9))
def test_batches_hold_each_row_once_longest_first(lengths, batch_rows):
    batches = batches_by_length(lengths, batch_rows)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert len(batches) == -(-len(lengths) // batch_rows)


def test_a_batch_needs_a_row():
    with pytest.raises(ConfigError, match="batch_rows is 0"):
        batches_by_length([1], 0)


def test_padding_by_hand():
    ids, mask = pad([[7, 8, 9], [5]], 0, CPU)
    assert ids.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = pad([[7, 8, 9], [5]], 2, CPU, side="left")
    assert ids.tolist() == [[7, 8, 9], [2, 2, 5]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_evaluating_restores_modes_and_gradients_after_an_error():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1)).train()
    model[1].eval()

    def fail():
        with evaluating(model):
            raise KeyError([torch.is_grad_enabled(), *(module.training for module in model.modules())])

    with pytest.raises(KeyError) as seen:
        fail()
    assert seen.value.args[0] == [False] * 4
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, True, False]


def test_nothing_computed_under_evaluation_is_an_inference_tensor():
    # ZeRO-3 keeps some of what it gathers in there for the next training step.
    with evaluating(torch.nn.Linear(1, 1)):
        assert not torch.ones(1).is_inference()
