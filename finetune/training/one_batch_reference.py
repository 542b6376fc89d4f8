"""The yardstick: one big batch in plain float32 torch, without any engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finetune.data.token_cache import IGNORED, TokenRow
from finetune.engine.engine import Engine
from finetune.engine.optimizer import make_optimizer
from finetune.launch.strategy import one_process
from finetune.model.facts import ModelFacts
from finetune.model.load import load_model
from finetune.objectives.micro_batch import MicroBatch
from finetune.recipe.load import LoadedRecipe


class Reference:
    """A recipe's model on the CPU, trained with one big batch per window."""

    def __init__(self, loaded: LoadedRecipe, facts: ModelFacts, padding: int = 0):
        """Build it before any DeepSpeed engine starts, or after unset_hf_deepspeed_config(): else ZeRO-3 shards it."""
        usual = dataclasses.replace(facts, attention="")
        self.network = load_model(loaded, one_process(), usual, torch.device("cpu"))
        self.optimizer = make_optimizer(self.network, loaded.recipe.training, one_process())
        self.limit, self.padding = loaded.recipe.training.max_grad_norm, padding

    def state(self) -> dict[str, Tensor]:
        """Copies of the trained parameters."""
        return {n: p.detach().clone() for n, p in self.network.named_parameters() if p.requires_grad}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go to these weights, bit for bit."""
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                if name in state:
                    parameter.copy_(state[name])

    def set_lr(self, learning_rate: float) -> None:
        """Learning rate of the steps to come."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self, rows: Sequence[TokenRow]) -> tuple[float, float]:
        """One optimizer step on one batch of all rows; (mean loss per trained token, gradient norm before clipping)."""
        loss = self._mean_loss(rows)
        loss.backward()
        trained = [p for p in self.network.parameters() if p.requires_grad]
        length = torch.nn.utils.get_total_norm([p.grad.double() for p in trained if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(trained, self.limit or float("inf"), length.float())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), length.item()

    def _mean_loss(self, rows: Sequence[TokenRow]) -> Tensor:
        """The plain way: rows padded and masked, logits everywhere, the mean over the trained tokens."""
        input_ids, labels, mask = (
            pad_sequence([torch.as_tensor(part) for part in parts], batch_first=True, padding_value=fill).long()
            for parts, fill in (
                ([row.input_ids for row in rows], self.padding),
                ([row.labels for row in rows], IGNORED),
                ([np.ones(len(row.input_ids)) for row in rows], 0),
            )
        )
        logits = self.network(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def accumulate(engine: Engine, batches: Sequence[MicroBatch]) -> float:
    """One window of this rank's micro-batches through the engine; its mean loss per trained token over all ranks."""
    (tokens,) = engine.all_reduce_sum(sum(batch.trained_tokens for batch in batches))
    loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    for k, batch in enumerate(batches):
        loss += engine.micro_step(batch, tokens, last=k == len(batches) - 1)
    return engine.all_reduce_sum(loss)[0] / tokens
