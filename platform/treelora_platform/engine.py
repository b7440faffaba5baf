"""The DeepSpeed engine: ZeRO stages 0 to 3 behind `treelora.engine.Engine`. The only file that imports deepspeed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from treelora.adapters import adapter_parameters, head_parameters
from treelora.engine import MOMENTS, OptimizerSpec, destinations, make_optimizer, whole_tensors
from treelora.models.vision import image_format
from treelora.sliced import own_parameters, show_slice, sliced_factors
from treelora_platform.config import ExperimentConfig
from treelora_platform.lean_imports import without

with without("mlflow"):  # DeepSpeed's autotuner would log to it, if it were used
    import deepspeed
    from deepspeed.utils import (
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
    )

T = TypeVar("T")

# A C++ extension that DeepSpeed would compile at first use, for half a minute and with a compiler that users may lack;
# gloo moves the few megabytes of adapters well enough.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _import_muon() -> None:
    # DeepSpeed asks whether our optimizer is its Muon, whose module calls torch.compile as it is imported: a second.
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    except ImportError:
        pass  # a DeepSpeed without Muon
    finally:
        del os.environ[_NO_COMPILER]
        if before is not None:
            os.environ[_NO_COMPILER] = before


_NO_COMPILER = "TORCHDYNAMO_DISABLE"
_import_muon()


def deepspeed_config(config: ExperimentConfig, world_size: int, trainable: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for an experiment; `trainable` counts the numbers that change.

    No mixed precision is asked of DeepSpeed: the frozen weights are bfloat16 already, and the adapters stay float32.
    """
    engine, train = config.engine, config.train
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    # DeepSpeed makes its bucket anew at every backward pass; the default, 5e8 numbers, cost two seconds a step on a CPU
    bucket = min(500_000_000, max(trainable, 100_000))
    zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if engine.zero_stage == 3:
        # adapters are smaller than a message is worth: kept whole on every rank, they cost no gathering
        zero |= {"stage3_param_persistence_threshold": 1_000_000}
        if engine.offload_weights:
            zero["offload_param"] = {"device": "cpu"}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": train.global_batch // (world_size * train.accumulation),
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """A data-parallel worker of DeepSpeed. `torch.distributed` must be initialised, as Ray Train does."""

    def __init__(self, module: nn.Module, spec: OptimizerSpec, config: ExperimentConfig, device: torch.device):
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device
        self.stage = config.engine.zero_stage
        self.accumulation = config.train.accumulation
        self.autocast = device.type == "cuda" and config.model.dtype == "bfloat16"
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = make_optimizer(trained, spec)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(config, self.world_size, sum(p.numel() for p in trained)),
            dist_init_required=False,
        )
        self.module = self.engine.module
        self.parameters, self.head = adapter_parameters(self.module), head_parameters(self.module)
        self.factors, self.leaves = sliced_factors(self.module), own_parameters(self.module)
        self.trained = self.leaves | self.head
        self._materialise_moments()

    def forward_model(self) -> Callable[..., Any]:
        """See `Engine`."""
        if not self.autocast:
            return self.engine

        def forward(**batch: Any) -> Any:
            with torch.autocast("cuda", torch.bfloat16):
                return self.engine(**batch)

        return forward

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine`."""
        self.engine.backward(loss * self.accumulation)  # DeepSpeed divides by it
        if not last:
            self.engine.step()  # counts the micro-batch, updates nothing

    def adapter_gradients(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: safe_get_full_grad(p).float() for name, p in self.leaves.items()}

    def set_adapter_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        for name, gradient in gradients.items():
            safe_set_full_grad(self.leaves[name], gradient)

    def step(self, lr: float) -> Tensor | float:
        """See `Engine`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:  # without ZeRO, DeepSpeed neither tells the norm nor minds infinity
            norm = torch.nn.utils.get_total_norm([safe_get_full_grad(p).float() for p in self.trained.values()])
            if not norm.isfinite():
                self.drop_gradients()
                return norm
            self.engine.step()
            return norm
        self.engine.step()
        return self.engine.get_global_grad_norm() or 0.0

    def drop_gradients(self) -> None:
        """See `Engine`."""
        self.engine.optimizer.zero_grad()
        self.engine.micro_steps += 1

    def reset_optimizer(self) -> None:
        """See `Engine`."""
        for state in self._moments().values():
            for value in state.values():
                value.zero_()

    def adapter_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        self._whole(self.leaves)
        return whole_tensors(self._whole(self.parameters), self.factors)

    def adapter_leaves(self) -> dict[str, nn.Parameter]:
        """See `Engine`."""
        return self._whole(self.leaves)

    def head_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: parameter.detach() for name, parameter in self._whole(self.head).items()}

    def write_adapter(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        self._write(destinations(self.parameters | self.head, self.factors, state))

    def write_leaves(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        self._write([(self.leaves[name], tensor) for name, tensor in state.items()])

    @contextmanager
    def using_adapter(self, state: Mapping[str, Tensor] | None) -> Iterator[None]:
        """See `Engine`."""
        if state is None:
            yield
            return
        kept = {name: tensor.clone() for name, tensor in self.adapter_tensors().items() if name in state}
        self._write_module(destinations(self.parameters, self.factors, state))
        try:
            yield
        finally:
            self._write_module(destinations(self.parameters, self.factors, kept))

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        moments = self._moments()
        step = float(next(iter(moments.values()))["step"])
        if step == 0:
            return {}
        saved = {"step": torch.tensor([step])}
        for name, parameter in self.trained.items():
            for moment in MOMENTS:
                value = (
                    moments[parameter][moment] if self.stage == 0 else safe_get_full_optimizer_state(parameter, moment)
                )
                saved[f"{moment}/{name}"] = value.detach().float().cpu().clone()
        return saved

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        self.reset_optimizer()
        if not state:
            return
        moments = self._moments()
        for name, parameter in self.trained.items():
            for moment in MOMENTS:
                value = state[f"{moment}/{name}"].to(self.device)
                if self.stage == 0:
                    moments[parameter][moment].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)
        for own in moments.values():
            own["step"].copy_(state["step"].reshape(()))

    def all_reduce(self, tensor: Tensor, mean: bool = False) -> Tensor:
        """See `Engine`."""
        reduced = tensor.detach().clone()
        dist.all_reduce(reduced)
        return reduced / self.world_size if mean else reduced

    def broadcast(self, value: T) -> T:
        """See `Engine`."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """See `Engine`."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def _materialise_moments(self) -> None:
        # ZeRO links its shards of the moments at the first step; a zero gradient at rate zero changes no weight
        show_slice(self.module, 0)  # or a slice's parameter would have no gradient
        inputs = self._any_inputs()
        for micro in range(self.accumulation):
            logits = self.forward_model()(**inputs).logits
            self.backward(logits.float().sum() * 0.0, last=micro == self.accumulation - 1)
        self.step(0.0)
        show_slice(self.module, None)
        self.reset_optimizer()

    def _any_inputs(self) -> dict[str, Tensor]:
        if self.head:
            form, dtype = image_format(self.module), next(self.module.parameters()).dtype
            size = (1, form.channels, form.height, form.width)
            return {"pixel_values": torch.zeros(size, dtype=dtype, device=self.device)}
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return {"input_ids": token, "attention_mask": torch.ones_like(token)}

    def _whole(self, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        if self.stage == 3:
            # forward passes without a backward pass confuse ZeRO's trace, and it then puts away what it should keep
            away = [p for p in parameters.values() if p.numel() != p.ds_numel]  # type: ignore[attr-defined]
            if away:
                away[0].all_gather(away)  # type: ignore[attr-defined]
        return parameters

    def _moments(self) -> dict[Any, dict[str, Tensor]]:
        optimizer = self.engine.optimizer
        return getattr(optimizer, "optimizer", optimizer).state

    def _write(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._write_module(parts)
        if self.stage > 0 and any(target.requires_grad for target, _ in parts):
            # all shards at once: DeepSpeed's setter for one parameter costs more than the whole copy
            self.engine.optimizer.refresh_fp32_params()

    def _write_module(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        on_device = [tensor.to(self.device, torch.float32) for _, tensor in parts]
        with self._gathered([target for target, _ in parts if isinstance(target, nn.Parameter)]):
            torch._foreach_copy_([target.data for target, _ in parts], on_device)

    def _gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        if self.stage < 3:
            return nullcontext()
        for parameter in parameters:
            # gradients taken beside the step end at the adapters, and leave them marked as in use by their modules
            parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
