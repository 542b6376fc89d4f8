"""What is learned: an objective takes a model and a micro-batch and returns a summed loss; the caller owns the denominator."""

from finetune.objectives.sft import SummedLoss, sft_loss, trained_tokens

__all__ = ["SummedLoss", "sft_loss", "trained_tokens"]
