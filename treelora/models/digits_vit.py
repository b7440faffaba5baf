"""`digits-vit`: a small ViT that knows the digits 0 to 3 in four orientations, for streams of the digits 4 to 9.

It stands for the pre-trained model of larger experiments where nothing can be downloaded: 200,000 weights, trained in
seconds on a CPU at its first use, on those of scikit-learn's 1,797 scanned digits (8 x 8 pixels; Alpaydin and Kaynak,
UCI, 1998, https://doi.org/10.24432/C50P49) whose classes no stream with this model has. Each image is shown in four
orientations that make classes of their own (Gidaris et al., ICLR 2018, arXiv 1803.07728), so that features are learnt
which four digits alone wouldn't need.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treelora.models.smollm2 import cache_home
from treelora.models.vision import new_head_is_meant

KNOWN_DIGITS = (0, 1, 2, 3)
ORIENTATIONS = 4
EPOCHS, BATCH_ROWS, LEARNING_RATE, SEED = 30, 128, 2e-3, 0
_FOLDER = "digits-vit-1"


def digits_vit(classes: int) -> nn.Module:
    """The model with a new head for so many classes; float32."""
    from transformers import ViTForImageClassification

    with new_head_is_meant():
        return ViTForImageClassification.from_pretrained(
            cached_digits_vit(), num_labels=classes, ignore_mismatched_sizes=True
        )


def cached_digits_vit() -> Path:
    """Folder with the trained model as safetensors, made on the first call."""
    from filelock import FileLock

    folder = cache_home() / _FOLDER
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # several workers of a machine may come here at once
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".digits-vit-") as scratch:
                trained_digits_vit().save_pretrained(Path(scratch) / "model")
                os.replace(Path(scratch) / "model", folder)
    return folder


def trained_digits_vit(epochs: int = EPOCHS) -> Any:
    """Train it; the process' random state is left as it was."""
    from transformers import ViTConfig, ViTForImageClassification

    pixels_nHW, labels_n = oriented(*known_images())
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(SEED)
        torch.set_num_threads(1)  # sums of several threads would come out otherwise on another machine
        config = ViTConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=ORIENTATIONS * len(KNOWN_DIGITS),  # type: ignore[call-arg]  # every configuration takes it
        )
        model = ViTForImageClassification(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        steps = epochs * (len(labels_n) // BATCH_ROWS)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _ in range(epochs):
            order = torch.randperm(len(labels_n))
            for rows in order[: len(order) // BATCH_ROWS * BATCH_ROWS].split(BATCH_ROWS):
                optimizer.zero_grad()
                logits = model(pixel_values=moved(pixels_nHW[rows])[:, None]).logits
                F.cross_entropy(logits, labels_n[rows]).backward()
                optimizer.step()
                schedule.step()
        torch.set_num_threads(threads)
    return model.eval()


def known_images() -> tuple[Tensor, Tensor]:
    """All images of the digits that the model knows: normalised to -1 to 1 [n, 8, 8], and their digits [n]."""
    from sklearn.datasets import load_digits

    images_nHW, digits_n = load_digits(return_X_y=True)
    known = [digit in KNOWN_DIGITS for digit in digits_n]
    pixels = torch.from_numpy(images_nHW[known].reshape(-1, 8, 8) / 8 - 1).float()
    return pixels, torch.from_numpy(digits_n[known])


def oriented(pixels_nHW: Tensor, digits_n: Tensor) -> tuple[Tensor, Tensor]:
    """Every image in four orientations; a digit and its orientation make a class."""
    turned = [torch.rot90(pixels_nHW, turns, (1, 2)) for turns in range(ORIENTATIONS)]
    labels = [ORIENTATIONS * digits_n + turns for turns in range(ORIENTATIONS)]
    return torch.cat(turned), torch.cat(labels)


def moved(pixels_nHW: Tensor) -> Tensor:
    """Shifted by up to one pixel in each direction, a shift an image."""
    padded = F.pad(pixels_nHW, (1, 1, 1, 1), value=-1.0)
    windows = padded.unfold(1, 8, 1).unfold(2, 8, 1)  # [n, 3, 3, 8, 8]
    down_n, across_n = torch.randint(3, (2, len(pixels_nHW)))
    return windows[torch.arange(len(pixels_nHW)), down_n, across_n]
