"""Supervised fine-tuning: cross-entropy summed over the trained tokens of a micro-batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from finetune.objectives.fused_cross_entropy import summed_cross_entropy

Objective = Callable[..., Tensor]  # (model, **inputs of a MicroBatch) -> summed loss


def sft_loss(model: nn.Module, *, predicting: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """Sum of the next-token cross-entropies in nats, a scalar in float32.

    `predicting` and `targets` (n,) are a MicroBatch's; `inputs` is the rest of it, for the model. Padding lies to the
    right, where causal attention never looks, so no attention mask is passed. A micro-batch without a trained token
    gives 0 with zero gradients.
    """
    return F.cross_entropy(selected_logits(model, predicting, inputs).float(), targets, reduction="sum")


def fused_sft_loss(model: nn.Module, *, predicting: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """`sft_loss` by a head that computes the loss itself: no logits but a chunk's exist.

    Only for models that do nothing with their logits after a plain linear head, which finetune/model/proofs.py finds
    out.
    """

    def loss(head: nn.Linear, hidden: Tensor) -> Tensor:
        chosen = hidden.flatten(0, -2).index_select(0, predicting)
        return summed_cross_entropy(chosen, head.weight, head.bias, targets)[None, None, None]

    with _head_computes(model, loss):
        return model(**inputs, use_cache=False).logits.squeeze()


def selected_logits(model: nn.Module, predicting: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The model's logits (n, vocabulary) at these positions of the flattened input, the only ones that are computed.

    The output head is called as the module it is, with the chosen hidden states: adapters on it, tied or 4-bit weights
    and ZeRO-3's gathering stay as they are, and so does what a model does with its logits afterwards.
    """
    with _head_takes(model, predicting):
        logits = model(**inputs, use_cache=False).logits.flatten(0, -2)
    # a model whose head is no module that it calls has computed them all
    return logits if len(logits) == len(predicting) else logits.index_select(0, predicting)


@contextlib.contextmanager
def _head_takes(model: nn.Module, predicting: Tensor) -> Iterator[None]:
    """While active, the output head sees these positions of its input alone, as one row."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def choose(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, -2).index_select(0, predicting)[None], *args[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _head_computes(model: nn.Module, result: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """While active, the output head's forward is `result` of itself and its input; hooks on it run as ever."""
    head = model.get_output_embeddings()
    head.forward = lambda hidden: result(head, hidden)
    try:
        yield
    finally:
        del head.forward


class SummedLoss(nn.Module):
    """The module that is prepared by Accelerate: model, head and loss in one forward.

    With everything inside, DDP's reducer and ZeRO's gathering see the whole forward, whatever the loss does with the
    model.
    """

    def __init__(self, model: nn.Module, objective: Objective = sft_loss):
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """Summed loss of a micro-batch, scalar, from what it holds for the model (`MicroBatch.inputs`)."""
        return self.objective(self.model, **inputs)
