"""A random Llama and a random ViT of a few thousand weights, and a byte-level tokenizer, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 259  # 256 bytes, padding, end of text, start of text


def tiny_model(seed: int = 0) -> nn.Module:
    """Two layers, width 32, float32, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=256,
        eos_token_id=257,
        bos_token_id=258,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    return model


def tiny_image_model(seed: int, classes: int) -> nn.Module:
    """A ViT of two layers, width 32, for 8 x 8 pixels in patches of 2 x 2; float32, frozen."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_labels=classes,  # type: ignore[call-arg]  # every configuration takes it
    )
    model = ViTForImageClassification(config)
    model.requires_grad_(False)
    return model


def tiny_tokenizer() -> Any:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    vocabulary |= {"<pad>": 256, "<eos>": 257, "<bos>": 258}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        padding_side="left",
        chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    )
