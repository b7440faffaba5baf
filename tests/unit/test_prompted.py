"""A ViT with prompts: its attention and tokens against a forward pass written out by hand, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.prompted_streams import pixels
from treelora.adapters import adapter_parameters, grown, head_parameters, load_adapter, save_adapter
from treelora.errors import CheckpointError, ConfigError
from treelora.models.prompted import Prompted, PromptSpec, fresh_prompts
from treelora.models.tiny import tiny_image_model, tiny_model
from treelora.models.vision import pooled_features

CLASSES, WIDTH, HEADS = 6, 32, 4


def written_out(vit: Any, x: Tensor, prefixes: dict[int, Tensor], tokens: Tensor | None = None) -> Tensor:
    """Last hidden state of a ViT, a row and a head at a time; prefixes [B, 2, L, D] by layer, tokens [B, L, D]."""
    h = vit.embeddings(x)
    if tokens is not None:
        h = torch.cat([tokens, h], dim=1)
    for index, layer in enumerate(vit.layers):
        n = layer.layernorm_before(h)
        q, k, v = layer.attention.q_proj(n), layer.attention.k_proj(n), layer.attention.v_proj(n)
        if index in prefixes:
            k = torch.cat([prefixes[index][:, 0], k], dim=1)
            v = torch.cat([prefixes[index][:, 1], v], dim=1)
        rows, d = [], WIDTH // HEADS
        for b in range(len(x)):
            heads = []
            for head in range(HEADS):
                own = slice(head * d, (head + 1) * d)
                weights = (q[b, :, own] @ k[b, :, own].T / d**0.5).softmax(dim=-1)
                heads.append(weights @ v[b, :, own])
            rows.append(torch.cat(heads, dim=-1))
        h = h + layer.attention.o_proj(torch.stack(rows))
        h = h + layer.mlp(layer.layernorm_after(h))
    return vit.layernorm(h)


def prompted(spec: PromptSpec, seed: int = 3) -> tuple[Prompted, dict[str, torch.nn.Parameter]]:
    """A model in evaluation mode whose prompts are large enough to matter, and these."""
    model = Prompted(tiny_image_model(0, CLASSES), spec, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in [*model.prompts.parameters(), *model.head.parameters()]:
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model, adapter_parameters(model)


def test_prefixes_are_keys_and_values_before_the_layer_s_own() -> None:
    spec = PromptSpec(size=3, length=4, layers=(1,), general_length=2, general_layers=(0,))
    model, tensors = prompted(spec)
    x = pixels()
    query = written_out(model.base.vit, x, {})[:, 0].detach()
    tensors["prompts.key.weight"].data = (query - 0.9 * query.mean(dim=0))[[2, 0, 1]]
    cosines = F.cosine_similarity(query[:, None], tensors["prompts.key.weight"].detach()[None], dim=-1)
    chosen = [max(range(3), key=lambda place: float(row[place])) for row in cosines]
    assert len(set(chosen)) > 1
    prefixes = {
        0: tensors["prompts.general0.weight"].expand(3, -1, -1, -1),
        1: tensors["prompts.layer1.weight"][chosen],
    }
    expected = model.head(written_out(model.base.vit, x, prefixes)[:, 0])
    found = model(pixel_values=x)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.similarity[:, 0], cosines.amax(dim=1), rtol=1e-4, atol=1e-6)
    assert (expected - model.head(written_out(model.base.vit, x, {})[:, 0])).abs().max() > 0.1

    wanted = torch.autograd.grad(expected.square().sum(), [prefixes[0], tensors["prompts.layer1.weight"]])
    found.logits.square().sum().backward()
    general = tensors["prompts.general0.weight"].grad
    torch.testing.assert_close(general, wanted[0].sum(dim=0, keepdim=True), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(tensors["prompts.layer1.weight"].grad, wanted[1], rtol=1e-3, atol=1e-5)


def test_tokens_stand_before_all_others_and_their_outputs_are_read() -> None:
    model, tensors = prompted(PromptSpec(size=4, length=2, top=3))
    x = pixels(1)
    query = written_out(model.base.vit, x, {})[:, 0]
    cosines = F.cosine_similarity(query[:, None], tensors["prompts.key.weight"][None], dim=-1).detach()
    chosen = [sorted(range(4), key=lambda place: -float(row[place]))[:3] for row in cosines]
    tokens = torch.stack([torch.cat([tensors["prompts.tokens.weight"][place] for place in row]) for row in chosen])
    outputs = written_out(model.base.vit, x, {}, tokens)
    expected = model.head(outputs[:, :6].mean(dim=1))
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-5)
    features = torch.cat(list(pooled_features(model, [x[:2], x[2:]])))
    torch.testing.assert_close(features, outputs[:, :6].mean(dim=1), rtol=1e-4, atol=1e-5)


def test_without_prompts_it_is_the_frozen_model() -> None:
    model, _ = prompted(PromptSpec(size=2, length=3, layers=(0, 1)))
    x = pixels(2)
    with model.disable_adapter():
        off = torch.cat(list(pooled_features(model, [x])))
        logits = model(x).logits
    expected = tiny_image_model(0, CLASSES).eval().vit(x).last_hidden_state[:, 0]  # type: ignore[operator]
    torch.testing.assert_close(off, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, model.head(expected), rtol=1e-5, atol=1e-5)
    assert (model(x).logits - logits).abs().max() > 0.1  # and they are on again


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model, tensors = prompted(PromptSpec(size=2, length=3, layers=(1,), general_length=2, general_layers=(0,)))
        if recompute:
            model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(pixels()).logits.square().sum().backward()
        gradients.append({name: tensor.grad for name, tensor in tensors.items() if name != "prompts.key.weight"})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
        assert gradient is not None
        assert gradient.any()


def test_deit_has_them_too() -> None:
    from transformers import DeiTConfig, DeiTForImageClassification

    config = DeiTConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,  # type: ignore[call-arg]
    )
    base = DeiTForImageClassification(config).requires_grad_(False)
    model: Any = Prompted(base, PromptSpec(size=1, length=3, layers=(1,), keyed=False), 0).eval()
    x = pixels()
    prefix = model.prompts["layer1"].weight.expand(3, -1, -1, -1)
    expected = model.head(written_out(base.deit, x, {1: prefix})[:, 0])
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-5)


def test_prompts_start_alike_however_many_there_are() -> None:
    few, many = fresh_prompts("p", (2, 3, 16), 5), fresh_prompts("p", (4, 3, 16), 5)
    assert torch.equal(many[:2], few)
    assert torch.equal(fresh_prompts("p", (1, 3, 16), 5, first=3)[0], many[3])
    assert many.abs().max() <= 0.25
    assert many.abs().max() > 0.2
    for other in (fresh_prompts("q", (2, 3, 16), 5), fresh_prompts("p", (2, 3, 16), 6), many[2:]):
        assert not torch.isclose(few, other).any()


def test_names_of_what_is_trained() -> None:
    model = Prompted(tiny_image_model(0, CLASSES), PromptSpec(2, 3, (1,), general_length=1, general_layers=(0,)), 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter, head = adapter_parameters(model), head_parameters(model)
    assert set(adapter) == {"prompts.key.weight", "prompts.layer1.weight", "prompts.general0.weight"}
    assert set(head) == {"head.weight", "head.bias"}
    assert trained == adapter.keys() | head.keys()


def test_saved_prompts_come_back_and_make_room_for_more(tmp_path: Path) -> None:
    model, tensors = prompted(PromptSpec(size=2, length=3, layers=(1,), staged=True))
    state = {name: tensor.detach() for name, tensor in tensors.items()}
    save_adapter(state, model.peft_config["default"], tmp_path / "one")
    described = json.loads((tmp_path / "one" / "prompt_config.json").read_text())
    assert (described["size"], described["layers"], described["staged"]) == (2, [1], True)
    assert not (tmp_path / "one" / "adapter_config.json").exists()
    back = load_adapter(tmp_path / "one")
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())

    shapes = {name: torch.Size((4, *tensor.shape[1:])) for name, tensor in state.items()}
    larger = grown(back, shapes)
    for name, tensor in state.items():
        assert torch.equal(larger[name][:2], tensor)
        assert not larger[name][2:].any()
    with pytest.raises(
        CheckpointError, match=r"prompts.layer1.weight: found \[2, 2, 3, 32\], this run needs \[2, 2, 5"
    ):
        grown(back, shapes | {"prompts.layer1.weight": torch.Size((2, 2, 5, 32))})


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method l2p puts prompts into .* this model is of kind 'llama'; choose"):
        Prompted(tiny_model(), PromptSpec(2, 3), 0, "l2p")
    with pytest.raises(ConfigError, match="section dualprompt: there is no layer 2; the model's are 0 to 1"):
        Prompted(tiny_image_model(0, CLASSES), PromptSpec(2, 3, (1, 2)), 0, "dualprompt")
