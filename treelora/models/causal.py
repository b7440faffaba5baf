"""Causal language models from a Hugging Face id, a folder, the packaged SmolLM2, or a tiny random shape.

Shapes: B rows, T tokens, V vocabulary, W answer width (the last W positions may carry labels).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treelora.errors import ConfigError
from treelora.models.smollm2 import cached_smollm2

if TYPE_CHECKING:
    from treelora.data.batches import Batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is loaded."""

    name: str
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = False
    random_weights: bool = False
    seed: int = 0


def resolve_model(name: str) -> str:
    """The folder or Hugging Face id behind a model's name; `smollm2` is the packaged one, unpacked once."""
    return str(cached_smollm2()) if name == "smollm2" else name


def load_tokenizer(name: str) -> Any:
    """Tokenizer of a model, with a padding token.

    Raises:
        ConfigError: nothing can be loaded under that name.
    """
    if name == "tiny":
        from treelora.models.tiny import tiny_tokenizer

        return tiny_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name), padding_side="left")
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_load("tokenizer", name, error)) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(spec: ModelSpec) -> nn.Module:
    """Load the frozen base model.

    Raises:
        ConfigError: nothing can be loaded under that name.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = DTYPES[spec.dtype]
    if spec.name == "tiny":
        from treelora.models.tiny import tiny_model

        return tiny_model(spec.seed).to(dtype)
    try:
        source = resolve_model(spec.name)
        if spec.random_weights:
            torch.manual_seed(spec.seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_load("model", spec.name, error)) from None
    model.requires_grad_(False)
    model.config.use_cache = False
    model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def answer_loss(model: Callable[..., Any], batch: Batch, normaliser: float) -> Tensor:
    """Sum of the answer tokens' negative log-likelihood over `normaliser`.

    Args:
        model: Any causal LM of transformers, wrapped by peft or not.
        batch: input_ids, attention_mask, position_ids, labels, each [B, T]; labels are -100 where no loss is due.
        normaliser: Number of answer tokens that the sum is divided by.

    Returns:
        Scalar, float32.
    """
    logits_BWV, labels_BW = answer_logits(model, batch)
    total = F.cross_entropy(logits_BWV.flatten(0, 1).float(), labels_BW.flatten(), ignore_index=-100, reduction="sum")
    return total / normaliser


def answer_logits(model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [B, W, V] that predict the last W tokens, and those tokens' labels [B, W] (-100: no answer's token).

    The rows are left-padded, so every answer ends at the right edge and the output head, a fifth of SmolLM2's
    arithmetic, is computed for the last W + 1 positions only.
    """
    tensors: Mapping[str, Any] = batch
    width = int(tensors["answer_width"])
    logits = model(
        input_ids=tensors["input_ids"],
        attention_mask=tensors["attention_mask"],
        position_ids=tensors["position_ids"],
        logits_to_keep=width + 1,
    ).logits
    return logits[:, :-1], tensors["labels"][:, -width:]


def _contiguous(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # The slice that `logits_to_keep` takes isn't contiguous, and for such an input torch copies the head's whole weight
    # once for each row of the batch: half of SmolLM2's step on a CPU.
    return (args[0].contiguous(), *args[1:])


def _cannot_load(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    folder = Path(os.path.expanduser(name))
    hint = "the folder lacks model files" if folder.is_dir() else "no such folder; a Hugging Face id needs the network"
    return f"model.name {name!r}: the {what} can't be loaded, {hint} ({reason})"
