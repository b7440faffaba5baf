"""Attention row by row: against torch's own on each row, and what makes it step back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.support.small_models import CONFIGS, build
from treelora.models.packing import BY_ROW, segment_mask
from treelora.models.row_attention import attend_by_row, attends_by_row, attention, mark_rows

LENGTHS = (5, 1, 9)
MODULE: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)


def states(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 6, 15, 8), (1, 2, 15, 8), (1, 2, 15, 8))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def mask() -> torch.Tensor:
    segments = torch.repeat_interleave(torch.arange(3) + 1, torch.tensor(LENGTHS))[None]
    return segment_mask(segments, torch.float32)


def each_by_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    parts = zip(query.split(LENGTHS, 2), key.split(LENGTHS, 2), value.split(LENGTHS, 2), strict=True)
    outputs = [F.scaled_dot_product_attention(*p, is_causal=True, scale=scale, enable_gqa=True) for p in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_values_and_gradients_are_torchs(scale: float | None) -> None:
    ours, theirs = states(), states()
    found, weights = attention(MODULE, *ours, mark_rows(mask(), LENGTHS), scaling=scale)
    expected = each_by_torch(*theirs, scale)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * pull).sum().backward()
    (expected * pull).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_without_a_mark_the_mask_does_the_same() -> None:
    marked, _ = attention(MODULE, *states(), mark_rows(mask(), LENGTHS))
    unmarked, _ = attention(MODULE, *states(), mask())
    torch.testing.assert_close(marked, unmarked, rtol=1e-5, atol=1e-6)


def test_no_row_sees_another() -> None:
    query, key, value = states()
    before, _ = attention(MODULE, query, key, value, mark_rows(mask(), LENGTHS))
    with torch.no_grad():
        value[:, :, 5:6] += 100.0  # the second row's only token
    after, _ = attention(MODULE, query, key, value, mark_rows(mask(), LENGTHS))
    assert torch.equal(before[:, :5], after[:, :5])
    assert torch.equal(before[:, 6:], after[:, 6:])
    assert not torch.equal(before[:, 5], after[:, 5])


def test_what_it_does_not_know_is_left_to_transformers() -> None:
    query, key, value = states()
    bias = torch.zeros(1, 6, 15, 15).index_fill_(3, torch.tensor([0]), 50.0)  # everyone looks at the first token
    plain, _ = attention(MODULE, query, key, value, mark_rows(mask(), LENGTHS))
    biased, _ = attention(MODULE, query, key, value, mark_rows(mask(), LENGTHS), position_bias=bias)
    assert not torch.allclose(plain[:, 1:5], biased[:, 1:5], atol=0.1)


def test_who_attends_by_row() -> None:
    model = build(CONFIGS["llama"], "sdpa")
    assert not attends_by_row(model, 40)
    attend_by_row(model)
    assert model.config._attn_implementation == BY_ROW
    assert attends_by_row(model, 512)
    assert not attends_by_row(model, 513)  # all its pairs of tokens would be kept
    eager = build(CONFIGS["llama"], "eager")
    attend_by_row(eager)
    assert eager.config._attn_implementation == "eager"


def test_scores_without_rows_are_as_before() -> None:
    plain, ours = build(CONFIGS["llama"], "sdpa"), build(CONFIGS["llama"], "sdpa")
    attend_by_row(ours)
    ids, seen = torch.arange(24).reshape(2, 12), torch.ones(2, 12, dtype=torch.int64)
    seen[0, :5] = 0
    with torch.no_grad():
        assert torch.equal(
            plain(input_ids=ids, attention_mask=seen).logits, ours(input_ids=ids, attention_mask=seen).logits
        )
