"""What a model must be capable of to take several segments in one row, and the mask that keeps them apart.

Shapes: P rows, L tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from treelora.data.packing import EVERYONES, NOBODYS

BY_ROW = "treelora_by_row"
"""Our SDPA under transformers' name for it, see `treelora.models.row_attention`."""


def segment_mask(segments_PL: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [P, 1, L, L]: 0 where a token may look, which is back in its own segment or everyone's, else very
    negative."""
    query, key = segments_PL[:, :, None], segments_PL[:, None, :]
    width = segments_PL.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments_PL.device).tril()
    # Padding sees the padding before it, itself included: a row of attention with nothing to see would give NaN.
    visible = causal & ((key == query) | ((key == EVERYONES) & (query != NOBODYS)))
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments_PL.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def mask_dtype(model: nn.Module) -> torch.dtype:
    """What a prepared mask must be of: as the embeddings are."""
    dtype: torch.dtype = base_model(model).get_input_embeddings().weight.dtype
    return dtype


def supports_packing(model: nn.Module, longest: int) -> bool:
    """Whether the model's attention honours a custom 4-D mask and explicit positions up to `longest` tokens.

    Needs eager or SDPA attention, a forward that takes `position_ids`, and no position bias (ALiBi),
    recurrent, chunked or local layers; a sliding window must span `longest`, the longest prompt plus one
    choice. Prompt learning of peft prepends tokens, which a prepared mask does not know.
    """
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
        return False
    base = base_model(model)
    config: Any = base.config
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    return (
        getattr(config, "_attn_implementation", None) in ("eager", "sdpa", BY_ROW)
        and "position_ids" in inspect.signature(base.forward).parameters
        and not getattr(config, "alibi", False)
        and "local" not in (getattr(config, "attention_layers", None) or ())
        and layer_types <= {"full_attention", "sliding_attention"}
        and (window is None or longest <= window)
    )


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a peft model (adapters included), or the model itself."""
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(model, "get_base_model") else model
