"""Label likelihood: how probable a causal LM finds each answer choice of each prompt.

A row's choices share its prompt, so the prompt is run once: one sequence holds the prompt and, behind it,
every choice, under an attention mask that shows a choice the prompt and itself only, at positions that start
again at the prompt's end. The last token of a choice predicts nothing that is scored and is left out.

Shapes: B rows of a batch, C choices of a row, T padded length, K trailing positions with logits, V
    vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from treelora.data.packing import EVERYONES, NOBODYS
from treelora.errors import ConfigError, DataError
from treelora.evaluation.batching import (
    batches_by_length,
    check_prompts,
    evaluating,
    model_device,
    pad,
)
from treelora.models.packing import base_model, mask_dtype, segment_mask, supports_packing

Tokens = Sequence[int]
Method = Literal["packed", "naive"]
# (row, choice, logit positions [len], token ids [len]) of one choice in a batch.
Scored = tuple[int, int, list[int], Tokens]


def score_choices(
    model: nn.Module,
    prompts: Sequence[Tokens],
    choices: Sequence[Sequence[Tokens]],
    *,
    pad_id: int,
    batch_rows: int = 8,
    device: torch.device | str | None = None,
    method: Method = "packed",
) -> list[np.ndarray]:
    """Mean log-probability per token (nats) of every choice, over all tokens of its label string.

    Args:
        model: causal LM of transformers, plain or wrapped by peft; its training flags are restored.
        prompts: token ids of each row's prompt, at least one token.
        choices: token ids of each row's choices; rows may have different choices.
        pad_id: any valid token id; padding is masked.
        batch_rows: rows in a forward. There are exactly ceil(len(prompts) / batch_rows) forwards with either
            method, whatever the rows hold.
        device: where the inputs go (default: where the model's first parameter is).
        method: "packed" runs each prompt once; "naive" runs one sequence a (row, choice). Packed falls back
            to naive where the model can't take such a mask (`supports_packing`). Both give the same scores.

    Returns:
        For each row, in input order, float32 [C]. The predicted choice is its argmax.

    Raises:
        DataError: an empty prompt, a row without choices, a choice without tokens, or lists of unequal
            length.
        ConfigError: an unknown method or batch_rows below 1.
    """
    if method not in ("packed", "naive"):
        raise ConfigError(f"method is {method!r}; choose 'packed' or 'naive'")
    _check(prompts, choices)
    target = model_device(model, device)
    scores = [np.zeros(len(row_choices), dtype=np.float32) for row_choices in choices]
    lengths = [
        len(prompt) + sum(len(choice) - 1 for choice in row) for prompt, row in zip(prompts, choices, strict=True)
    ]
    with evaluating(model):
        for rows in batches_by_length(lengths, batch_rows):
            longest = max(len(prompts[i]) + max(len(c) for c in choices[i]) - 1 for i in rows)
            packed = method == "packed" and supports_packing(model, longest)
            run = _packed_batch if packed else _naive_batch
            logits_BKV, scored = run(model, [prompts[i] for i in rows], [choices[i] for i in rows], pad_id, target)
            for (b, c, _, tokens), value in zip(scored, _mean_log_probs(logits_BKV, scored, packed), strict=True):
                if not np.isfinite(value):
                    raise DataError(
                        f"row {rows[b]}, choice {c} ({len(tokens)} tokens): its log-probability is {value}; "
                        "the model's weights or logits are not finite"
                    )
                scores[rows[b]][c] = value
    return scores


def _check(prompts: Sequence[Tokens], choices: Sequence[Sequence[Tokens]]) -> None:
    if len(prompts) != len(choices):
        raise DataError(f"{len(prompts)} prompts but {len(choices)} lists of choices; give one list a prompt")
    check_prompts(prompts)
    for i, row in enumerate(choices):
        if len(row) == 0:
            raise DataError(f"row {i} has no choices; give at least one")
        for c, choice in enumerate(row):
            if len(choice) == 0:
                raise DataError(f"row {i}: choice {c} has no tokens; every label needs at least one")


def _packed_batch(
    model: nn.Module,
    prompts: list[Tokens],
    choices: list[Sequence[Tokens]],
    pad_id: int,
    device: torch.device,
) -> tuple[Tensor, list[Scored]]:
    """One forward over [prompt, choice 0, choice 1, ...] rows that end together at the right edge."""
    tails = [sum(len(choice) - 1 for choice in row) for row in choices]
    width = max(len(prompt) + tail for prompt, tail in zip(prompts, tails, strict=True))
    keep = 1 + max(tails)
    ids_BT = np.full((len(prompts), width), pad_id, dtype=np.int64)
    positions_BT = np.zeros_like(ids_BT)
    segments_BT = np.full_like(ids_BT, NOBODYS)
    scored: list[Scored] = []
    for b, (prompt, row) in enumerate(zip(prompts, choices, strict=True)):
        at = width - tails[b]
        start, last = at - len(prompt), at - 1
        ids_BT[b, start:at] = prompt
        positions_BT[b, start:at] = np.arange(len(prompt))
        segments_BT[b, start:at] = EVERYONES
        for c, choice in enumerate(row):
            end = at + len(choice) - 1
            ids_BT[b, at:end] = choice[:-1]
            positions_BT[b, at:end] = len(prompt) + np.arange(end - at)
            segments_BT[b, at:end] = c + 1
            offset = width - keep
            scored.append((b, c, [last - offset, *range(at - offset, end - offset)], choice))
            at = end
    segments = torch.from_numpy(segments_BT).to(device)
    logits_BKV = _trailing_logits(
        model,
        keep,
        input_ids=torch.from_numpy(ids_BT).to(device),
        attention_mask=segment_mask(segments, mask_dtype(model)),
        position_ids=torch.from_numpy(positions_BT).to(device),
    )
    return logits_BKV, scored


def _naive_batch(
    model: nn.Module,
    prompts: list[Tokens],
    choices: list[Sequence[Tokens]],
    pad_id: int,
    device: torch.device,
) -> tuple[Tensor, list[Scored]]:
    """One forward over a right-padded sequence for each (row, choice) of the batch."""
    pairs = [(b, c) for b, row in enumerate(choices) for c in range(len(row))]
    sequences = [[*prompts[b], *choices[b][c][:-1]] for b, c in pairs]
    keep = max(map(len, sequences)) - min(map(len, prompts)) + 1
    offset = max(map(len, sequences)) - keep
    scored: list[Scored] = []
    for (b, c), sequence in zip(pairs, sequences, strict=True):
        first = len(prompts[b]) - 1
        scored.append((b, c, [k - offset for k in range(first, len(sequence))], choices[b][c]))
    ids_BT, mask_BT = pad(sequences, pad_id, device)
    return _trailing_logits(model, keep, input_ids=ids_BT, attention_mask=mask_BT), scored


def _trailing_logits(model: nn.Module, keep: int, **inputs: Tensor) -> Tensor:
    """Logits [B, keep, V] of the last positions; the language-model head runs on those alone where it can."""
    parameters = inspect.signature(base_model(model).forward).parameters
    extra = {"logits_to_keep": keep} if "logits_to_keep" in parameters else {}
    return model(**inputs, use_cache=False, **extra).logits[:, -keep:]


def _mean_log_probs(logits: Tensor, scored: list[Scored], packed: bool) -> list[float]:
    """Mean log-probability of each scored choice; the softmax is in float32 whatever the model computes
    in."""
    row_of = [b for b, _, _, _ in scored] if packed else list(range(len(scored)))
    rows = [row for row, (_, _, positions, _) in zip(row_of, scored, strict=True) for _ in positions]
    columns = [position for _, _, positions, _ in scored for position in positions]
    tokens = torch.as_tensor([t for _, _, _, tokens in scored for t in tokens], device=logits.device)
    picked_MV = logits[rows, columns].float()
    log_probs_M = picked_MV.gather(1, tokens[:, None].long())[:, 0] - picked_MV.logsumexp(dim=1)
    lengths = [len(tokens) for _, _, _, tokens in scored]
    return [float(part.mean()) for part in log_probs_M.cpu().split(lengths)]
