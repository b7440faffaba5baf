"""LoRA adapters on peft: attach, read, start, merge, and the bank of one adapter a task.

An adapter's state is a dict of peft's own tensor names (as in `adapter_model.safetensors`) to float32 CPU tensors.
Shapes: r rank, N tasks, A [r, in], B [out, r].
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treelora.errors import CheckpointError, ConfigError

AdapterState = dict[str, Tensor]
ADAPTER = "default"
PROMPTS, HEAD = "prompts.", "head."
"""What names of a `models.prompted.Prompted` begin with."""


@dataclass(frozen=True)
class LoraSpec:
    """Shape of the adapters (Hu et al., 2021, arXiv 2106.09685): the update of a weight is alpha / rank x B A."""

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    layers: tuple[int, ...] | None = None


def attach_lora(model: nn.Module, spec: LoraSpec, seed: int, head: str | None = None) -> Any:
    """Put adapters on a frozen model and start them from the shared seeded A and zero B.

    Args:
        head: Name of an image classifier's last layer, which is trained as a whole beside them; it starts from small
            seeded weights, the same for a class however many there are.

    Returns:
        The `peft.PeftModel`; its LoRA parameters are float32, whatever the base weights are.

    Raises:
        ConfigError: no module of the model bears one of the target names.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=None if head else TaskType.CAUSAL_LM,
        modules_to_save=[head] if head else None,
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # declared int, but only ever divided
        lora_dropout=spec.dropout,
        target_modules=list(spec.target_modules),
        layers_to_transform=list(spec.layers) if spec.layers is not None else None,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"lora.target_modules {list(spec.target_modules)}: not in this model; it has {', '.join(names)}"
        ) from error
    for name, parameter in adapter_parameters(adapted).items():
        parameter.data = parameter.data.float()
        parameter.data.copy_(fresh_tensor(name, parameter.shape, seed))
    for name, parameter in head_parameters(adapted).items():
        parameter.data = fresh_head(name, parameter.shape, seed)
    if head:
        copy: nn.Module = adapted.get_submodule(f"base_model.model.{head}.modules_to_save.{ADAPTER}")
        copy.register_forward_pre_hook(_in_float)
    return adapted


