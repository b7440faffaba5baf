"""Features of prompts for task inference: mean-pooled hidden states of the frozen base model.

Shapes: n prompts, B rows of a batch, T padded length, F hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from treelora.errors import ConfigError
from treelora.evaluation.batching import (
    batches_by_length,
    check_prompts,
    evaluating,
    model_device,
    pad,
)
from treelora.models.packing import base_model


class _LayerReached(Exception):  # noqa: N818  (a signal, not an error)
    """The wanted layer has run; the rest of the forward is not needed."""


def prompt_features(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    layer: int = 8,
    pad_id: int,
    batch_rows: int = 8,
    device: torch.device | str | None = None,
    early_exit: bool | None = None,
) -> Tensor:
    """Mean over a prompt's tokens of the hidden states behind block `layer`, adapters disabled.

    Args:
        model: causal LM of transformers, plain or wrapped by peft (then its adapters are off meanwhile);
            training flags and `requires_grad` are restored.
        prompts: token ids, at least one each.
        layer: block counted from 1; a model with fewer blocks gives its last one (before the final norm).
        pad_id: any valid token id; pads are neither seen nor pooled.
        batch_rows: rows in a forward; ceil(n / batch_rows) forwards.
        device: where the inputs go (default: where the model's first parameter is).
        early_exit: leave the forward behind the wanted block. None: yes, unless parameters are partitioned by
            ZeRO-3, whose hooks must see whole forwards.

    Returns:
        float32 [n, F] on the CPU, in input order.

    Raises:
        DataError: an empty prompt.
        ConfigError: layer below 1, or the model's blocks can't be found.
    """
    if layer < 1:
        raise ConfigError(f"the feature layer is {layer}; blocks count from 1")
    check_prompts(prompts)
    base = base_model(model)
    target = model_device(model, device)
    if early_exit is None:
        early_exit = not any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    blocks = _blocks(base)
    features_nF = torch.zeros(len(prompts), base.config.hidden_size, dtype=torch.float32)
    seen: list[Tensor] = []

    def capture(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        if early_exit:
            raise _LayerReached

    with evaluating(model), adapters_off(model):
        handle = blocks[min(layer, len(blocks)) - 1].register_forward_hook(capture)
        try:
            for rows in batches_by_length([len(prompt) for prompt in prompts], batch_rows):
                ids_BT, mask_BT = pad([prompts[i] for i in rows], pad_id, target)
                seen.clear()
                _run(model, early_exit, input_ids=ids_BT, attention_mask=mask_BT)
                weight_BT = mask_BT.to(seen[0].device, torch.float32)
                total_BF = torch.einsum("btf,bt->bf", seen[0].float(), weight_BT)
                features_nF[rows] = (total_BF / weight_BT.sum(dim=1, keepdim=True)).cpu()
        finally:
            handle.remove()
    return features_nF


def _run(model: nn.Module, early_exit: bool, **inputs: Tensor) -> None:
    base = base_model(model)
    if not early_exit:
        # From the root, because ZeRO-3 starts a forward there.
        parameters = inspect.signature(base.forward).parameters
        extra = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        model(**inputs, use_cache=False, **extra)
        return
    try:
        base(**inputs, use_cache=False)
    except _LayerReached:
        return


def _blocks(base: Any) -> nn.ModuleList:
    count = base.config.num_hidden_layers
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(f"{type(base).__name__} has no list of {count} blocks to take features from")


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The frozen base model; peft's own context makes adapters trainable on exit, so their flags are put
    back."""
    if not hasattr(model, "disable_adapter"):
        yield
        return
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
