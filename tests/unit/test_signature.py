import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from treelora.errors import ConfigError
from treelora.signature import (
    GradientProbe,
    adapted_modules,
    adapter_value_vectors,
    gradient_vectors,
)

RANK, ALPHA, SCALE = 4, 12, 3.0


def tiny_model(dtype=torch.float32, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(dtype)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["q_proj", "v_proj"])
    return get_peft_model(model, lora)


def make_loss(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (3, 9), generator=generator)
    return lambda: model(input_ids=ids, labels=ids).loss


def real_lora_gradients(model, a0, loss_fn):
    """The oracle: LoRA's own B at 0, with A replaced by the probe."""
    parameters = dict(model.named_parameters())
    grads = []
    with torch.no_grad():
        for (name, _), a in zip(adapted_modules(model), a0, strict=True):
            parameters[f"{name}.lora_A.default.weight"].copy_(a)
            parameters[f"{name}.lora_B.default.weight"].zero_()
    loss_fn().backward()
    for name, _ in adapted_modules(model):
        grads.append(parameters[f"{name}.lora_B.default.weight"].grad)
    return grads


def test_equals_the_gradient_of_a_real_lora_b():
    model = tiny_model()
    model.eval()
    probe = GradientProbe(model, RANK, seed=7, scale=SCALE)
    measured = probe.measure(make_loss(model))
    expected = real_lora_gradients(model, probe.a0, make_loss(model))
    assert len(measured) == len(expected) == 4
    for ours, theirs in zip(measured, expected, strict=True):
        assert ours.dtype == torch.float32
        assert theirs.abs().max() > 1e-5
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)
    assert [gradient.numel() for gradient in measured] == probe.layer_dims == [64, 32, 64, 32]


def test_is_a_projection_of_the_full_gradient():
    model = tiny_model()
    probe = GradientProbe(model, RANK, seed=7)
    measured = probe.measure(make_loss(model))
    for (_, module), a0, ours in zip(adapted_modules(model), probe.a0, measured, strict=True):
        weight = module.get_base_layer().weight
        weight.requires_grad_(True)
        with model.disable_adapter():
            (full,) = torch.autograd.grad(make_loss(model)(), weight)
        torch.testing.assert_close(ours, full @ a0.T, rtol=1e-4, atol=1e-8)
        weight.requires_grad_(False)


def test_ignores_the_adapter_and_its_dropout():
    model = tiny_model(dropout=0.5)
    probe = GradientProbe(model, RANK, seed=7)
    before = probe.measure(make_loss(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.train()
    after = probe.measure(make_loss(model))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_leaves_the_model_as_it_was():
    model = tiny_model()
    frozen = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    dict(model.named_parameters())[frozen].requires_grad_(False)  # peft would turn it on again
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    output = make_loss(model)()
    GradientProbe(model, RANK, seed=0).measure(make_loss(model))
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert flags[frozen] is False
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
        assert torch.equal(parameter, values[name])
    assert torch.equal(make_loss(model)(), output)
    assert not any(module._forward_hooks for module in model.modules())


def test_works_with_every_parameter_frozen_and_under_no_grad():
    model = tiny_model()
    probe = GradientProbe(model, RANK, seed=7)
    expected = probe.measure(make_loss(model))
    model.requires_grad_(False)
    with torch.no_grad():
        measured = probe.measure(make_loss(model))
    assert all(torch.equal(a, b) for a, b in zip(measured, expected, strict=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_bf16_base_weights():
    exact_model, model = tiny_model(), tiny_model(torch.bfloat16)
    exact = GradientProbe(exact_model, RANK, seed=7).measure(make_loss(exact_model))
    measured = GradientProbe(model, RANK, seed=7).measure(make_loss(model))
    for a, b in zip(measured, exact, strict=True):
        assert a.dtype == torch.float32
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


def test_probe_is_shared_by_tasks_and_models_and_set_by_the_seed():
    first, again = GradientProbe(tiny_model(), 3, seed=5), GradientProbe(tiny_model(seed=9), 3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.a0, again.a0, strict=True))
    other = GradientProbe(tiny_model(), 3, seed=6)
    assert not torch.equal(first.a0[0], other.a0[0])
    assert not torch.equal(first.a0[0], first.a0[2])  # two layers of one size
    assert first.a0[0].shape == (3, 16)
    torch.testing.assert_close(first.a0[0].abs(), torch.full((3, 16), 3**-0.5))


def test_hooks_are_removed_after_an_error():
    model = tiny_model()
    probe = GradientProbe(model, RANK, seed=0)

    def broken():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        probe.measure(broken)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.get_model_status().enabled is True


def test_a_loss_that_misses_a_layer_is_refused_by_name():
    model = tiny_model()
    ids = torch.zeros(1, 4, dtype=torch.long)

    def first_layer_only():
        return model.base_model.model.model.layers[0](
            model.get_input_embeddings()(ids),
            position_embeddings=model.base_model.model.model.rotary_emb(ids.float(), torch.arange(4)[None]),
        ).sum()

    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.q_proj"):
        GradientProbe(model, RANK, seed=0).measure(first_layer_only)


def test_a_loss_without_gradient_or_of_many_numbers_is_refused():
    model = tiny_model()
    probe = GradientProbe(model, RANK, seed=0)
    with pytest.raises(ConfigError, match="scalar"):
        probe.measure(lambda: torch.zeros(()))
    with pytest.raises(ConfigError, match=r"shape \(1, 4, 64\)"):
        probe.measure(lambda: model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits)


def test_adapted_modules_in_model_order():
    names = [name for name, _ in adapted_modules(tiny_model())]
    prefix = "base_model.model.model.layers"
    assert names == [
        f"{prefix}.{layer}.self_attn.{projection}" for layer in (0, 1) for projection in ("q_proj", "v_proj")
    ]


def test_models_without_linear_lora_are_refused():
    with pytest.raises(ConfigError, match="no LoRA module"):
        adapted_modules(nn.Linear(2, 2))
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    model = get_peft_model(inner, LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(ConfigError, match="adapts a Embedding"):
        adapted_modules(model)
    with pytest.raises(ConfigError, match="rank = 0"):
        GradientProbe(tiny_model(), 0, seed=0)


def test_gradient_and_adapter_value_vectors():
    named = {
        "m.1.lora_B.default.weight": torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16),
        "m.0.lora_B.default.weight": torch.tensor([[1.0], [2.0]]),
        "m.0.lora_A.default.weight": torch.tensor([[5.0]]),
        "m.1.lora_A.default.weight": torch.tensor([[6.0, 7.0]]),
        "head.weight": torch.tensor([9.0]),
    }
    gradients = gradient_vectors(named, ["m.0", "m.1"])
    assert [vector.tolist() for vector in gradients] == [[1.0, 2.0], [3.0, 4.0]]
    assert all(vector.dtype == torch.float32 for vector in gradients)
    assert [vector.tolist() for vector in adapter_value_vectors(named, ["m.1", "m.0"])] == [[6.0, 7.0], [5.0]]


def test_vectors_of_two_adapters_or_none_are_refused():
    with pytest.raises(ConfigError, match=r"m\.1: 0 lora_B tensors"):
        gradient_vectors({"m.0.lora_B.default.weight": torch.zeros(2)}, ["m.0", "m.1"])
    both = {f"m.0.lora_A.{adapter}.weight": torch.zeros(2) for adapter in ("old", "new")}
    with pytest.raises(ConfigError, match=r"m\.0: 2 lora_A tensors"):
        adapter_value_vectors(both, ["m.0"])