def _in_float(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # the head is float32, what comes to it may not be
    return (args[0].float(), *args[1:])


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable LoRA parameters, or prompts, in model order; of LoRA by the names that peft saves them under."""
    return {
        name.replace(f".{ADAPTER}.weight", ".weight"): parameter
        for name, parameter in model.named_parameters()
        if name.startswith(PROMPTS) or (f".{ADAPTER}.weight" in name and ("lora_A" in name or "lora_B" in name))
    }


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a classifier's head, by the names that peft saves them under; {} without one."""
    inner = f".modules_to_save.{ADAPTER}."
    return {
        name.replace(inner, "."): p for name, p in model.named_parameters() if inner in name or name.startswith(HEAD)
    }


def fresh_head(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Where a head starts: biases zero, a class's weights normal with deviation 0.02, whatever the other classes."""
    if len(shape) == 1:
        return torch.zeros(tuple(shape))
    generators = (torch.Generator().manual_seed(seed_of(f"{name}/{row}", seed)) for row in range(shape[0]))
    return torch.stack([0.02 * torch.randn(shape[1], generator=generator) for generator in generators])


def fresh_tensor(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Where every adapter starts: B zero; A uniform as in peft, but the same for every task, worker and session.

    One A for all tasks keeps their gradients with respect to B in one space, so that they can be compared.
    """
    if ".lora_B." in name:
        return torch.zeros(tuple(shape))
    generator = torch.Generator().manual_seed(seed_of(name, seed))
    bound = 1 / math.sqrt(shape[1])  # kaiming_uniform with a = sqrt(5), as peft and nn.Linear
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def layer_of(name: str) -> str:
    """The adapted module that a tensor of an adapter belongs to."""
    return name.split(".lora_")[0]


def layer_names(names: Sequence[str]) -> list[str]:
    """The adapted modules, once each, in order: TreeLoRA's layers."""
    return list(dict.fromkeys(layer_of(name) for name in names))


def mean_adapter(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> AdapterState:
    """The rank-r adapter nearest to the (weighted) mean of the updates B_i A_i, by QR and a small SVD.

    The mean has rank N r. With shares p_i that add up to 1, Q_b R_b = [p_1 B_1 .. p_N B_N] and
    Q_a R_a = [A_1; ..; A_N]^T, the singular values of the mean are those of the (N r, N r) matrix R_b R_a^T, so no
    (out, in) matrix is ever formed. Truncation to r keeps the best Frobenius approximation (Eckart and Young, 1936).

    Args:
        states: The adapters.
        weights: Positive, one each; None: equal.

    Raises:
        ValueError: no state is given, weights don't fit, or tensors differ in name or shape.
    """
    if not states:
        raise ValueError("mean of no adapters")
    shares = torch.tensor([1.0] * len(states) if weights is None else list(weights), dtype=torch.float64)
    if len(shares) != len(states) or not (shares > 0).all():
        raise ValueError(f"weights {weights}: {len(states)} adapters need as many positive numbers")
    shares /= shares.sum()
    if len(states) == 1:
        return {name: tensor.clone() for name, tensor in states[0].items()}
    merged: AdapterState = {}
    for layer in layer_names(list(states[0])):
        name_a, name_b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        a = torch.cat([state[name_a] for state in states])
        b = torch.cat([float(p) * state[name_b] for p, state in zip(shares, states, strict=True)], dim=1)
        merged[name_a], merged[name_b] = _nearest(a, b, states[0][name_a].shape[0])
    return merged


def condensed(state: Mapping[str, Tensor], rank: int) -> AdapterState:
    """The adapter nearest to this one that is zero beyond a rank, by QR and a small SVD; of the same shapes."""
    result: AdapterState = {}
    for layer in layer_names(list(state)):
        name_a, name_b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        a, b = _nearest(state[name_a], state[name_b], rank)
        result |= {name_a: torch.zeros_like(state[name_a]), name_b: torch.zeros_like(state[name_b])}
        result[name_a][: len(a)], result[name_b][:, : len(a)] = a, b
    return result


def _nearest(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of at most a rank whose product is nearest to a larger A's and B's, both of like size."""
    (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a.T), torch.linalg.qr(b)
    u, s, v_T = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    return (root[:, None] * (v_T[: len(root)] @ q_a.T)).contiguous(), ((q_b @ u[:, : len(root)]) * root).contiguous()


def grown(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> AdapterState:
    """The adapter with zeros added up to larger ranks, or more prompts; its update stays what it was.

    Raises:
        CheckpointError: a tensor is missing, or is larger than its shape, or differs in more than that.
    """
    result: AdapterState = {}
    for name, shape in shapes.items():
        tensor = state.get(name)
        room = [] if tensor is None else [new - old for new, old in zip(shape, tensor.shape, strict=True)]
        rank_axis = 1 if ".lora_B." in name else 0
        if tensor is None or min(room) < 0 or any(room[:rank_axis] + room[rank_axis + 1 :]):
            found = "nothing" if tensor is None else list(tensor.shape)
            raise CheckpointError(f"adapter tensor {name}: found {found}, this run needs {list(shape)}")
        result[name] = tensor if tensor.shape == shape else torch.zeros(shape, dtype=tensor.dtype)
        if result[name] is not tensor:
            result[name][: tensor.shape[0], : tensor.shape[1]] = tensor
    return result


def grown_head(state: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> AdapterState:
    """A head with the rows of `fresh`, the same classes and then more, where it has none of its own.

    Raises:
        CheckpointError: it has other tensors, more classes, or another number of features.
    """
    if state.keys() != fresh.keys():
        raise CheckpointError(f"the head has tensors {sorted(state)}, this run needs {sorted(fresh)}")
    result: AdapterState = {}
    for name, tensor in state.items():
        if tensor.shape[1:] != fresh[name].shape[1:] or len(tensor) > len(fresh[name]):
            raise CheckpointError(
                f"head tensor {name}: found {list(tensor.shape)}, this run needs {list(fresh[name].shape)}"
            )
        result[name] = torch.cat([tensor, fresh[name][len(tensor) :]])
    return result


def save_adapter(state: Mapping[str, Tensor], peft_config: Any, folder: Path) -> None:
    """Write an adapter as peft does, so that `PeftModel.from_pretrained(base, folder)` loads it."""
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".adapter-"))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, scratch / "adapter_model.safetensors")
    peft_config.save_pretrained(scratch)
    doomed = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)  # of a process that was killed here
    if folder.exists():
        os.replace(folder, doomed)
    os.replace(scratch, folder)
    shutil.rmtree(doomed, ignore_errors=True)


def load_adapter(folder: Path) -> AdapterState:
    """Read what `save_adapter`, or peft, wrote.

    Raises:
        CheckpointError: the folder lacks an adapter, or the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no readable adapter ({error})") from None


def seed_of(name: str, seed: int) -> int:
    """A seed for each name."""
    return (seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63
