"""The few verbs the training loop may use, the same under one process, DDP and DeepSpeed ZeRO.

The scale: for a window with the denominator D (trained tokens of all ranks) the update must be the gradient of
sum(losses) / D. DDP and DeepSpeed average over the N ranks, Accelerate and DeepSpeed divide by the configured
accumulation steps G, so each micro-batch's summed loss is multiplied by N x G / D. Nothing here depends on how many
micro-batches a window has: the flag `last` ends it."""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from finetune.engine.gradient_norms import MicroBatchGradNorms
from finetune.engine.meter import Meter
from finetune.engine.settings import Prepared
from finetune.engine.state import readable
from finetune.errors import UserError
from finetune.model.parameters import Weights, weights_of
from finetune.objectives.micro_batch import MicroBatch


@dataclass
class Engine(Prepared):
    """Accelerate, prepared. `kind` is the module with what is special about this engine (kinds.py)."""

    kind: ModuleType = field(repr=False)
    meter: Meter = field(default_factory=Meter, repr=False)
    last_grad_norm: float = field(init=False, default=math.nan)
    applied: bool = field(init=False, default=False)

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def ranks(self) -> int:
        return self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def scales_loss(self) -> bool:
        """Whether fp16 loss scaling is on: an overflow then skips the step and is nobody's fault."""
        return self.strategy.mixed_precision == "fp16"

    def size_buffers(self, weights: Weights) -> None:
        """Size the engine's buffers for these parameters; again changes nothing. Under ZeRO-3 with NVMe, call it before
        they are read.
        """
        self.kind.size_buffers(self, weights)

    def configuration(self) -> dict | None:
        """DeepSpeed's effective configuration; None under another engine. After `prepare`."""
        return self.kind.configuration(self)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap the summed-loss module and its optimizer for this engine."""
        self.size_buffers(weights_of(module))
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.meter.module, self.meter.optimizer = self.module, self.optimizer

    def set_lr(self, learning_rate: float) -> None:
        """Learning rate of the next optimizer step. Before the window's backward: DeepSpeed steps inside the last
        one.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def micro_step(self, batch: MicroBatch, denominator: float, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; when `last`, also clip, step and clear the gradients.

        Returns the micro-batch's summed loss, detached. `denominator` is the window's, over all ranks.
        """
        self.accelerator.sync_gradients = last
        with self.meter.micro_step(batch, last):
            # gradients are reduced over the ranks in the window's last micro-batch alone
            with contextlib.nullcontext() if last else self.kind.without_reduction(self):
                summed_loss = self.module(self._to_device(batch.inputs))
                self.meter.point("forward")
                steps = self.accelerator.gradient_accumulation_steps
                self.accelerator.backward(summed_loss * (self.ranks * steps / denominator))
                self.meter.point("backward")
            if last:
                self.last_grad_norm, self.applied = self.kind.end_window(self)
                self.meter.point("step")
        return summed_loss.detach()

    def track_gradient_norms(self, denominator: float) -> MicroBatchGradNorms:
        """Watch the gradients of one window's micro-batches, each by itself. Call before the window; close it
        afterwards.
        """
        # before the backward it is times N x G / D, and Accelerate or DeepSpeed divides by G; then fp16's scaler
        # multiplies
        factor = self.ranks / denominator * self.kind.loss_scale(self)
        return MicroBatchGradNorms(self.module.parameters(), self.device, factor)

    def grad_norm(self) -> float:
        """L2 norm of the last window's gradient over all parameters and ranks, before clipping."""
        return self.last_grad_norm

    @torch.no_grad()
    def evaluate_batch(self, batch: MicroBatch) -> Tensor:
        """Summed loss of one micro-batch without gradients. Every rank must call it equally often (ZeRO-3 gathers)."""
        return self.module(self._to_device(batch.inputs)).detach()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The module in evaluation mode, then back in training mode."""
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()

    def all_reduce_sum(self, *values: float | Tensor) -> list[float]:
        """Sums over all ranks, one collective for all values."""
        local = torch.stack([torch.as_tensor(v, dtype=torch.float64).to(self.device) for v in values])
        return self.accelerator.reduce(local, reduction="sum").tolist()

    @property
    def host(self) -> str:
        """Name of the machine this rank runs on."""
        return socket.gethostname()

    def gather_objects(self, value: object) -> list:
        """The value of every rank, in their order. A collective."""
        return gather_object([value])

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value. A collective."""
        return broadcast_object_list([value])[0]

    def warm_up_ddp_buckets(self, batch: MicroBatch) -> None:
        """One backward of zero before the first window. A collective.

        DDP rebuilds its buckets after the first backward, and with them the order in which ranks are added up: without
        this, a resumed run would differ from an unbroken one in the last bits of its first window."""
        self.kind.warm_up_buckets(self, self._to_device(batch.inputs))

    def full_state_dict(self, only_trained: bool = False) -> dict[str, Tensor]:
        """Whole parameters and buffers by name (without the wrapper's prefix), on the CPU of rank 0; {} elsewhere.

        A collective. Under DeepSpeed trained parameters come as their float32 masters. One parameter at a time is
        whole."""
        keep = self.accelerator.is_main_process
        state = {}
        inner = self.inner_model()
        for name, parameter in inner.named_parameters():
            if only_trained and not parameter.requires_grad:
                continue
            value = self.kind.full_parameter(parameter, keep)
            if keep:
                state[name] = value
        if keep and not only_trained:
            persistent = inner.state_dict().keys()
            state.update({n: b.detach().cpu() for n, b in inner.named_buffers() if n in persistent})
        return state

    def save_state(self, folder: Path) -> list[str]:
        """Write this rank's part of the state (trained weights, optimizer, loss scale) into `folder`, between two
        windows; returns the names of its files. A collective. Raises OSError.
        """
        return self.kind.save(self, folder)

    def load_state(self, folder: Path) -> None:
        """Read what `save_state` wrote under the same strategy, or what `convert_state` made of it; before the first
        window. `folder` has been verified. A collective.

        Raises UserError where a file does not hold what its name says, which only a forged manifest lets through.
        """
        with readable(folder):
            self.kind.load(self, folder)

    def on_rank_0(self, act: Callable[[], object]) -> str:
        """Do it on rank 0; what went wrong there, on every rank. A collective. Raises UserError where rank 0 does."""
        problem: str | UserError = ""
        if self.rank == 0:
            try:
                act()
            except OSError as error:
                problem = str(error)
            except UserError as error:  # the ranks do not see one disk: trying again changes nothing
                problem = error
        problem = self.broadcast_object(problem)
        if isinstance(problem, UserError):
            raise problem
        return problem

    def barrier(self) -> None:
        """Barrier over all ranks."""
        self.accelerator.wait_for_everyone()

    def release(self) -> None:
        """Forget module and optimizer, so that another engine can start in this process and its process group."""
        self.kind.release(self)
        self.accelerator.free_memory()
        del self.module, self.optimizer
        self.meter.module = self.meter.optimizer = None
        AcceleratorState._reset_state()
        GradientState._reset_state()

    def close(self) -> None:
        """Leave the process group; the last call."""
        self.accelerator.end_training()

    def _to_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
