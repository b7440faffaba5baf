"""Models: the loss against transformers' own, the tiny tokenizer, and names that nothing is found under."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from treelora.data.batches import collate
from treelora.errors import ConfigError
from treelora.models.causal import load_model, load_tokenizer
from treelora.models.spec import ModelSpec
from treelora.models.tiny import VOCABULARY, tiny_model, tiny_tokenizer
from treelora.objective import answer_loss

ROWS = [([3, 4, 5], [6, 7]), ([8], [9]), ([10, 11, 12, 13, 14], [15, 16, 17]), ([1, 2], [2, 1, 2, 1, 2])]


def test_loss_equals_that_of_transformers() -> None:
    model, batch = tiny_model(1), collate(ROWS, pad_id=256)
    tokens = int((batch["labels"] != -100).sum())
    theirs = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        labels=batch["labels"],
    ).loss
    assert tokens == 11
    torch.testing.assert_close(answer_loss(model, batch, tokens), theirs)
    torch.testing.assert_close(answer_loss(model, batch, 1.0), theirs * tokens)


def test_loss_of_a_padded_row_is_its_own() -> None:
    model = tiny_model(1)
    total = torch.zeros(())
    for prompt, answer in ROWS:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(answer), reduction="sum")
    torch.testing.assert_close(answer_loss(model, collate(ROWS, 256), 1.0), total, rtol=1e-5, atol=1e-5)


def test_only_the_needed_logits_are_computed() -> None:
    seen: list[int] = []

    def model(**arguments: object) -> object:
        seen.append(int(arguments["logits_to_keep"]))  # type: ignore[call-overload]
        return tiny_model()(**arguments)

    answer_loss(model, collate(ROWS, 256), 1.0)
    assert seen == [6]


@pytest.mark.parametrize(
    "text", ["", "plain words", " leading and trailing ", "naïve – 試験 🙂\n\ttab", "<pad> as text"]
)
def test_tiny_tokenizer_round_trip(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    if "<pad>" not in text:
        assert len(ids) == len(text.encode())
    assert all(0 <= token < VOCABULARY for token in ids)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (256, 257, "left")


def test_tiny_is_seeded_and_frozen() -> None:
    one, same, other = (
        dict(load_model(ModelSpec("tiny", "float32", seed=seed)).named_parameters()) for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert not any(p.requires_grad for p in one.values())
    assert {p.dtype for p in load_model(ModelSpec("tiny", "bfloat16")).parameters()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(5).save_pretrained(path)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_folder(folder: Path) -> None:
    model: nn.Module = load_model(ModelSpec(str(folder), "float32"))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(input_ids=ids).logits, tiny_model(5)(input_ids=ids).logits)
    assert not any(p.requires_grad for p in model.parameters())
    assert load_tokenizer(str(folder)).pad_token_id == 256
    random = load_model(ModelSpec(str(folder), "float32", random_weights=True, seed=1))
    again = load_model(ModelSpec(str(folder), "float32", random_weights=True, seed=1))
    assert torch.equal(random(input_ids=ids).logits, again(input_ids=ids).logits)
    assert not torch.equal(random(input_ids=ids).logits, model(input_ids=ids).logits)


def test_checkpointed_gradients_are_equal(folder: Path) -> None:
    from treelora.adapters import LoraSpec, adapter_parameters, attach_lora

    gradients = []
    for checkpointing in (False, True):
        spec = ModelSpec(str(folder), "float32", gradient_checkpointing=checkpointing)
        model = attach_lora(load_model(spec), LoraSpec(rank=2), seed=0).train()
        answer_loss(model, collate(ROWS, 256), 11.0).backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
        assert "lora_A" in name or gradient.abs().max() > 0


def test_names_that_nothing_is_found_under(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries over the network
    for name, hint in (
        (str(tmp_path), "the folder lacks model files"),
        ("no/such-model-anywhere", "no such folder; a Hugging Face id needs the network"),
        ("not a name!", "no such folder"),
    ):
        for load in (load_tokenizer, lambda name: load_model(ModelSpec(name))):
            with pytest.raises(ConfigError) as caught:
                load(name)  # type: ignore[operator]
            assert f"model.name {name!r}" in str(caught.value)
            assert hint in str(caught.value)
            assert "\n" not in str(caught.value)
