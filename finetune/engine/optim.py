"""Parameter groups of the recipe's optimizer. Which implementation runs is the backend's choice."""

from __future__ import annotations

import torch
from torch import nn

from finetune.engine.kernels import OptimizerSettings, build_optimizer
from finetune.launch.strategy import Strategy
from finetune.model.parameters import parameter_shape
from finetune.recipe.fields import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe, strategy: Strategy) -> torch.optim.Optimizer:
    """Optimizer over the trained parameters; weight decay on matrices only, as in Hugging Face's Trainer."""
    return build_optimizer(parameter_groups(model, recipe), optimizer_settings(recipe), strategy)


def optimizer_settings(recipe: Recipe) -> OptimizerSettings:
    """What the recipe says of its optimizer."""
    training = recipe.training
    return OptimizerSettings(
        kind=training.optim,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        beta1=training.adam_beta1,
        beta2=training.adam_beta2,
        epsilon=training.adam_epsilon,
    )


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """The trained parameters in torch's format: those with weight decay, and the others."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = recipe.training.weight_decay
    if not decay:
        return [{"params": trained, "weight_decay": 0.0}]
    matrices = [p for p in trained if len(parameter_shape(p)) >= 2]
    others = [p for p in trained if len(parameter_shape(p)) < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
