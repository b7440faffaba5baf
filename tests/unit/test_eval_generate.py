"""Greedy answers against a token-by-token loop without cache, batch or padding."""

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from treelora.errors import ConfigError, DataError
from treelora.evaluation.generate import end_ids, generate_answers

VOCABULARY = 40
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15], [16, 17, 18, 19]]


class Letters:
    """A tokenizer double: id k is the word "wk", ids 0 and 1 are padding and end of sequence."""

    pad_token_id: int | None = 0
    eos_token_id: int | None = 1
    extra: dict[str, int] = {}  # noqa: RUF012

    def get_vocab(self):
        return {f"w{k}": k for k in range(VOCABULARY)} | self.extra

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " " + " ".join(f"w{k}" for k in ids if k not in (self.pad_token_id, self.eos_token_id)) + " "


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.4)
    return GPT2LMHeadModel(config).eval()


def oracle(model, prompts, max_new_tokens, stops=(1,)):
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(max_new_tokens):
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if token in stops:
                    break
                ids.append(token)
        answers.append(" ".join(f"w{k}" for k in ids[len(prompt) :] if k not in (0, 1)))
    return answers


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("batch_rows", [1, 2, 8])
def test_answers_equal_a_plain_greedy_loop(build, batch_rows):
    model = build()
    expected = oracle(model, PROMPTS, 7)
    assert len(set(expected)) > 1
    assert generate_answers(model, Letters(), PROMPTS, max_new_tokens=7, batch_rows=batch_rows) == expected


def test_answers_stop_at_end_of_sequence_and_at_end_of_turn():
    model = llama()
    free = oracle(model, PROMPTS, 8, stops=())
    stop = int(free[0].split()[3][1:])

    class EndsBySequence(Letters):
        eos_token_id = stop

    class EndsByTurn(Letters):
        extra = {"<|im_end|>": stop}  # noqa: RUF012

    for tokenizer, stops in ((EndsBySequence(), (stop,)), (EndsByTurn(), (1, stop))):
        answers = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, batch_rows=2)
        assert answers == oracle(model, PROMPTS, 8, stops)
        assert len(answers[0].split()) == 3


def test_the_models_own_generation_settings_are_ignored_and_kept():
    model = llama()
    expected = oracle(model, PROMPTS, 6)
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, max_length=3, num_beams=3)
    model.generation_config = own
    assert generate_answers(model, Letters(), PROMPTS, max_new_tokens=6, batch_rows=3) == expected
    assert model.generation_config is own


def test_peft_adapters_count():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = LoraConfig(
        r=8,
        lora_alpha=64,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(llama(), settings).train()
    answers = generate_answers(model, Letters(), PROMPTS, max_new_tokens=6, batch_rows=2)
    assert model.training
    assert answers == oracle(model.eval(), PROMPTS, 6)
    assert answers != oracle(llama(), PROMPTS, 6)


def test_end_ids_are_unique_and_found_in_the_vocabulary():
    tokenizer = Letters()
    tokenizer.extra = {"<|im_end|>": 1, "<|eot_id|>": 30, "<|endoftext|>": 31}
    assert end_ids(tokenizer) == [1, 30]
    tokenizer.eos_token_id = None
    assert end_ids(tokenizer) == [1, 30]


def test_a_tokenizer_without_padding_pads_with_the_end():
    class NoPadding(Letters):
        pad_token_id = None

    model = llama()
    answers = generate_answers(model, NoPadding(), PROMPTS, max_new_tokens=5, batch_rows=8)
    expected = [" ".join(w for w in answer.split()) for answer in oracle(model, PROMPTS, 5)]
    assert [a.replace("w0", "").split() for a in answers] == [e.split() for e in expected]


def test_bad_input_is_refused():
    model = llama()

    class Nothing(Letters):
        pad_token_id = None
        eos_token_id = None

    with pytest.raises(ConfigError, match="neither a padding"):
        generate_answers(model, Nothing(), PROMPTS, max_new_tokens=2)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        generate_answers(model, Letters(), PROMPTS, max_new_tokens=0)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        generate_answers(model, Letters(), [[1], []], max_new_tokens=2)
    assert generate_answers(model, Letters(), [], max_new_tokens=2) == []
