"""Prompt features against transformers' own hidden states."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from treelora.errors import ConfigError, DataError
from treelora.evaluation.features import prompt_features

PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9], [10, 11, 12, 13, 14, 15, 16]]


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def adapted():
    from peft import LoraConfig, get_peft_model

    base = llama()
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def oracle(model, prompts, layer):
    with torch.no_grad():
        each = [model(torch.tensor([p]), output_hidden_states=True).hidden_states[layer][0] for p in prompts]
    return torch.stack([states.mean(dim=0) for states in each])


@pytest.mark.parametrize("early_exit", [True, False, None])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_features_are_mean_hidden_states_without_pads(layer, early_exit):
    model = llama()
    features = prompt_features(model, PROMPTS, layer=layer, pad_id=0, batch_rows=3, early_exit=early_exit)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, oracle(model, PROMPTS, layer), atol=1e-5, rtol=0)


def test_gpt2_features():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=32)).eval()
    features = prompt_features(model, PROMPTS, layer=2, pad_id=0, batch_rows=4)
    torch.testing.assert_close(features, oracle(model, PROMPTS, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [4, 5, 100])
def test_a_layer_beyond_the_last_is_the_last_block_before_the_final_norm(layer):
    model = llama()
    features = prompt_features(model, [PROMPTS[0]], layer=layer, pad_id=0)
    captured = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([PROMPTS[0]]))
    handle.remove()
    torch.testing.assert_close(features, captured[0].mean(dim=1), atol=1e-5, rtol=0)


def test_early_exit_leaves_the_later_blocks_alone():
    model = llama()
    ran = []
    for i, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    prompt_features(model, PROMPTS, layer=2, pad_id=0, batch_rows=4, early_exit=True)
    assert ran == [0, 1]
    ran.clear()
    prompt_features(model, PROMPTS, layer=2, pad_id=0, batch_rows=4, early_exit=False)
    assert ran == [0, 1, 2, 3]


def test_partitioned_parameters_keep_forwards_whole():
    model = llama()
    model.lm_head.weight.ds_id = 0  # how DeepSpeed marks what ZeRO-3 partitions
    ran = []
    model.model.layers[3].register_forward_pre_hook(lambda *_: ran.append(1))
    prompt_features(model, PROMPTS, layer=1, pad_id=0, batch_rows=4)
    assert ran == [1]


@pytest.mark.parametrize("early_exit", [True, False])
def test_adapters_are_off_and_come_back_as_they_were(early_exit):
    model = adapted().train()
    for name, parameter in model.named_parameters():
        if "layers.0" in name:
            parameter.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        before = model.eval()(torch.tensor([PROMPTS[0]])).logits
    model.train()
    features = prompt_features(model, PROMPTS, layer=3, pad_id=0, batch_rows=2, early_exit=early_exit)
    torch.testing.assert_close(features, oracle(llama(), PROMPTS, 3), atol=1e-5, rtol=0)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert any(flags.values())
    assert model.training
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(torch.tensor([PROMPTS[0]])).logits, before)


def test_batches_pads_and_order_do_not_matter():
    model = llama()
    expected = prompt_features(model, PROMPTS, layer=2, pad_id=0, batch_rows=1)
    for batch_rows, pad_id in [(2, 5), (3, 0), (8, 63)]:
        got = prompt_features(model, PROMPTS, layer=2, pad_id=pad_id, batch_rows=batch_rows)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    backwards = prompt_features(model, PROMPTS[::-1], layer=2, pad_id=0, batch_rows=3)
    torch.testing.assert_close(backwards, expected.flip(0), atol=1e-5, rtol=0)


def test_a_failure_leaves_no_hook_behind():
    model = llama()
    with pytest.raises(IndexError):
        prompt_features(model, [[1, 64]], layer=1, pad_id=0)
    assert not model.model.layers[0]._forward_hooks


def test_no_prompts_give_an_empty_matrix():
    assert prompt_features(llama(), [], pad_id=0).shape == (0, 32)


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        prompt_features(llama(), [[1], []], pad_id=0)
    with pytest.raises(ConfigError, match="layer is 0"):
        prompt_features(llama(), [[1]], layer=0, pad_id=0)
