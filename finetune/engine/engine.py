"""The few verbs the training loop may use, the same under one process, DDP and DeepSpeed ZeRO.

The scale: for a window with the denominator D (trained tokens of all ranks) the update must be the gradient of
sum(losses) / D. DDP and DeepSpeed average over the N ranks, Accelerate and DeepSpeed divide by the configured
accumulation steps G, so each micro-batch's summed loss is multiplied by N x G / D. Nothing here depends on how many
micro-batches a window has: the flag `last` ends it."""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn

from finetune.engine.clipping import clip_on_cpu
from finetune.engine.deepspeed import config as ds
from finetune.engine.deepspeed import parameters as ds_parameters
from finetune.engine.gradient_norms import GradientWatch
from finetune.engine.meter import Meter
from finetune.launch.strategy import Strategy
from finetune.model.parameters import Weights, weights_of


@dataclass
class Engine:
    """Accelerate, prepared. `module` returns a micro-batch's summed loss; `optimizer` steps inside the last
    micro_step.
    """

    accelerator: Accelerator
    strategy: Strategy
    max_grad_norm: float
    module: nn.Module = field(init=False, repr=False)
    optimizer: torch.optim.Optimizer = field(init=False, repr=False)
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
        """Cut the engine's buffers to these parameters; again changes nothing. Under ZeRO-3 with NVMe, call it before
        they are read.
        """
        if self.strategy.engine == "deepspeed":
            ds.size_buffers(self.accelerator.state.deepspeed_plugin, weights, self.strategy)

    def configuration(self) -> dict | None:
        """DeepSpeed's effective configuration; None under another engine. After `prepare`."""
        return (
            ds.effective_configuration(self.accelerator.deepspeed_engine_wrapped.engine)
            if self.strategy.engine == "deepspeed"
            else None
        )

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap the summed-loss module and its optimizer for this engine."""
        self.size_buffers(weights_of(module))
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)

    def set_lr(self, learning_rate: float) -> None:
        """Learning rate of the next optimizer step. Before the window's backward: DeepSpeed steps inside the last
        one.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def micro_step(self, batch: dict[str, Tensor], denominator: float, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; when `last`, also clip, step and clear the gradients.

        Returns the micro-batch's summed loss, detached. `denominator` is the window's, over all ranks.
        """
        self.accelerator.sync_gradients = last
        with self.meter.micro_step(batch, last, self.module, self.optimizer):
            with self._reduce_only_when(last):
                summed_loss = self.module(self._to_device(batch))
                self.meter.point("forward", self.module, self.optimizer)
                steps = self.accelerator.gradient_accumulation_steps
                self.accelerator.backward(summed_loss * (self.ranks * steps / denominator))
                self.meter.point("backward", self.module, self.optimizer)
            if last:
                self._end_window()
                self.meter.point("step", self.module, self.optimizer)
        return summed_loss.detach()

    def watch_gradients(self, denominator: float) -> GradientWatch:
        """Watch the gradients of one window's micro-batches, each by itself. Call before the window; close it
        afterwards.
        """
        # before the backward it is times N x G / D, and Accelerate or DeepSpeed divides by G; then fp16's scaler
        # multiplies
        factor = self.ranks / denominator * self._loss_scale()
        return GradientWatch(self.module.parameters(), self.device, factor)

    def _loss_scale(self) -> float:
        if not self.scales_loss:
            return 1.0
        if self.strategy.engine == "deepspeed":
            return float(self.accelerator.deepspeed_engine_wrapped.engine.optimizer.loss_scale)
        return float(self.accelerator.scaler.get_scale())

    def _reduce_only_when(self, last: bool) -> contextlib.AbstractContextManager:
        # ZeRO-2 and 3 refuse no_sync; under DeepSpeed the boundary flag (sync_gradients) says the same.
        if last or self.strategy.engine == "deepspeed":
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.module)

    def _end_window(self) -> None:
        if self.strategy.engine == "deepspeed":
            # accelerate's wrapper has clipped and stepped inside the backward
            wrapped = self.accelerator.deepspeed_engine_wrapped
            self.last_grad_norm = float(wrapped.get_global_grad_norm())
            self.applied = bool(wrapped.engine.was_step_applied())
            if not self.applied:
                ds_parameters.drop_gradients(wrapped.engine.optimizer)
            return
        self.last_grad_norm = self._clip(self.max_grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(self.last_grad_norm):
            self.applied = False
        else:
            self.optimizer.step()
            self.applied = not self.accelerator.optimizer_step_was_skipped
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        # DDP's buckets are there all the time, and gradients that were taken away would be added up beside them: a
        # second copy
        self.optimizer.zero_grad(set_to_none=self.strategy.engine != "ddp")

    def _clip(self, limit: float) -> float:
        parameters = list(self.module.parameters())
        return float(
            self.accelerator.clip_grad_norm_(parameters, limit or math.inf)
            if self.device.type != "cpu"
            else clip_on_cpu(parameters, limit)
        )

    def grad_norm(self) -> float:
        """L2 norm of the last window's gradient over all parameters and ranks, before clipping."""
        return self.last_grad_norm

    @torch.no_grad()
    def summed_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Summed loss of one micro-batch without gradients. Every rank must call it equally often (ZeRO-3 gathers)."""
        return self.module(self._to_device(batch)).detach()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The module in evaluation mode, then back in training mode."""
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()

    def total(self, *values: float | Tensor) -> list[float]:
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

    def broadcast_object(self, value: object) -> object:
        """Rank 0's value. A collective."""
        return broadcast_object_list([value])[0]

    def settle_buckets(self, batch: dict[str, Tensor]) -> None:
        """One backward of zero before the first window. A collective.

        DDP rebuilds its buckets after the first backward, and with them the order in which ranks are added up: without
        this, a resumed run would differ from an unbroken one in the last bits of its first window."""
        if self.strategy.engine == "ddp":
            # the second leaves the gradients in the rebuilt buckets, or a resumed window would have them twice
            for _ in range(2):
                (self.module(self._to_device(batch)) * 0.0).backward()
            self._clear_gradients()

    def gather_state(self, only_trained: bool = False) -> dict[str, Tensor]:
        """Whole parameters and buffers by name (without the wrapper's prefix), on the CPU of rank 0; {} elsewhere.

        A collective. Under DeepSpeed trained parameters come as their float32 masters. One parameter at a time is
        whole."""
        keep = self.accelerator.is_main_process
        state = {}
        inner = self.inner_model()
        for name, parameter in inner.named_parameters():
            if only_trained and not parameter.requires_grad:
                continue
            if self.strategy.engine == "deepspeed":
                value = ds_parameters.full_parameter(parameter, keep)
            else:
                value = parameter.detach().to("cpu", copy=True) if keep else None
            if keep:
                state[name] = value
        if keep and not only_trained:
            persistent = inner.state_dict().keys()
            state.update({n: b.detach().cpu() for n, b in inner.named_buffers() if n in persistent})
        return state

    def inner_model(self) -> nn.Module:
        """The Hugging Face (or peft) model inside the wrappers."""
        return self.accelerator.unwrap_model(self.module).model

    def wait(self) -> None:
        """Barrier over all ranks."""
        self.accelerator.wait_for_everyone()

    def release(self) -> None:
        """Forget module and optimizer, so that another engine can start in this process and its process group."""
        if self.strategy.engine == "deepspeed":
            ds.destroy(self.accelerator)
        self.accelerator.free_memory()
        del self.module, self.optimizer
        AcceleratorState._reset_state()
        GradientState._reset_state()

    def close(self) -> None:
        """Leave the process group; the last call."""
        self.accelerator.end_training()

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
