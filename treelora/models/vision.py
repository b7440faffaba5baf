"""Image classifiers from a Hugging Face id or folder, timm by name, a small packaged one, or a tiny random shape.

Shapes: B rows, C classes of the head, F features that the head reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treelora.errors import ConfigError
from treelora.models.prompted import Prompted
from treelora.models.spec import DTYPES, ModelSpec, cannot_load

if TYPE_CHECKING:
    from treelora.data.batches import ImageBatch

TIMM = "timm:"


@dataclass(frozen=True)
class ImageFormat:
    """What a model wants to be shown: side lengths in pixels, channels, and how they are normalised."""

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_image_model(spec: ModelSpec, classes: int) -> nn.Module:
    """Load a frozen image classifier with a new head for so many classes.

    Raises:
        ConfigError: nothing can be loaded under that name, or it has no linear head.
    """
    model = _load(spec, classes)
    model.requires_grad_(False)
    head_name(model)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _load(spec: ModelSpec, classes: int) -> Any:
    from transformers import AutoConfig, AutoModelForImageClassification

    dtype = DTYPES[spec.dtype]
    if spec.name == "tiny":
        from treelora.models.tiny import tiny_image_model

        return tiny_image_model(spec.seed, classes).to(dtype)
    if spec.name == "digits-vit":
        from treelora.models.digits_vit import digits_vit

        return digits_vit(classes).to(dtype)
    torch.manual_seed(spec.seed)
    try:
        if spec.name.startswith(TIMM):
            return _timm(spec, classes).to(dtype)
        if spec.random_weights:
            config = AutoConfig.from_pretrained(spec.name, num_labels=classes)
            return AutoModelForImageClassification.from_config(config, dtype=dtype)
        with new_head_is_meant():
            return AutoModelForImageClassification.from_pretrained(
                spec.name, num_labels=classes, ignore_mismatched_sizes=True, dtype=dtype
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(cannot_load("model", spec.name, error)) from None


@contextmanager
def new_head_is_meant() -> Iterator[None]:
    """Without transformers' page-long report that a model's head doesn't fit and is made anew."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _timm(spec: ModelSpec, classes: int) -> Any:
    """A timm model in transformers' wrapper, so that everything behind it is the same."""
    try:
        import timm
    except ImportError:
        raise ConfigError(f"model.name {spec.name!r} needs `pip install timm`") from None
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    name = spec.name.removeprefix(TIMM)
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise ConfigError(f"model.name {spec.name!r}: timm has no model {name!r}; among others it has {close}")
    cfg = timm.get_pretrained_cfg(name)
    known: Any = TimmWrapperConfig
    config = known(architecture=name, num_labels=classes, pretrained_cfg=cfg.to_dict() if cfg else None)
    model = TimmWrapperForImageClassification(config)
    if not spec.random_weights:
        pretrained = timm.create_model(name, pretrained=True, num_classes=classes)
        model.timm_model.load_state_dict(pretrained.state_dict())
    return model


def image_format(model: Any) -> ImageFormat:
    """How a model's images must be, by its configuration; without a word on it, mean and deviation are a half."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    cfg = getattr(config, "pretrained_cfg", None) or {}
    channels, *size = cfg.get("input_size") or (getattr(config, "num_channels", 3), *_pair(config.image_size))
    half = (0.5,) * channels
    return ImageFormat(
        int(size[0]),
        int(size[1]),
        int(channels),
        tuple(cfg.get("mean") or getattr(config, "image_mean", None) or half),
        tuple(cfg.get("std") or getattr(config, "image_std", None) or half),
    )


def patches(model: Any) -> int:
    """The tokens that an image makes: patches of the model's own size, or 1 where its configuration has none."""
    form = image_format(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    size = getattr(base.config, "patch_size", None)
    if size is None:
        return 1
    high, wide = _pair(size)
    return (form.height // high) * (form.width // wide)


def processor_format(name: str, known: ImageFormat) -> ImageFormat:
    """The format with mean and deviation of the model's own image processor, where it has one."""
    from transformers import AutoImageProcessor

    if name in ("tiny", "digits-vit") or name.startswith(TIMM):
        return known
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError):
        return known
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not mean or not std:
        return known
    return ImageFormat(known.height, known.width, known.channels, tuple(mean), tuple(std))


def head_name(model: nn.Module) -> str:
    """Name of the linear layer that gives the logits.

    Raises:
        ConfigError: there is none.
    """
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not linear:
        raise ConfigError(f"{type(model).__name__} has no linear head for {classes} classes; choose another model")
    return linear[-1]


def class_logits(model: Callable[..., Any], batch: ImageBatch) -> tuple[Tensor, Tensor]:
    """Logits [B, 1, C], minus infinity for classes that aren't candidates, and labels [B, 1]."""
    logits_BC = model(pixel_values=batch["pixel_values"]).logits.float()
    return logits_BC.masked_fill(~batch["candidates"], -torch.inf)[:, None], batch["labels"]


def pooled_features(model: Any, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """What the head reads of each batch of images: float32 [B, F], on the device."""
    for pixels in batches:
        with head_inputs(model) as seen:
            model(pixel_values=pixels)
        yield seen[0].detach().float()


@contextmanager
def head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """What the head reads in each pass within the context: [B, F], as the model has it."""
    seen: list[Tensor] = []

    def capture(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    handles = [head.register_forward_pre_hook(capture) for head in _heads(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _heads(model: Any) -> list[nn.Module]:
    """Whatever may give the logits: the new head, or with peft the old one while adapters are off."""
    if isinstance(model, Prompted):
        return [model.head]
    [name] = model.peft_config[model.active_adapter].modules_to_save
    wrapped = model.get_submodule(f"base_model.model.{name}")
    return [wrapped.original_module, *wrapped.modules_to_save.children()]


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
