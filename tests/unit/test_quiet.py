import warnings

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from treelora_platform.quiet import quiet


def test_no_bars_and_no_notes_for_developers(tmp_path, capfd):
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    capfd.readouterr()
    logging.enable_progress_bar()
    LlamaForCausalLM.from_pretrained(tmp_path)
    assert "Loading weights" in capfd.readouterr().err  # what it is about
    with quiet():
        LlamaForCausalLM.from_pretrained(tmp_path)
        warnings.warn("use the other one", FutureWarning, stacklevel=1)
    assert capfd.readouterr().err == ""
    with pytest.warns(FutureWarning, match="use the other one"):
        warnings.warn("use the other one", FutureWarning, stacklevel=1)
