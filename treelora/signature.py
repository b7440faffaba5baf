"""Task signatures: which direction a task's gradient takes in each adapted layer.

Shapes: L adapted modules ("layers"), r probe rank, B batch, T tokens, S = B T, in_l and out_l features of module l.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from treelora.errors import ConfigError
from treelora.sketch import PURPOSE_PROBE, keyed_bits


def adapted_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All peft LoRA modules that wrap a linear layer, in model order: the "layers" of TreeLoRA.

    Raises: ConfigError where there is none, or where one wraps something other than nn.Linear.
    """
    from peft.tuners.lora import LoraLayer

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if not found:
        raise ConfigError("the model has no LoRA module: wrap it with peft.get_peft_model and target_modules")
    for name, module in found:
        base = module.get_base_layer()
        if not isinstance(base, nn.Linear):
            raise ConfigError(f"{name} adapts a {type(base).__name__}: name only nn.Linear in target_modules")
    return [(name, module) for name, module in found if isinstance(module, nn.Module)]


class GradientProbe:
    """Signature kind `probe_b`: s_l = d loss / d B_l at B = 0 on the base weights, behind a frozen probe A0.

    With y = W x + scale * B A0 x the gradient is s_l = scale * G_l A0^T, where G_l is the full gradient of
    W_l: a random projection of it on its input side, the same for all tasks, and not zero at the start,
    unlike the gradient of A (Eq. 1 of arXiv 2506.10355), which vanishes while B = 0. A0 has entries
    +-1/sqrt(r), so that E ||G A0^T||^2 = ||G||^2; it depends on (seed, layer)
    only.

    The probes B are free-standing tensors, not module parameters: an engine that shards parameters or
    gradients never sees them, and no parameter's .grad or requires_grad is changed.

    model: a peft model. rank: r. scale: the constant before B A0 (LoRA's alpha / r gives LoRA's own
    gradient).
    Raises: ConfigError (no LoRA modules, rank below 1).
    """

    def __init__(self, model: nn.Module, rank: int, seed: int, scale: float = 1.0) -> None:
        if rank < 1:
            raise ConfigError(f"probe rank = {rank}: must be at least 1")
        self.model: Any = model
        self.modules = adapted_modules(model)
        self.names = [name for name, _ in self.modules]
        self.rank = rank
        self.scale = scale
        # peft's own record of the sizes: a weight sharded by ZeRO-3 is empty.
        self._features = [_features(module) for _, module in self.modules]
        self._a0 = [
            _rademacher(rank, in_features, seed, layer) for layer, (in_features, _) in enumerate(self._features)
        ]

    @property
    def a0(self) -> list[Tensor]:
        """The frozen probes A0, [r, in_l] float32 for each layer, on the CPU."""
        return [a0.clone() for a0 in self._a0]

    @property
    def layer_dims(self) -> list[int]:
        """D_l = out_l * r of each layer: what a CountSketch of these signatures needs."""
        return [out_features * self.rank for _, out_features in self._features]

    def measure(self, loss_fn: Callable[[], Tensor]) -> list[Tensor]:
        """Gradient of one scalar loss for every layer: [out_l, r], float32, on the module's device.

        loss_fn runs the model's forward once (or more often) and returns the mean loss. The adapter is
        disabled while it runs, so dropout inside LoRA plays no part. Reentrant gradient checkpointing must be
        off.

        Raises: ConfigError where the loss isn't a scalar or doesn't depend on an adapted module.
        """
        probes: list[Tensor] = []
        hooks = []
        try:
            for layer, (_, module) in enumerate(self.modules):
                device, (_, out_features) = _device(module), self._features[layer]
                probe = torch.zeros(out_features, self.rank, device=device, requires_grad=True)
                probes.append(probe)
                hook = _add_probe(self._a0[layer].to(device), probe, self.scale)
                hooks.append(module.register_forward_hook(hook))
            with _base_weights_only(self.model), torch.enable_grad():
                loss = loss_fn()
                if loss.numel() != 1 or not loss.requires_grad:
                    raise ConfigError(
                        f"loss_fn returned shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}: "
                        "it must return a scalar computed by the adapted modules, outside torch.no_grad()"
                    )
                gradients = torch.autograd.grad(loss.reshape(()), probes, allow_unused=True)
        finally:
            for handle in hooks:
                handle.remove()
        for name, gradient in zip(self.names, gradients, strict=True):
            if gradient is None:
                raise ConfigError(f"the loss doesn't depend on {name}: turn gradient checkpointing off, or adapt less")
        return [gradient.detach() for gradient in gradients]


def gradient_vectors(named_grads: Mapping[str, Tensor], layer_names: Sequence[str]) -> list[Tensor]:
    """Signature kind `gradient`: each layer's lora_B gradient (mean over training steps), flat float32
    [out_l*r].

    named_grads: parameter name -> gradient, names as in `named_parameters()` of the peft model; other
    parameters are ignored. Raises: ConfigError for a layer without exactly one lora_B gradient.
    """
    return _factor_vectors(named_grads, layer_names, "lora_B")


def adapter_value_vectors(named_values: Mapping[str, Tensor], layer_names: Sequence[str]) -> list[Tensor]:
    """Signature kind `adapter_value`: each layer's lora_A *value*, flat float32 [r*in_l].

    What the released implementation of TreeLoRA uses in place of a gradient; for comparison only.
    """
    return _factor_vectors(named_values, layer_names, "lora_A")


def _factor_vectors(named: Mapping[str, Tensor], layer_names: Sequence[str], factor: str) -> list[Tensor]:
    by_layer: dict[str, list[str]] = {}
    for name in named:
        layer, found, rest = name.partition(f".{factor}.")
        if found and f".{rest}".endswith(".weight"):  # with or without the adapter's name
            by_layer.setdefault(layer, []).append(name)
    vectors = []
    for layer in layer_names:
        names = by_layer.get(layer, [])
        if len(names) != 1:
            raise ConfigError(f"{layer}: {len(names)} {factor} tensors {names}: pass those of one adapter")
        vectors.append(named[names[0]].detach().reshape(-1).to(torch.float32))
    return vectors


def _rademacher(rank: int, features: int, seed: int, layer: int) -> Tensor:
    bits = keyed_bits(seed, layer, rank * features, purpose=PURPOSE_PROBE) >> 63
    signs = torch.from_numpy(bits.astype("float32").reshape(rank, features)) * 2 - 1
    return signs / math.sqrt(rank)


def _features(module: Any) -> tuple[int, int]:
    return int(module.in_features), int(module.out_features)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _add_probe(a0: Tensor, probe: Tensor, scale: float) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(_: nn.Module, args: tuple[Any, ...], y_BTO: Tensor) -> Tensor:
        # x is detached: at B = 0 this path adds nothing to x's gradient. float32, so that the sum over tokens
        # of a bf16 model doesn't stall.
        with torch.autocast(y_BTO.device.type, enabled=False):
            z_BTr = args[0].detach().to(torch.float32) @ a0.T
            return y_BTO + (scale * (z_BTr @ probe.T)).to(y_BTO.dtype)

    return hook


@contextmanager
def _base_weights_only(model: Any) -> Iterator[None]:
    """peft's disable_adapter, which forgets which parameters were frozen: those flags are put back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
