"""Label likelihoods against one plain forward per (row, label)."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, MistralConfig

from tests.support.small_models import CONFIGS, FALLBACKS, GPT2, SMALL, VOCABULARY, build
from treelora.errors import ConfigError, DataError
from treelora.evaluation.choice import score_choices
from treelora.models.packing import supports_packing


def draw_rows(seed, rows=7):
    rng = np.random.default_rng(seed)
    ids = lambda k: rng.integers(0, VOCABULARY, size=k).tolist()  # noqa: E731
    prompts = [ids(rng.integers(1, 12)) for _ in range(rows)]
    choices = [[ids(rng.integers(1, 6)) for _ in range(rng.integers(1, 5))] for _ in range(rows)]
    return prompts, choices


def oracle(model, prompts, choices):
    """Unpadded, unbatched, all logits, log_softmax: nothing shared with the code under test."""
    scores = []
    with torch.no_grad():
        for prompt, row in zip(prompts, choices, strict=True):
            values = []
            for choice in row:
                logits = model(input_ids=torch.tensor([[*prompt, *choice]])).logits[0].float()
                log_probs = torch.log_softmax(logits, dim=-1)
                each = [log_probs[len(prompt) - 1 + k, token].item() for k, token in enumerate(choice)]
                values.append(sum(each) / len(each))
            scores.append(values)
    return scores


def assert_scores(actual, expected, atol=1e-4):
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def llama():
    return build(CONFIGS["llama"])


@pytest.mark.parametrize(
    ("name", "attention"),
    # transformers refuses SDPA for Gemma 2, whose attention caps its logits.
    [(n, a) for n in CONFIGS for a in ("sdpa", "eager") if not (n.startswith("gemma2") and a == "sdpa")],
)
def test_packed_and_naive_equal_one_plain_forward_per_label(name, attention):
    model = build(CONFIGS[name], attention)
    prompts, choices = draw_rows(1)
    expected = oracle(model, prompts, choices)
    assert supports_packing(model, longest=16)
    assert_scores(score_choices(model, prompts, choices, pad_id=3, batch_rows=3), expected)
    assert_scores(score_choices(model, prompts, choices, pad_id=3, batch_rows=3, method="naive"), expected)


@pytest.mark.parametrize("name", FALLBACKS)
def test_models_without_custom_masks_fall_back_and_stay_right(name):
    model = build(FALLBACKS[name])
    prompts, choices = draw_rows(2)
    assert not supports_packing(model, longest=5)
    assert_scores(score_choices(model, prompts, choices, pad_id=3, batch_rows=3), oracle(model, prompts, choices))


def test_a_sliding_window_packs_just_up_to_its_width():
    model = build(MistralConfig(**SMALL, sliding_window=6))
    assert supports_packing(model, 6)
    assert not supports_packing(model, 7)
    prompts, choices = [[1, 2, 3, 4]], [[[5, 6, 7], [8, 9]]]  # 4 + 3 - 1 = 6 tokens on the longest path
    assert_scores(score_choices(model, prompts, choices, pad_id=0), oracle(model, prompts, choices))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), batch_rows=st.integers(1, 9), pad_id=st.integers(0, VOCABULARY - 1))
def test_scores_depend_on_neither_batching_nor_padding_nor_order(llama, seed, batch_rows, pad_id):
    prompts, choices = draw_rows(seed)
    expected = score_choices(llama, prompts, choices, pad_id=0, batch_rows=1)
    assert_scores(score_choices(llama, prompts, choices, pad_id=pad_id, batch_rows=batch_rows), expected, 1e-5)
    order = np.random.default_rng(seed).permutation(len(prompts))
    shuffled = score_choices(
        llama, [prompts[i] for i in order], [choices[i] for i in order], pad_id=0, batch_rows=batch_rows
    )
    assert_scores(shuffled, [expected[i] for i in order], 1e-5)


def test_choices_do_not_see_one_another(llama):
    prompt, choices = [5, 6, 7], [[1, 2, 3], [4, 5], [6]]
    together = score_choices(llama, [prompt], [choices], pad_id=0)[0]
    alone = [score_choices(llama, [prompt], [[choice]], pad_id=0)[0][0] for choice in choices]
    reversed_order = score_choices(llama, [prompt], [choices[::-1]], pad_id=0)[0]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, reversed_order[::-1], atol=1e-5)


def test_labels_that_share_a_first_token_are_told_apart(llama):
    scores = score_choices(llama, [[5, 6, 7]], [[[9, 10], [9, 11], [9]]], pad_id=0)[0]
    assert len({round(float(s), 3) for s in scores}) == 3


def test_uniform_logits_give_the_log_of_the_vocabulary():
    model = build(CONFIGS["llama"])
    torch.nn.init.zeros_(model.lm_head.weight)
    scores = score_choices(model, [[1, 2], [3]], [[[1, 2, 3]], [[4], [5, 6]]], pad_id=0)
    assert_scores(scores, [[-np.log(VOCABULARY)], [-np.log(VOCABULARY)] * 2], 1e-6)


def test_peft_adapters_count(llama):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapted = get_peft_model(
        build(CONFIGS["llama"]),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    ).eval()
    prompts, choices = draw_rows(3)
    expected = oracle(adapted, prompts, choices)
    scores = score_choices(adapted, prompts, choices, pad_id=0, batch_rows=4)
    assert_scores(scores, expected)
    plain = score_choices(llama, prompts, choices, pad_id=0, batch_rows=4)
    assert max(np.abs(a - b).max() for a, b in zip(scores, plain, strict=True)) > 0.01


def test_prompt_learning_falls_back_and_stays_right():
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(2)
    model = get_peft_model(
        build(CONFIGS["llama"]), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    assert not supports_packing(model, longest=5)
    prompts, choices = draw_rows(4, rows=3)
    expected = []
    with torch.no_grad():
        for prompt, row in zip(prompts, choices, strict=True):
            values = []
            for choice in row:
                logits = model(input_ids=torch.tensor([[*prompt, *choice]])).logits[0, 3:]
                log_probs = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
                values.append(log_probs.gather(1, torch.tensor(choice)[:, None]).mean().item())
            expected.append(values)
    assert_scores(score_choices(model, prompts, choices, pad_id=0, batch_rows=2), expected)


def test_bfloat16_logits_are_normalised_in_float32():
    model = build(CONFIGS["llama"], dtype=torch.bfloat16)
    prompts, choices = draw_rows(5)
    expected = oracle(model, prompts, choices)
    assert_scores(score_choices(model, prompts, choices, pad_id=0), expected, atol=0.1)
    torch.nn.init.zeros_(model.lm_head.weight)
    uniform = score_choices(model, prompts, choices, pad_id=0)
    # bfloat16 would round -4.5747 to -4.5625.
    assert_scores(uniform, [[-np.log(VOCABULARY)] * len(row) for row in choices], 1e-5)


@pytest.mark.parametrize("method", ["packed", "naive"])
@pytest.mark.parametrize("batch_rows", [1, 3, 7, 8])
def test_number_of_forwards_depends_on_the_number_of_rows_only(llama, method, batch_rows):
    calls = []
    handle = llama.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for seed in range(3):
            calls.clear()
            score_choices(llama, *draw_rows(seed), pad_id=0, batch_rows=batch_rows, method=method)
            assert len(calls) == -(-7 // batch_rows)
    finally:
        handle.remove()


def test_packed_computes_logits_only_where_labels_stand(llama):
    widths = []
    handle = llama.lm_head.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    try:
        score_choices(llama, [[1] * 30], [[[1, 2], [3, 4, 5], [6]]], pad_id=0)
    finally:
        handle.remove()
    assert widths == [1 + 1 + 2 + 0]


def test_training_flags_come_back_each_on_its_own():
    model = build(CONFIGS["llama"]).train()
    model.model.layers[0].eval()
    score_choices(model, [[1]], [[[2]]], pad_id=0)
    assert model.training
    assert not model.model.layers[0].mlp.training
    assert model.model.layers[1].mlp.training


def test_dropout_is_off():
    model = build(GPT2Config(**GPT2, resid_pdrop=0.5, embd_pdrop=0.5)).train()
    first = score_choices(model, [[1, 2]], [[[3, 4], [5]]], pad_id=0)[0]
    np.testing.assert_array_equal(first, score_choices(model, [[1, 2]], [[[3, 4], [5]]], pad_id=0)[0])


def test_no_rows_give_no_scores(llama):
    assert score_choices(llama, [], [], pad_id=0) == []


@pytest.mark.parametrize(
    ("prompts", "choices", "message"),
    [
        ([[1], []], [[[1]], [[1]]], "prompt 1 has no tokens"),
        ([[1], [2]], [[[1]], []], "row 1 has no choices"),
        ([[1]], [[[1], []]], "row 0: choice 1 has no tokens"),
        ([[1], [2]], [[[1]]], "2 prompts but 1 lists"),
    ],
)
def test_bad_rows_are_refused_by_number(llama, prompts, choices, message):
    with pytest.raises(DataError, match=message):
        score_choices(llama, prompts, choices, pad_id=0)


def test_bad_settings_are_refused(llama):
    with pytest.raises(ConfigError, match="'fast'"):
        score_choices(llama, [[1]], [[[1]]], pad_id=0, method="fast")
    with pytest.raises(ConfigError, match="batch_rows is 0"):
        score_choices(llama, [[1]], [[[1]]], pad_id=0, batch_rows=0)


def test_a_model_with_nan_weights_is_reported():
    model = build(CONFIGS["llama"])
    with torch.no_grad():
        model.lm_head.weight[4, 0] = torch.nan
    with pytest.raises(DataError, match="row 0, choice 0"):
        score_choices(model, [[1]], [[[4]]], pad_id=0)
