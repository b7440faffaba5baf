"""`python -m benchmarks.bare_loop CONFIG OUT [by-hand]`: a loop of peft and torch alone on a stream's second task.

What the platform is compared with (`benchmarks.training`): the same arithmetic on the same batches; with `by-hand` as
one writes it, rows padded to the longest and logits at every position. Writes an event a step, as a run does.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from treelora.models.causal import load_model, load_tokenizer
from treelora.models.spec import ModelSpec
from treelora.objective import answer_loss
from treelora_platform.config import load_config
from treelora_platform.precision import settled
from treelora_platform.prepare import cache_folder, prepare_stream
from treelora_platform.stream_data import text_data


def main(config_file: str, out: str, *how: str) -> None:
    """Go through the task."""
    config = settled(load_config(config_file, []), torch.device("cpu"))
    torch.set_num_threads(round(config.cluster.cpus_per_worker))
    model = load_model(ModelSpec(config.model.name, config.model.dtype))
    lora = config.lora
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules)
    )
    model = get_peft_model(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.train.learning_rate)
    tasks = list(prepare_stream(config).stream)
    units, _ = text_data(config, tasks, load_tokenizer(config.model.name), cache_folder(config) / "tokens", model)
    unit = units[1]
    model.train()
    with Path(out).open("w", encoding="utf-8") as file:
        for step in range(unit.plan.steps):
            (batch,) = unit.micro_batches(step, 0, 1, torch.device("cpu"))
            if how:
                names = ("input_ids", "attention_mask", "position_ids", "labels")
                loss = model(**{name: batch[name] for name in names}).loss
            else:
                loss = answer_loss(model, batch, unit.normaliser(step, 1))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, config.train.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            rows = batch if how or not batch["packed"] else batch["packed"]
            places, tokens = rows["input_ids"].numel(), unit.tokens(step)
            done = {"kind": "step", "time": time.time(), "step": step + 1, "tokens": tokens, "places": places}
            print(json.dumps(done), file=file)
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
