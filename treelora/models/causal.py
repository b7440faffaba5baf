"""Causal language models from a Hugging Face id, a folder, the packaged SmolLM2, or a tiny random shape.

Shapes: B rows, T tokens, V vocabulary, W answer width (the last W positions may carry labels).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treelora.errors import ConfigError
from treelora.models.packing import base_model, segment_mask, supports_packing
from treelora.models.row_attention import attend_by_row, mark_rows
from treelora.models.smollm2 import cached_smollm2
from treelora.models.spec import DTYPES, ModelSpec, cannot_load

if TYPE_CHECKING:
    from treelora.data.batches import TextBatch
    from treelora.data.packing import PackedRows


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
        raise ConfigError(cannot_load("tokenizer", name, error)) from None
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

        return _with_narrow_head(tiny_model(spec.seed).to(dtype))
    try:
        source = resolve_model(spec.name)
        if spec.random_weights:
            torch.manual_seed(spec.seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(cannot_load("model", spec.name, error)) from None
    model.requires_grad_(False)
    model.config.use_cache = False
    _with_narrow_head(model)
    attend_by_row(model)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def token_logits(model: Callable[..., Any], batch: TextBatch) -> tuple[Tensor, Tensor]:
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


def packed_logits(model: Callable[..., Any], rows: PackedRows) -> tuple[Tensor, Tensor]:
    """Logits [N, V] that predict the answers' tokens of packed rows, and those tokens [N]; the head runs on them alone.

    For models that `can_pack`.
    """
    mask = segment_mask(rows["segments"], rows["dtype"])
    if rows["lengths"]:
        mask = mark_rows(mask, rows["lengths"])
    token = _places.set(rows["places"])
    try:
        output = model(input_ids=rows["input_ids"], attention_mask=mask, position_ids=rows["position_ids"])
    finally:
        _places.reset(token)
    return output.logits[0], rows["labels"]


def can_pack(model: nn.Module, longest: int) -> bool:
    """Whether `packed_logits` gives what the rows would have each by itself, up to `longest` tokens."""
    head = base_model(model).get_output_embeddings()  # one with an adapter has no hook of ours
    return supports_packing(model, longest) and _narrowed in head._forward_pre_hooks.values()


_places: ContextVar[Tensor | None] = ContextVar("places", default=None)


def _with_narrow_head(model: Any) -> Any:
    model.get_output_embeddings().register_forward_pre_hook(_narrowed)
    return model


def _narrowed(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    states_BTD, places_N = args[0], _places.get()
    if places_N is not None:
        return (states_BTD.flatten(0, 1)[places_N][None], *args[1:])
    # The slice that `logits_to_keep` takes isn't contiguous, and for such an input torch copies the head's whole weight
    # once for each row of the batch: half of SmolLM2's step on a CPU.
    return (states_BTD.contiguous(), *args[1:])
