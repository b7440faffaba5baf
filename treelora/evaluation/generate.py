"""Greedy answers of a causal LM to tokenised prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from treelora.errors import ConfigError
from treelora.evaluation.batching import (
    batches_by_length,
    check_prompts,
    evaluating,
    model_device,
    pad,
)
from treelora.models.packing import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How chat models end their turn, where it isn't the tokenizer's end of sequence: ChatML, Llama 3, Gemma, Phi
# 3.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_rows: int = 8,
    synced: bool = False,
    device: torch.device | str | None = None,
) -> list[str]:
    """The most likely continuation, token by token, up to the first end of sequence or turn.

    Sampling, penalties and lengths from the model's own generation settings are not used.

    Args:
        model: causal LM of transformers, plain or wrapped by peft; its training flags are restored.
        tokenizer: decodes the answers and knows the tokens that end them.
        prompts: token ids, at least one each.
        max_new_tokens: longest answer in tokens.
        batch_rows: rows generated together; ceil(len(prompts) / batch_rows) calls.
        synced: under ZeRO-3, go on until every rank has finished its batch, because each forward is a
            collective.
        device: where the inputs go (default: where the model's first parameter is).

    Returns:
        Decoded answers without special tokens and outer white space, in input order.

    Raises:
        DataError: an empty prompt.
        ConfigError: max_new_tokens below 1, or the tokenizer has neither padding nor an end of sequence.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    check_prompts(prompts)
    stop_ids = end_ids(tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stop_ids), None)
    if pad_id is None:
        raise ConfigError("the tokenizer has neither a padding nor an end-of-sequence token; set one of them")
    target = model_device(model, device)
    generator: Any = model
    answers = [""] * len(prompts)
    with evaluating(model), _greedy(model, max_new_tokens, pad_id, stop_ids):
        for rows in batches_by_length([len(prompt) for prompt in prompts], batch_rows):
            ids, mask = pad([prompts[i] for i in rows], pad_id, target, side="left")
            output = generator.generate(input_ids=ids, attention_mask=mask, synced_gpus=synced)
            for i, new_ids in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
                answers[i] = str(tokenizer.decode(_until(new_ids, stop_ids), skip_special_tokens=True)).strip()
    return answers


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: end of sequence, and those END_OF_TURN tokens that the vocabulary has."""
    vocabulary = tokenizer.get_vocab()
    found = [vocabulary[token] for token in END_OF_TURN if token in vocabulary]
    if tokenizer.eos_token_id is not None:
        found.insert(0, tokenizer.eos_token_id)
    return list(dict.fromkeys(found))


def _until(token_ids: list[int], stop_ids: list[int]) -> list[int]:
    for k, token in enumerate(token_ids):
        if token in stop_ids:
            return token_ids[:k]
    return token_ids


@contextmanager
def _greedy(model: nn.Module, max_new_tokens: int, pad_id: int, stop_ids: list[int]) -> Iterator[None]:
    """Greedy settings for the model; passing them to `generate` would fill their gaps from the model's
    own."""
    from transformers import GenerationConfig

    owner = base_model(model)
    before = owner.generation_config
    owner.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=stop_ids or None,
    )
    try:
        yield
    finally:
        owner.generation_config = before
