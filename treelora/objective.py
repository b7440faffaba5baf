"""What is learnt: the likelihood of answers, of a language model's tokens or of an image's class.

Shapes: B rows, W positions that may carry an answer (1 for images), N answers' tokens, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from treelora.data.batches import NO_LOSS
from treelora.models.causal import packed_logits, token_logits
from treelora.models.vision import class_logits

if TYPE_CHECKING:
    from treelora.data.batches import Batch


def answer_loss(model: Callable[..., Any], batch: Batch, normaliser: float) -> Tensor:
    """Sum of the answers' negative log-likelihood over `normaliser`.

    Args:
        model: Any causal language model or image classifier of transformers, wrapped by peft or not.
        batch: Of text or of images.
        normaliser: Number of answer tokens, or of images, that the sum is divided by.

    Returns:
        Scalar, float32.
    """
    if "pixel_values" not in batch and (packed := batch.get("packed")):
        logits_NV, labels_N = packed_logits(model, packed)
    else:
        logits_BWV, labels_BW = answer_logits(model, batch)
        logits_NV, labels_N = logits_BWV.flatten(0, 1), labels_BW.flatten()
    return F.cross_entropy(logits_NV.float(), labels_N, ignore_index=NO_LOSS, reduction="sum") / normaliser


def answer_logits(model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [B, W, V] at the positions that may carry an answer, and the answers [B, W] (-100: none)."""
    return class_logits(model, batch) if "pixel_values" in batch else token_logits(model, batch)
