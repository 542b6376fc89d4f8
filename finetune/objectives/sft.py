"""Supervised fine-tuning: cross-entropy summed over the trained tokens of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOT_TRAINED = -100
Objective = Callable[[nn.Module, dict[str, Tensor]], Tensor]  # (model, micro-batch) -> summed loss


def sft_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum of the next-token cross-entropies in nats, a scalar in float32.

    `batch` holds input_ids, attention_mask and labels, each (rows, tokens); labels are -100 where nothing is trained
    and are shifted here: position t predicts labels[:, t + 1]. A micro-batch without a trained token gives 0 with zero
    gradients.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    # The labels are shifted, not the logits: slicing the logits would copy the largest tensor of the step.
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=NOT_TRAINED)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NOT_TRAINED, reduction="sum")


class SummedLoss(nn.Module):
    """The module that is prepared by Accelerate: model, head and loss in one forward.

    With everything inside, DDP's reducer and ZeRO's gathering see the whole forward, whatever the loss does with the
    model.
    """

    def __init__(self, model: nn.Module, objective: Objective = sft_loss):
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Summed loss of the micro-batch, scalar."""
        return self.objective(self.model, batch)


def trained_tokens(batch: dict[str, Tensor]) -> int:
    """Tokens of a micro-batch that have a loss."""
    return int(torch.count_nonzero(batch["labels"][:, 1:] != NOT_TRAINED))
