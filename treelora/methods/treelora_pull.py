"""How TreeLoRA pulls a step towards the arms: the `penalty` axis on an engine (formulas: `treelora.penalty`).

Adapter tensors are named as in `treelora.adapters`; gradients of B are compared, because A's vanish while B is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from treelora.adapters import AdapterState
from treelora.engine import Engine
from treelora.methods.extra_gradient import (
    adapter_gradient,
    flatten,
    leaf_vector,
    unflatten,
    write_leaf_vector,
)
from treelora.penalty import prox, sign_gradient, soft_gradient

Losses = Sequence[Callable[[], Tensor]]
Scalars = dict[str, float | Tensor]
PROBE = 1e-3
"""How far each coordinate of B is moved for a finite difference."""


def correct(engine: Engine, before_D: Tensor, correction: Callable[[Tensor], tuple[Tensor, Scalars]]) -> Scalars:
    """Change the adapter that has just stepped, or its open slice. Collective.

    All tensors as one vector of D numbers: hundreds of small ones would cost more than the arithmetic.

    Args:
        engine: Has stepped.
        before_D: Its leaves before that, as `leaf_vector` gives them.
        correction: From its leaves now what they shall be, and scalars.

    Returns:
        These scalars, and penalty_ratio (the correction over the optimizer's step, L1).
    """
    stepped_D = leaf_vector(engine)
    corrected_D, scalars = correction(stepped_D)
    write_leaf_vector(engine, corrected_D)
    by_penalty, by_loss = (corrected_D - stepped_D).abs().sum(), (stepped_D - before_D).abs().sum()
    return scalars | {"penalty_ratio": by_penalty / by_loss.clamp_min(1e-30)}


def pulled(stepped_D: Tensor, anchor_D: Tensor, lr: float, strength: float) -> tuple[Tensor, Scalars]:
    """`prox`: an adapter after the optimizer's step, brought near the arms' adapters.

    Args:
        stepped_D: Its leaves, as `leaf_vector` gives them.
        anchor_D: The adapter whose tensors are those of each layer's arm.
        lr: Learning rate of the step; the threshold is lr x strength.
        strength: Lambda.

    Returns:
        The leaves; and sparsity (share of coordinates that equal the arm's) and penalty_loss (lambda times the L1
        distance left).
    """
    pulled_D, kept = prox(stepped_D, anchor_D, lr * strength)
    left = strength * (pulled_D - anchor_D).abs().sum()
    return pulled_D, {"sparsity": kept / len(pulled_D), "penalty_loss": left}


def pull_gradients(
    engine: Engine,
    kind: str,
    gradients: Mapping[str, Tensor],
    arm_gradients: Mapping[str, Tensor],
    strength: float,
    losses: Losses = (),
) -> Scalars:
    """`soft`, `sign` and `exact`: before the optimizer's step, change the gradients. Collective.

    Args:
        engine: Holds the gradients of the step.
        kind: Which penalty.
        gradients: The step's own, by name.
        arm_gradients: The arms', for each B.
        strength: Lambda.
        losses: The step's micro-batches on `engine.module`; for `exact` only.

    Returns:
        penalty_ratio (norm of what was added over the norm of the gradient) and penalty_loss (lambda times the L1
        distance of the gradients of B).
    """
    if kind == "exact":
        added = hessian_pull(engine, gradients, arm_gradients, strength, losses)
        changed = {name: gradients[name] + added[name] for name in gradients}
    else:
        function = {"soft": soft_gradient, "sign": sign_gradient}[kind]
        changed = {name: function(gradients[name], anchor, strength) for name, anchor in arm_gradients.items()}
    engine.set_adapter_gradients(changed)
    apart = torch.stack([(gradients[name] - anchor).abs().sum() for name, anchor in arm_gradients.items()]).sum()
    by_penalty = torch.stack([(changed[name] - gradients[name]).norm() for name in changed]).norm()
    by_loss = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return {"penalty_ratio": by_penalty / by_loss.clamp_min(1e-30), "penalty_loss": strength * apart}


def hessian_pull(
    engine: Engine,
    gradients: Mapping[str, Tensor],
    arm_gradients: Mapping[str, Tensor],
    strength: float,
    losses: Losses,
) -> dict[str, Tensor]:
    """Eq. 3's gradient of ||g - g_k||_1, that is H sign(g - g_k), at lambda times the gradient's own norm. Collective.

    H is the Hessian of the step's loss in the adapter's weights; its product with the signs (zero for A) comes from a
    central difference, two passes forward and backward, because fused attention has no second derivative. The
    product's own scale is unusable (559 times the gradient's in one measurement), hence the rescaling. Zero where
    gradients and arms agree.
    """
    shapes = {name: gradient.shape for name, gradient in gradients.items()}
    direction = {
        name: torch.sign(gradients[name] - arm_gradients[name]) if name in arm_gradients else torch.zeros(shape)
        for name, shape in shapes.items()
    }
    weights = {name: tensor.clone() for name, tensor in engine.adapter_tensors().items()}
    sides = []
    for side in (PROBE, -PROBE):
        moved = {name: tensor + side * direction[name].to(tensor) for name, tensor in weights.items()}
        with engine.using_adapter(moved), torch.random.fork_rng():  # the same dropout on both sides
            torch.manual_seed(0)
            sides.append(flatten(adapter_gradient(engine, losses)))
    product = (sides[0] - sides[1]) / (2 * PROBE)
    norm = flatten(dict(gradients)).norm()
    return unflatten(strength * norm * product / product.norm().clamp_min(1e-30), shapes)


def arm_adapter(anchors: Sequence[Mapping[str, Tensor]], arm_of: Callable[[str], int]) -> AdapterState:
    """The adapter whose tensors are those of each layer's own arm."""
    return {name: anchors[arm_of(name)][name] for name in anchors[0]}
