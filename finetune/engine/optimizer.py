"""The recipe's optimizer: its parameter groups, and the fastest implementation there is here."""

from __future__ import annotations

import torch
from torch import nn

from finetune.engine.deepspeed.cpu_adam import cpu_adam
from finetune.launch.strategy import Strategy
from finetune.model.parameters import parameter_shape
from finetune.recipe.fields import TrainingSection


def make_optimizer(model: nn.Module, training: TrainingSection, strategy: Strategy) -> torch.optim.Optimizer:
    """Optimizer over the trained parameters; weight decay on matrices only, as in Hugging Face's Trainer."""
    return build_optimizer(parameter_groups(model, training), training, strategy)


def parameter_groups(model: nn.Module, training: TrainingSection) -> list[dict]:
    """The trained parameters in torch's format: those with weight decay, and the others."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not training.weight_decay:
        return [{"params": trained, "weight_decay": 0.0}]
    matrices = [p for p in trained if len(parameter_shape(p)) >= 2]
    others = [p for p in trained if len(parameter_shape(p)) < 2]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def build_optimizer(groups: list[dict], training: TrainingSection, strategy: Strategy) -> torch.optim.Optimizer:
    """The optimizer for parameter groups (torch's format) under this strategy.

    Incompatible settings (8-bit states and optimizer offload) have been refused before: launch/compatibility.py."""
    if training.optim == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate)
    if training.optim in ("adamw_8bit", "paged_adamw_8bit"):
        import bitsandbytes

        name = "AdamW8bit" if training.optim == "adamw_8bit" else "PagedAdamW8bit"
        return getattr(bitsandbytes.optim, name)(groups, **_adam(training))
    if strategy.offload_optimizer != "none":
        return cpu_adam(groups, **_adam(training))
    return torch_adamw(groups, training)


def torch_adamw(groups: list[dict], training: TrainingSection) -> torch.optim.Optimizer:
    """torch's AdamW in its fused kernel, on GPUs and on the CPU: one pass over the parameters."""
    return torch.optim.AdamW(groups, **_adam(training), fused=True)


def _adam(training: TrainingSection) -> dict:
    betas = (training.adam_beta1, training.adam_beta2)
    return dict(lr=training.learning_rate, betas=betas, eps=training.adam_epsilon)


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """What people call this optimizer, for the printed plan."""
    fused = " (fused)" if getattr(optimizer, "defaults", {}).get("fused") else ""
    return f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}{fused}"
