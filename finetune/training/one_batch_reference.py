"""The yardstick: one big batch in plain float32 torch, without any engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finetune.data.collate import collate
from finetune.data.token_cache import TokenRow
from finetune.engine.engine import Engine
from finetune.engine.optimizer import make_optimizer
from finetune.launch.strategy import one_process
from finetune.model.facts import ModelFacts
from finetune.model.load import load_model
from finetune.objectives.sft import sft_loss, trained_tokens
from finetune.recipe.load import LoadedRecipe


class Reference:
    """A recipe's model on the CPU, trained with one big batch per window."""

    def __init__(self, loaded: LoadedRecipe, facts: ModelFacts, padding: int = 0):
        """Build it before any DeepSpeed engine starts, or after unset_hf_deepspeed_config(): else ZeRO-3 shards it."""
        self.network = load_model(loaded, one_process(), facts, torch.device("cpu"))
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
        batch = collate(rows, self.padding)
        loss = sft_loss(self.network, batch) / trained_tokens(batch)
        loss.backward()
        trained = [p for p in self.network.parameters() if p.requires_grad]
        length = torch.nn.utils.get_total_norm([p.grad.double() for p in trained if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(trained, self.limit or float("inf"), length.float())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), length.item()


def accumulate(engine: Engine, batches: Sequence[dict[str, Tensor]]) -> float:
    """One window of this rank's micro-batches through the engine; its mean loss per trained token over all ranks."""
    (tokens,) = engine.all_reduce_sum(sum(map(trained_tokens, batches)))
    loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    for k, batch in enumerate(batches):
        loss += engine.micro_step(batch, tokens, last=k == len(batches) - 1)
    return engine.all_reduce_sum(loss)[0] / tokens
