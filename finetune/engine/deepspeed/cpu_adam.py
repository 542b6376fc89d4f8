"""DeepSpeed's CPU Adam, with the bias correction of torch's AdamW."""

from __future__ import annotations

import math
from typing import Any

import torch


def cpu_adam(groups: list[dict], **settings: Any) -> torch.optim.Optimizer:
    """DeepSpeed's CPU Adam in AdamW mode, for optimizer states in host memory."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    _correct_bias_in_double(optimizer)
    return optimizer


def _correct_bias_in_double(optimizer: torch.optim.Optimizer) -> None:
    """Take Adam's bias correction out of DeepSpeed's C++ op, which subtracts beta^t from 1 in float32.

    With beta2 0.999 that costs up to 7e-6 of the step size in the first steps, enough to see in the losses. With r =
    sqrt(1 - b2^t), lr / (1 - b1^t) * m / (sqrt(v) / r + eps) is (lr * r / (1 - b1^t)) * m / (sqrt(v) + eps * r): the
    learning rate and epsilon carry the correction. Hooks and not a subclass, because ZeRO-3 asks for this very type.
    """
    names = ("lr", "eps", "weight_decay", "bias_correction")
    kept: list[dict] = []

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        kept[:] = [{name: group[name] for name in names} for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            beta1, beta2 = torch.tensor(group["betas"], dtype=torch.float32).tolist()  # what the op computes with
            step = 1 + max(
                (optimizer.state[p].get("step", 0) for p in group["params"] if p in optimizer.state), default=0
            )
            root = math.sqrt(1 - beta2**step)
            factor = root / (1 - beta1**step)
            group.update(
                lr=group["lr"] * factor,
                eps=group["eps"] * root,
                bias_correction=False,
                weight_decay=group["weight_decay"] / factor,
            )

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, values in zip(optimizer.param_groups, kept, strict=True):
            group.update(values)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
