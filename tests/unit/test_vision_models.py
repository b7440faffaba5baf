"""Image classifiers of several families: found head, new classes, adapters that peft alone loads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from treelora.adapters import (
    ADAPTER,
    LoraSpec,
    adapter_parameters,
    attach_lora,
    fresh_head,
    grown_head,
    head_parameters,
    layer_names,
    save_adapter,
)
from treelora.errors import CheckpointError, ConfigError
from treelora.models.spec import ModelSpec
from treelora.models.vision import (
    ImageFormat,
    class_logits,
    head_name,
    image_format,
    load_image_model,
    pooled_features,
    processor_format,
)

SHAPE: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    **{"image_size": 16, "patch_size": 4},
}
SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
FAMILIES: dict[str, tuple[type, type, dict[str, Any], tuple[str, ...], int]] = {
    "vit": (ViTConfig, ViTForImageClassification, SHAPE, ("q_proj", "v_proj"), 32),
    "deit": (DeiTConfig, DeiTForImageClassification, SHAPE, ("q_proj", "v_proj"), 32),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification, SHAPE, ("query", "value"), 64),
    "swin": (SwinConfig, SwinForImageClassification, {**SWIN, "window_size": 4}, ("query", "value"), 32),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, tuple[str, ...], int]:
    """A folder with a pre-trained classifier of nine classes, modules to adapt, and the width of its features."""
    config, model, shape, targets, width = FAMILIES[request.param]
    torch.manual_seed(0)
    model(config(**shape, num_labels=9)).save_pretrained(tmp_path / "base")
    names = {name.rsplit(".", 1)[-1] for name, m in model(config(**shape)).named_modules() if isinstance(m, nn.Linear)}
    return tmp_path / "base", targets if targets[0] in names else ("q_proj", "v_proj"), width


def adapted(folder: Path, targets: tuple[str, ...], classes: int = 4, dtype: str = "float32") -> Any:
    base = load_image_model(ModelSpec(str(folder), dtype), classes)
    return attach_lora(base, LoraSpec(2, 4, 0.0, targets), 5, head=head_name(base))


def test_any_family(family: tuple[Path, tuple[str, ...], int], tmp_path: Path) -> None:
    """The head is new and trained with the adapters, nothing else; peft alone loads both back."""
    folder, targets, width = family
    model = adapted(folder, targets)
    form = image_format(model)
    x = torch.randn(3, form.channels, form.height, form.width)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(adapter_parameters(model)) + 2
    assert len(layer_names(list(adapter_parameters(model)))) == 4
    weight, bias = head_parameters(model).values()
    assert (weight.shape, bias.shape) == ((4, width), (4,))
    with torch.no_grad():
        for name, p in adapter_parameters(model).items():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        model.eval()
        logits = model(pixel_values=x).logits
        [features] = pooled_features(model, [x])
        torch.testing.assert_close(features @ weight.T + bias, logits, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            [frozen] = pooled_features(model, [x])
        assert not torch.allclose(features, frozen)

    state = {n: p.detach().clone() for n, p in (adapter_parameters(model) | head_parameters(model)).items()}
    save_adapter(state, model.peft_config[ADAPTER], tmp_path / "adapter")
    from peft import PeftModel

    base = AutoModelForImageClassification.from_pretrained(folder, num_labels=4, ignore_mismatched_sizes=True)
    alone = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(pixel_values=x).logits, logits, rtol=1e-5, atol=1e-6)


def test_bfloat16_weights_have_a_float32_head(tmp_path: Path) -> None:
    ViTForImageClassification(ViTConfig(**SHAPE, num_labels=9)).save_pretrained(tmp_path)
    model = adapted(tmp_path, ("q_proj",), dtype="bfloat16")
    x = torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)
    mask = torch.tensor([[True, True, False, False], [False, True, True, False]])
    batch: Any = {"pixel_values": x, "candidates": mask, "labels": torch.tensor([[1], [2]])}
    logits, labels = class_logits(model, batch)
    assert (logits.shape, logits.dtype) == ((2, 1, 4), torch.float32)
    assert torch.equal(torch.isinf(logits[:, 0]), ~mask)
    assert labels is batch["labels"]
    assert {p.dtype for p in (*adapter_parameters(model).values(), *head_parameters(model).values())} == {torch.float32}
    torch.nn.functional.cross_entropy(logits[:, 0], labels[:, 0]).backward()
    gradient = head_parameters(model)["base_model.model.classifier.weight"].grad
    assert gradient is not None
    assert torch.equal(gradient[3], torch.zeros(32))  # nobody's candidate


def test_a_class_starts_alike_however_many_there_are() -> None:
    few, many = (fresh_head("head.weight", (count, 8), 3) for count in (2, 5))
    assert torch.equal(many[:2], few)
    assert not torch.equal(many[2], many[3])
    assert torch.equal(fresh_head("head.bias", (4,), 3), torch.zeros(4))
    assert float(fresh_head("head.weight", (400, 64), 0).std()) == pytest.approx(0.02, rel=0.02)


def test_a_head_grows_and_does_not_shrink() -> None:
    old, new = {"w": torch.ones(2, 3), "b": torch.ones(2)}, {"w": torch.zeros(4, 3), "b": torch.zeros(4)}
    assert grown_head(old, new)["w"].sum(dim=1).tolist() == [3, 3, 0, 0]
    assert grown_head(old, new)["b"].tolist() == [1, 1, 0, 0]
    assert grown_head({}, {}) == {}
    with pytest.raises(CheckpointError, match=r"head tensor w: found \[4, 3\], this run needs \[2, 3\]"):
        grown_head(new, old)
    with pytest.raises(CheckpointError, match=r"found \[2, 3\], this run needs \[4, 5\]"):
        grown_head(old, {"w": torch.zeros(4, 5), "b": torch.zeros(4)})
    with pytest.raises(CheckpointError, match=r"the head has tensors \[\], this run needs \['b', 'w'\]"):
        grown_head({}, new)


def test_the_processor_says_how_pixels_are_normalised(tmp_path: Path) -> None:
    ViTForImageClassification(ViTConfig(**SHAPE, num_channels=1)).save_pretrained(tmp_path)
    known = image_format(load_image_model(ModelSpec(str(tmp_path), "float32"), 2))
    assert known == ImageFormat(16, 16, 1, (0.5,), (0.5,))
    assert processor_format(str(tmp_path), known) == known
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1], "image_std": [0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert processor_format(str(tmp_path), known) == ImageFormat(16, 16, 1, (0.1,), (0.2,))


@pytest.mark.parametrize(
    ("name", "said"),
    [("no/such/model", "no such folder; a Hugging Face id needs the network"), ("text", "the model can't be loaded")],
)
def test_what_is_no_image_classifier_is_refused(name: str, said: str, tmp_path: Path) -> None:
    shape: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32)).save_pretrained(tmp_path / "text")
    with pytest.raises(ConfigError, match=said):
        load_image_model(ModelSpec(str(tmp_path / name) if name == "text" else name, "float32"), 2)


def test_timm_by_name() -> None:
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm can't be imported here: {error}")
    base = load_image_model(ModelSpec("timm:vit_tiny_patch16_224", "float32", random_weights=True), 7)
    model = attach_lora(base, LoraSpec(2, 4, 0.0, ("qkv",)), 0, head=head_name(base))
    assert image_format(model) == ImageFormat(224, 224, 3, (0.5,) * 3, (0.5,) * 3)
    assert len(layer_names(list(adapter_parameters(model)))) == 12
    with torch.no_grad():
        assert model(pixel_values=torch.zeros(1, 3, 224, 224)).logits.shape == (1, 7)
    with pytest.raises(ConfigError, match="timm has no model 'vit_nope'"):
        load_image_model(ModelSpec("timm:vit_nope", "float32"), 2)


def test_timm_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="needs `pip install timm`"):
        load_image_model(ModelSpec("timm:vit_tiny_patch16_224", "float32"), 2)
