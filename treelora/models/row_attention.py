"""Attention for rows laid end to end in one packed row, each by itself, on a CPU.

Under a mask, attention computes every pair of tokens of the packed row and throws away those of different rows; and
the backward pass of torch's fused kernel is slow on CPUs (benchmarks/row_attention.py). Here each row attends to
itself, by plain matrix products.

Shapes: H query heads, G key heads, r = H / G, L tokens of the packed row, T of one row, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from treelora.data.packing import BY_ROW_UP_TO
from treelora.models.packing import BY_ROW, base_model

UNKNOWN = ("softcap", "position_bias", "s_aux", "past_key_values")
"""Arguments that change what attention is; transformers' own then takes over, with the mask."""


def mark_rows(mask: Tensor, lengths: Sequence[int]) -> Tensor:
    """Let a mask [1, 1, L, L] say of which rows it is the mask, from left to right.

    The mask stays right by itself, so that whatever drops the mark loses time only.
    """
    mask.row_lengths = tuple(lengths)  # type: ignore[attr-defined]
    return mask


def attend_by_row(model: Any) -> None:
    """Make a model of transformers attend row by row where a mask is marked.

    Nothing happens where it wouldn't use SDPA, or doesn't take its attention from transformers' registry.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        AttentionInterface.register(BY_ROW, attention)
        AttentionMaskInterface.register(BY_ROW, sdpa_mask)
        model.set_attn_implementation(BY_ROW)


def attends_by_row(model: nn.Module, longest: int) -> bool:
    """Whether rows of up to `longest` tokens should attend each by itself: on a CPU, where the model can."""
    base = base_model(model)
    by_row = base.config._attn_implementation == BY_ROW
    return by_row and base.device.type == "cpu" and longest <= BY_ROW_UP_TO


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """As `transformers.AttentionInterface` wants it: query [B, H, L, D], key and value [B, G, L, D] to [B, L, H, D].

    SDPA with the mask, unless the mask is marked.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lengths: tuple[int, ...] | None = getattr(attention_mask, "row_lengths", None)
    if not lengths or dropout or any(other.get(name) is not None for name in UNKNOWN):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **other
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal_TT = torch.full((max(lengths),) * 2, -torch.inf, device=query.device).triu(1)
    queries, keys, values = (states[0].split(lengths, dim=1) for states in (query, key, value))
    rows = zip(queries, keys, values, strict=True)
    outputs = [_one_row(*row, causal_TT=causal_TT, scale=scale) for row in rows]
    return torch.cat(outputs, dim=1).transpose(0, 1)[None].contiguous(), None


def _one_row(query_HTD: Tensor, key_GTD: Tensor, value_GTD: Tensor, causal_TT: Tensor, scale: float) -> Tensor:
    heads, tokens, size = query_HTD.shape
    groups = len(key_GTD)
    # query heads of one key head stand below each other, so that keys needn't be repeated
    scores = torch.bmm(query_HTD.reshape(groups, -1, size), key_GTD.transpose(1, 2))
    scores_HTT = torch.add(causal_TT[:tokens, :tokens], scores.view(heads, tokens, tokens), alpha=scale)
    shares_HTT = torch.softmax(scores_HTT, dim=-1).to(query_HTD.dtype)
    return torch.bmm(shares_HTT.view(groups, -1, tokens), value_GTD).view(heads, tokens, size)
