"""What the frozen base model makes of rows, in files: runs on the same rows share it, whatever they learn.

Keyed by content: the model's weights, the rows' tokens, and how they were batched. A damaged file is made again.

Shapes: n rows, F features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from treelora.data.sealed import read_sealed, write_sealed
from treelora.errors import DataError

SAMPLE = 64
"""Numbers of each frozen tensor that its model is told by."""


class FrozenCache:
    """A folder of files, for one model."""

    def __init__(self, folder: Path, model: nn.Module):
        self._folder, self._model = folder, frozen_fingerprint(model)

    def features(self, asked: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Float32 [n, F], as `compute` made them the first time that `asked`, plain values, was asked for."""

        def rows() -> pa.Array:
            made_nF = compute()
            return pa.FixedSizeListArray.from_arrays(pa.array(made_nF.flatten().numpy()), made_nF.shape[1])

        kept = self._kept("features", asked, rows)
        values = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in kept.chunks])
        return torch.from_numpy(values.reshape(len(kept), -1).copy())

    def answers(self, asked: Any, compute: Callable[[], list[str]]) -> list[str]:
        """An answer a row, likewise."""
        answers: list[str] = self._kept("answers", asked, lambda: pa.array(compute(), pa.string())).to_pylist()
        return answers

    def _kept(self, what: str, asked: Any, compute: Callable[[], pa.Array]) -> pa.ChunkedArray:
        digest = hashlib.sha256(json.dumps([what, self._model, asked]).encode()).hexdigest()
        path = self._folder / f"{what}-{digest[:32]}.arrow"
        if path.exists():
            try:
                batches, info = read_sealed(path)
                if info.get("digest") == digest:
                    return pa.chunked_array([batch.column(0) for batch in batches])
            except DataError:
                path.unlink(missing_ok=True)
        made = compute()
        batch = pa.record_batch([made], names=[what])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(path, batch.schema, [batch], {"digest": digest})
        return pa.chunked_array([made])


def frozen_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and some numbers of all tensors that aren't trained."""
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            sha.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            sha.update(parameter.detach().flatten()[:SAMPLE].float().cpu().numpy().tobytes())
    return sha.hexdigest()
