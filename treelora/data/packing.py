"""Rows of text laid end to end, so that little of a batch is padding.

Shapes: B rows of text, P rows of the packed batch, L their width, N tokens of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WIDTH = 384
"""Tokens that a packed row is filled up to where no row is longer: wider ones leave less padding, but attention costs
the square of the width."""
WORTH = 0.1
"""Share of padding above which a batch is packed."""
BY_ROW_UP_TO = 512
"""Tokens of the longest row that may attend by itself: it keeps all its pairs of tokens for the backward pass."""
EVERYONES, NOBODYS = 0, -1
"""Segments: one that all others see, such as a prompt, and padding."""


@final
class PackedRows(TypedDict):
    """Rows of text, packed.

    input_ids, position_ids: int64 [P, L]; positions begin at 0 with each row. segments: int64 [P, L], a row's tokens
    have its number from 1, padding has -1. places: int64 [N], the places in the flattened [P * L] whose logits predict
    the answers' tokens. labels: int64 [N], those tokens. dtype: of the mask that the model takes. lengths: of the rows
    from left to right, where all are in one packed row and the model lets each attend by itself; else empty.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    places: Tensor
    labels: Tensor
    dtype: torch.dtype
    lengths: tuple[int, ...]


def pack(
    rows: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
    pad_id: int,
    dtype: torch.dtype,
    width: int = WIDTH,
    by_row: bool = False,
) -> PackedRows | None:
    """Rows of (prompt ids, answer ids), none of them empty, laid end to end; None where it isn't worth it.

    The longest row first, each goes to the packed row that holds least so far (Graham 1969, "longest processing time
    first"). The same rows give the same packing. `by_row`: each row will attend by itself, so all are laid into one
    packed row, without padding.
    """
    pairs = [(np.asarray(prompt, np.int64), np.asarray(answer, np.int64)) for prompt, answer in rows]
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in pairs])
    if by_row:
        width = int(lengths.sum())
    elif lengths.sum() >= (1 - WORTH) * lengths.max() * len(pairs):
        return None
    bins: list[list[int]] = [[] for _ in range(-(-int(lengths.sum()) // max(int(lengths.max()), width)))]
    filled = np.zeros(len(bins), np.int64)
    for row in np.argsort(-lengths, kind="stable"):
        emptiest = int(filled.argmin())
        bins[emptiest].append(int(row))
        filled[emptiest] += lengths[row]
    if not by_row and filled.max() * len(bins) >= lengths.max() * len(pairs):
        return None
    shape = (len(bins), int(filled.max()))
    input_ids_PL, position_ids_PL = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    segments_PL = np.full(shape, NOBODYS, np.int64)
    places: list[npt.NDArray[np.int64]] = []
    for p, held in enumerate(bins):
        start = 0
        for row in held:
            prompt, answer = pairs[row]
            end = start + int(lengths[row])
            input_ids_PL[p, start:end] = np.concatenate([prompt, answer])
            position_ids_PL[p, start:end] = np.arange(end - start)
            segments_PL[p, start:end] = row + 1
            places.append(p * shape[1] + np.arange(end - len(answer), end) - 1)
            start = end
    places_N = np.concatenate(places)
    return PackedRows(
        input_ids=torch.from_numpy(input_ids_PL),
        position_ids=torch.from_numpy(position_ids_PL),
        segments=torch.from_numpy(segments_PL),
        places=torch.from_numpy(places_N),
        labels=torch.from_numpy(input_ids_PL.reshape(-1)[places_N + 1]),
        dtype=dtype,
        lengths=tuple(int(lengths[row]) for row in bins[0]) if by_row else (),
    )
